"""Draw pictures from text.

python scripts/txt2img.py --prompt "a handwritten digit five"
python scripts/txt2img.py --prompt "a bold seven leaning right" --n_samples 8 --steps 20 --scale 2 --seed 1
python scripts/txt2img.py --from-file prompts.txt --n_samples 4 --n_iter 2 --outdir outputs/mine
python scripts/txt2img.py --from-png outputs/mine/samples/00003.png

Each prompt gets n_samples x n_iter pictures. Picture k of the whole run, counted over all pictures of the first prompt,
then of the next, has seed `--seed` + k. Files: OUTDIR/samples/00000.png, OUTDIR/grid-0000.png, numbered on from those
that are there.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import Parser, real, run, whole
from ldm.inference.output import OutputFolder
from ldm.inference.png import read_png_text
from ldm.inference.recipe import Recipe, plan, read_prompts

if TYPE_CHECKING:  # it imports torch
    from ldm.inference.draw import Drawn, StripRecorder

# The options that are settings of a picture, under a Recipe's names for them.
SETTINGS = (
    *("negative", "scale", "steps", "sampler", "spacing", "eta", "interval", "rescale"),
    *("seed", "fixed_code", "width", "height", "precision"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """CompVis's flags and today's. A setting left None is the checkpoint's own, or the --from-png picture's."""
    parser = Parser(description=__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", default="a handwritten digit five", metavar="TEXT", help="what to draw (a handwritten digit five)")
    add("--from-file", type=Path, metavar="FILE", help="a text file of prompts, one a line")
    add("--from-png", type=Path, metavar="FILE", help="make this picture again, changed by the settings that are given")

    add = parser.add_argument_group("pictures").add_argument
    add("--n_samples", type=whole(1), default=1, metavar="N", help="pictures per prompt in an iteration (1)")
    add("--n_iter", type=whole(1), default=1, metavar="N", help="iterations, each n_samples more per prompt (1)")
    add("--batch-size", type=whole(1), metavar="N", help="pictures at a time (16): only bounds the memory")
    add("--seed", type=whole(0), metavar="N", help="seed of the first picture (0)")
    add("--fixed_code", action="store_true", default=None, help="start every picture from picture 0's noise")
    add("--H", type=whole(1), dest="height", metavar="PIXELS", help="height")
    add("--W", type=whole(1), dest="width", metavar="PIXELS", help="width")
    add("--C", type=whole(1), metavar="N", help="latent channels; only checked, the model knows them")
    add("--f", type=whole(1), metavar="N", help="pixels per latent; only checked")

    add = parser.add_argument_group("sampling (what is not given is the checkpoint's own)").add_argument
    add("--negative-prompt", dest="negative", metavar="TEXT", help="what to steer away from")
    add("--scale", type=real(), metavar="X", help="guidance; 1 is none")
    add("--steps", "--ddim_steps", type=whole(1), metavar="N", help="network steps")
    add("--sampler", metavar="NAME", help="ddim, ddpm, ...; an unknown name lists the known ones")
    add(
        "--plms",
        action="store_const",
        const="plms",
        dest="sampler",
        help="the same as --sampler plms, which is not there yet",
    )
    add("--spacing", metavar="NAME", help="of the timesteps: trailing, leading, linspace, quad, compvis, ...")
    add("--eta", "--ddim_eta", type=real(0), metavar="X", help="share of fresh noise in each step: 0 is DDIM, 1 DDPM")
    add("--interval", type=real(0, infinite=True), nargs=2, metavar=("LOW", "HIGH"), help="guide only at these sigmas")
    add("--rescale", type=real(0), metavar="X", help="guidance rescale (0)")

    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, metavar="FILE", help="checkpoint (the digits model that ships with the package)")
    add("--config", type=Path, metavar="FILE", help="yaml of the model; only checked, the checkpoint carries its own")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (auto)")
    add("--precision", choices=("full", "autocast"), help="autocast computes in half precision (full)")

    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path("outputs/txt2img-samples"), metavar="DIR", help="(outputs/txt2img-samples)")
    add("--skip_save", action="store_true", help="do not save the single pictures")
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--n_rows", type=whole(0), default=0, metavar="N", help="pictures in a row of the grid (0: n_samples)")
    add("--strip", action="store_true", help="save how each picture came about: x_t, and below it the predicted x0")
    args = parser.parse_args(argv)
    args.interval = None if args.interval is None else tuple(args.interval)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever is wrong with options, input files or the output folder is found before torch is imported."""
    args = parse(argv)
    if args.from_png is not None and args.n_samples * args.n_iter != 1:
        raise ValueError("--from-png makes one picture: leave out --n_samples and --n_iter")
    prompts = [args.prompt] if args.from_file is None else read_prompts(args.from_file)
    made = None if args.from_png is None else read_recipe(args.from_png)
    output = OutputFolder(args.outdir)

    import ldm
    from ldm.inference.agreement import check_config, check_latents
    from ldm.inference.draw import StripRecorder, changed_recipe, draw, draw_again, own_recipe, watching
    from ldm.loading import SHIPPED

    checkpoint = SHIPPED if args.ckpt is None else args.ckpt
    model = ldm.load(checkpoint, device=args.device)
    check_latents(model, args.C, args.f)
    if args.config is not None:
        check_config(model, args.config)
    settings = {name: getattr(args, name) for name in SETTINGS}
    if made is None:
        first = own_recipe(model, checkpoint.stem, **settings)
        recipes = plan(first, prompts, args.n_samples * args.n_iter, 16 if args.batch_size is None else args.batch_size)
    else:
        recipes = [changed_recipe(made, batch_size=args.batch_size, **settings)]
    recorder = StripRecorder(model, recipes[0].steps) if args.strip else None
    with watching(recipes, recorder) as callback:
        drawn = draw(model, recipes, callback) if made is None else draw_again(model, recipes[0], callback)
        save(drawn, output, args, recorder)


def read_recipe(path: Path) -> Recipe:
    """The recipe that a PNG carries; ValueError naming the file if it carries none."""
    text = read_png_text(path)
    try:
        return Recipe.from_text(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be made again: {error}") from None


def save(
    drawn: Iterable["Drawn"], output: OutputFolder, args: argparse.Namespace, recorder: "StripRecorder | None"
) -> None:
    """Save each picture as soon as it is there, then the grid, and say where they are."""
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


if __name__ == "__main__":
    run(main, fast_exit=True)
