"""What the drawing scripts have in common: their options, and a run from these to files. Imports torch only to draw."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import Parser, real, whole
from ldm.inference.options import add_model_options, load_model
from ldm.inference.original import Original, check_original
from ldm.inference.output import OutputFolder
from ldm.inference.png import read_png_text
from ldm.inference.recipe import Recipe, plan, read_prompts

if TYPE_CHECKING:  # they import torch
    from ldm.inference.draw import Drawn
    from ldm.inference.strip import StripRecorder
    from ldm.latent_diffusion import LatentDiffusion

# The options that are settings of an image, under a Recipe's names for them.
SETTINGS = (
    *("negative", "scale", "steps", "sampler", "spacing", "eta", "interval", "rescale"),
    *("seed", "fixed_code", "width", "height", "clip_skip", "plain", "precision"),
)
BATCH = 16  # images at a time
SPACING = (
    "of the timesteps: trailing, leading, linspace, quad, compvis, karras, exponential, or levels of your own: "
    '"999,749,499,249" or "sigmas 14,3.6,1.2"'
)


def drawing_parser(description: str, prompt: str, outdir: str, classes: bool = False) -> Parser:
    """CompVis's flags and today's. A setting left None is the checkpoint's own, or the --from-png image's.

    prompt, outdir: what these options are if not given. classes: what to draw is asked for by numbers, not by texts.
    """
    parser = Parser(description=description)
    add = parser.add_mutually_exclusive_group().add_argument
    if classes:
        add("--class", nargs="+", dest="prompts", default=[prompt], metavar="N", help="which classes to draw (any)")
    else:
        told = f"what to draw ({prompt or 'nothing is said'})"
        add("--prompt", nargs=1, dest="prompts", default=[prompt], metavar="TEXT", help=told)
    add("--from-file", type=Path, metavar="FILE", help="a text file of prompts or classes, one a line")
    add("--from-png", type=Path, metavar="FILE", help="make this image again, changed by the settings that are given")

    add = parser.add_argument_group("images").add_argument
    add("--n_samples", type=whole(1), default=1, metavar="N", help="images per prompt in an iteration (1)")
    add("--n_iter", type=whole(1), default=1, metavar="N", help="iterations, each n_samples more per prompt (1)")
    add("--batch-size", type=whole(1), metavar="N", help=f"images at a time ({BATCH}): only bounds the memory")
    add("--seed", type=whole(0), metavar="N", help="seed of the first image (0)")
    add("--fixed_code", action="store_true", default=None, help="start every image from image 0's noise")
    add("--H", type=whole(1), dest="height", metavar="PIXELS", help="height")
    add("--W", type=whole(1), dest="width", metavar="PIXELS", help="width")
    add("--C", type=whole(1), metavar="N", help="latent channels; only checked, the model knows them")
    add("--f", type=whole(1), metavar="N", help="pixels per latent; only checked")

    add = parser.add_argument_group("sampling (what is not given is the checkpoint's own)").add_argument
    add("--negative-prompt", dest="negative", metavar="TEXT", help="what to steer away from")
    add("--plain", action="store_true", default=None, help="(brackets) and BREAK in prompts are words, not syntax")
    add("--clip-skip", type=whole(1), metavar="N", help="CLIP's layer to read, counted back from the model's own (1)")
    add("--scale", type=real(), metavar="X", help="guidance; 1 is none")
    add("--steps", "--ddim_steps", type=whole(1), metavar="N", help="network steps")
    add(
        "--sampler",
        metavar="NAME",
        help="ddim, ddpm, ... (an unknown name lists them), or auto: ddpm for all levels, else ddim",
    )
    add("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")
    add("--spacing", metavar="NAME", help=SPACING)
    add("--eta", "--ddim_eta", type=real(0), metavar="X", help="share of fresh noise in each step: 0 is DDIM, 1 DDPM")
    add("--interval", type=real(0, infinite=True), nargs=2, metavar=("LOW", "HIGH"), help="guide only at these sigmas")
    add("--rescale", type=real(0), metavar="X", help="guidance rescale (0)")
    add("--threshold", type=share, metavar="P", help="dynamic thresholding at this percentile, a fraction: 0.995")
    add("--pag", type=real(), default=0.0, metavar="X", help="perturbed-attention guidance at this scale; 0 is off")
    add("--pag-layers", nargs="+", default=["middle_block"], metavar="NAME", help="whose attention (middle_block)")
    add("--autoguide", type=Path, metavar="FILE", help="steer away from this weaker model of the same latents")
    add("--autoguide-scale", type=real(), default=2.0, metavar="X", help="(2); 1 is off")
    parser.set_defaults(classifier=None, classes=classes)
    if classes:
        add("--classifier", type=Path, metavar="FILE", help="steer to the classes by this classifier of noisy images")
        add("--classifier-scale", type=real(), default=1.0, metavar="X", help="(1); 0 is off")

    add_model_options(parser)

    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path(outdir), metavar="DIR", help=f"({outdir})")
    add("--skip_save", action="store_true", help="do not save the single images")
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--n_rows", type=whole(0), default=0, metavar="N", help="images in a row of the grid (0: n_samples)")
    add("--strip", action="store_true", help="save how each came about: noising, x_t, predicted x0")
    return parser


def add_original_options(parser: Parser, strength: str) -> None:
    """Those of the scripts that draw over an image. strength: what it is if not given, in words."""
    add = parser.add_argument_group("the image to draw over").add_argument
    add("--init-img", type=Path, metavar="FILE", help="PNG, JPEG, WebP, ..., upright as its EXIF data says")
    add("--strength", type=share, metavar="X", help=f"how much of it changes, 0 to 1 ({strength})")
    add("--resize", action="store_true", help="scale it so that its shorter side is that of the model's own size")


def share(text: str) -> float:
    """An option type: a number from 0 to 1."""
    value = real(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range: it must be at most 1")
    return value


def draw_run(args: argparse.Namespace, original: Original | None = None) -> None:
    """Draw and save what the options ask for, over the original if there is one.

    Whatever is wrong with options, input files or the output folder is found before torch is imported.
    """
    if args.from_png is not None and args.n_samples * args.n_iter != 1:
        raise ValueError("--from-png makes one image: leave out --n_samples and --n_iter")
    prompts = args.prompts if args.from_file is None else read_prompts(args.from_file)
    if args.classifier is not None and args.from_png is None and not any(prompts):
        raise ValueError("--classifier steers to classes: say by --class which")
    made = None if args.from_png is None else read_recipe(args.from_png)
    if made is not None:
        check_original(made, original, args.from_png)
        args.precision = made.precision if args.precision is None else args.precision
    output = OutputFolder(args.outdir)

    model = load(args)
    from ldm.inference.draw import (
        changed_recipe,
        chunks,
        draw,
        draw_again,
        own_recipe,
        steps_of,
        watching,
    )
    from ldm.inference.strip import StripRecorder

    if model.cond_stage_model is None and args.classifier is None and made is None and any(prompts):
        if args.classes:
            raise ValueError(
                f"--class {prompts[0]} cannot be asked of a model that is told nothing: give a --classifier"
            )
        print("this model is told nothing: the prompt is left out", file=sys.stderr)
        prompts = [""] * len(prompts)
    settings = settings_of(args)
    if original is not None:
        settings |= settings_over(original, args, model, made)
    if made is None:
        first = own_recipe(model, model.path.stem, **settings)
        batch_size = BATCH if args.batch_size is None else args.batch_size
        lengths = chunks(model, first, prompts)
        recipes = plan(first, prompts, args.n_samples * args.n_iter, batch_size, lengths)
    else:
        recipes = [changed_recipe(made, model, batch_size=args.batch_size, **settings)]
    first = recipes[0]
    if original is not None:
        original = original.at(first.width, first.height)
    recorder = StripRecorder(model, steps_of(first)) if args.strip and steps_of(first) > 0 else None
    with watching(recipes, recorder) as callback:
        if made is None:
            drawn = draw(model, recipes, callback, original)
        else:
            drawn = draw_again(model, first, callback, original)
        save(drawn, output, args, recorder)


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG carries; ValueError naming the file if it carries none."""
    text = read_png_text(path)
    try:
        return Recipe.from_text(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be made again: {error}") from None


def load(args: argparse.Namespace) -> "LatentDiffusion":
    """The model that the options name. ValueError if --C or --f say anything else than it does."""
    from ldm.inference.agreement import check_latents

    model = load_model(args)
    check_latents(model, args.C, args.f)
    set_guide(model, args)
    return model


def set_guide(model: "LatentDiffusion", args: argparse.Namespace) -> None:
    """Guidance besides the classifier-free one, as the options ask for it, written down among the model's changes."""
    from ldm.checkpoint.file import file_hash
    from ldm.inference.guiders import load_classifier, load_weak, make_guide

    weak = None if args.autoguide is None else load_weak(args.autoguide, model)
    teller = None if args.classifier is None else load_classifier(args.classifier, model)
    model.guide = make_guide(
        model,
        threshold=args.threshold,
        pag=args.pag,
        pag_layers=args.pag_layers,
        weak=weak,
        autoguide_scale=args.autoguide_scale,
        teller=teller,
        classifier_scale=1.0 if teller is None else args.classifier_scale,
    )
    if weak is not None:
        model.changes.append(f"autoguide {file_hash(args.autoguide)} at {args.autoguide_scale:g}")
    if args.classifier is not None:
        model.changes.append(f"classifier {file_hash(args.classifier)} at {args.classifier_scale:g}")
    if args.pag != 0:
        model.changes.append(f"pag {args.pag:g} {' '.join(args.pag_layers)}")
    if args.threshold is not None:
        model.changes.append(f"threshold {args.threshold:g}")


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What the options say of an image, by a Recipe's names; None where they say nothing."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    return settings | {"interval": None if args.interval is None else tuple(args.interval)}


def settings_over(
    original: Original, args: argparse.Namespace, model: "LatentDiffusion", made: Recipe | None = None
) -> dict[str, object]:
    """What is to be said besides of an image drawn over the original; size and strength are `made`'s if not given."""
    strength, size = args.strength, (args.width, args.height)
    if made is None and strength is None:
        strength = model.usual_strength(original.mask is not None)
    if made is None or args.resize or size != (None, None):
        size = original.size((model.defaults["width"], model.defaults["height"]), *size, args.resize)
    return {
        "strength": strength,
        "width": size[0],
        "height": size[1],
        "init_hash": original.init_hash,
        "mask_hash": original.mask_hash,
    }


def save(
    drawn: Iterable["Drawn"], output: OutputFolder, args: argparse.Namespace, recorder: "StripRecorder | None"
) -> None:
    """Save each image as soon as it is there, then the grid, and say where they are."""
    for_grid, text_of_first, saved = [], "", []
    for recipe, image, place in drawn:
        text = recipe.to_text()
        if not args.skip_save:
            saved.append(output.save_sample(image, text))
        if recorder is not None:
            saved.append(output.save_strip(recorder.strip(place), text))
        if not args.skip_grid:
            text_of_first = text_of_first if for_grid else text
            for_grid.append(image)
    if for_grid:
        columns = args.n_rows if args.n_rows > 0 else args.n_samples
        saved.append(output.save_grid(for_grid, columns, text_of_first))
    for path in saved:
        print(path)
