"""Edit images by their prompts: replace, add, strengthen, weaken or silence words; show what each word attends to.

ldm edit --prompt "a thin digit seven" --to "a bold digit seven"
ldm edit --prompt "a bold digit seven" --reweight "bold=2"
ldm edit --prompt "a bold digit seven" --silence bold
ldm edit --prompt "a bold digit seven" --show-attention
ldm edit --init-img three.png --prompt "a handwritten digit three" --to "a handwritten digit eight"

Prompt-to-Prompt (Hertz et al. 2022): an image of --prompt and its edited version are generated together from one seed,
and the second takes over attention of the first one. It needs no training and takes any model of texts. Files:
OUTDIR/samples, each image before its edited version; OUTDIR/grid-0000.png, the images above their edited versions; with
--show-attention OUTDIR/attention-0000.png, where each word of a prompt is attended to (red: most).

--init-img edits an image of your own, which --prompt describes: both are generated from the noise that DDIM inversion
finds for it, and how far the first one is from it is printed. Guidance leads away from it; --null-text (Mokady et al.
2022) optimises the null condition against that. The grid then begins with the image itself.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.cli import Parser, int_range
from ldm.editing.settings import Editing, Inverting
from ldm.inference.init_image import InitImage
from ldm.inference.options import add_init_image_options, add_model_options, add_settings, load_model, settings_of
from ldm.inference.recipe import Recipe, plan
from ldm.inference.run import OutputFolder, check_memory, note_unused, note_unused_words, usable_prompts
from ldm.settings import checked, setting_rows

if TYPE_CHECKING:  # it imports torch
    from ldm.editing.inversion import Inversion, NullText

PROMPT = "a thin digit seven"
SAMPLING = "negative steps sampler scale spacing final_sigma eta interval rescale clip_skip plain".split()
SAMPLING += ["original_size", "crop", "aesthetic_score"]
GUIDANCE = ("scale", "interval", "rescale")  # of these; inversion is without it


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("edit")
    add = group.add_argument
    add("--prompt", dest="prompts", metavar="TEXT", help=f"of the first image ({PROMPT})")
    add("--to", metavar="TEXT", help="the edited prompt: words replace those in their places, or are added (--prompt)")
    add("--reweight", action="append", default=[], metavar="WORD=X", help="the edited image has X times a word of it")
    add("--silence", action="append", default=[], metavar="WORD", help="nothing attends to this word of it; repeatable")
    add_settings(group, *setting_rows(Editing), of=Editing)
    add("--show-attention", action="store_true", help="save what each word is attended to by")
    add_init_image_options(parser, strength=False)
    group = parser.add_argument_group("its inversion")
    group.add_argument("--null-text", action="store_true", help="optimise the null condition so that guidance keeps it")
    add_settings(group, *setting_rows(Inverting), of=Inverting)
    group = parser.add_argument_group("images")
    group.add_argument("--n_samples", type=int_range(1), metavar="N", help="pairs of images, all at once (1)")
    add_settings(group, "seed", "height", "width")
    add_settings(parser.add_argument_group("sampling (what is not given is the checkpoint's own)"), *SAMPLING)
    add_model_options(parser)
    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path("outputs/edit-samples"), metavar="DIR", help="(outputs/edit-samples)")
    add("--enlarge", type=int_range(1, 64), metavar="N", help="repeat each pixel N times in all files (1)")
    parser.set_defaults(autoguide=None, classifier=None, classes=False, from_file=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    weights = dict(map(read_weight, args.reweight))
    edits = args.to is not None or bool(weights or args.silence)
    editing, inverting = check_options(args, edits)
    init = None if args.init_img is None else InitImage.read(args.init_img)
    output = OutputFolder(args.outdir, enlarge=args.enlarge)

    model: Any = load_model(args, gradients=args.null_text)
    from ldm.editing import attention_maps, null_text_guidance, prompt_to_prompt
    from ldm.inference.generate import generate_run, progress

    recipes = plan_pairs(model, args, init, edits)
    first, last, n = recipes[0], recipes[-1], len(recipes) // (1 + edits)
    noise, shown, maps = None, [], None
    with ExitStack() as hooks:
        if init is not None:
            image = init.resized(first.width, first.height).image
            found, nulls, shown = invert_file(model, image, first, inverting, args.null_text)
            noise = found.noise.expand(len(recipes), -1, -1, -1)
            if nulls is not None:
                hooks.enter_context(null_text_guidance(model, nulls, len(recipes)))
        if args.show_attention:
            maps = hooks.enter_context(attention_maps(model, [r.prompt for r in recipes], plain=first.plain))
        if edits:
            options = {"weights": weights, "silence": args.silence, "pairs": n, "plain": first.plain}
            options |= given_of(args, setting_rows(Editing))
            hooks.enter_context(prompt_to_prompt(model, first.prompt, last.prompt, **options))
        callback = hooks.enter_context(progress(recipes))
        images = [made.image for made in generate_run(model, recipes, callback, noise=noise)]
    if shown:
        report(*shown, images[0])
    texts = texts_of(args, recipes, n, editing, inverting)
    order = [i + k for i in range(n) for k in range(0, len(images), n)]  # each image before its edited version
    saved = [output.save_sample(images[i], texts[i]) for i in order]
    saved.append(output.save_grid([*shown[:1], *images], n, texts[0]))
    if maps is not None:
        saved.append(output.save_strip(maps.sheet(images, args.enlarge), texts[0], "attention-"))
    for path in saved:
        print(path)


def check_options(args: argparse.Namespace, edits: bool) -> tuple[Editing, Inverting]:
    """Return the settings of the edit and of the inversion. ValueError for options that would have no effect."""
    words = [read_weight(text)[0] for text in args.reweight]
    if len(set(words)) < len(words) or set(words) & set(args.silence):
        raise ValueError("a word needs one --reweight or --silence: of several one alone would have an effect")
    if not edits and not args.show_attention:
        raise ValueError("nothing to edit: give --to, --reweight or --silence, or --show-attention")
    if args.to == (PROMPT if args.prompts is None else args.prompts) and not (words or args.silence):
        raise ValueError(f"--to is --prompt, {args.to!r}, so nothing is edited: give --to other words than those")
    if not edits and (given := given_of(args, setting_rows(Editing))):
        raise ValueError(f"{', '.join(given)} would have no effect: give --to, --reweight or --silence, too")
    if args.compile:
        raise ValueError("--compile would have no effect: attention that is seen or edited is not compiled")
    if args.blend is None and args.threshold is not None:
        raise ValueError("--blend-threshold has no effect without --blend")
    editing = Editing(**checked(Editing, given_of(args, setting_rows(Editing))))
    inverting = Inverting(**checked(Inverting, given_of(args, setting_rows(Inverting))))
    if args.init_img is None:
        if given := given_of(args, ("resize", "null_text", *setting_rows(Inverting))):
            raise ValueError(f"{', '.join(given)} would have no effect: give --init-img FILE, too")
        return editing, inverting
    if args.prompts is None:
        raise ValueError("--init-img needs --prompt TEXT, which says what the image shows")
    if given := given_of(args, ("n_samples", "seed")):
        raise ValueError(f"{', '.join(given)} would have no effect: an image of your own has the noise that is found")
    if not args.null_text and args.null_steps is not None:
        raise ValueError("--null-steps has no effect without --null-text")
    return editing, inverting


def given_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return those options that were given."""
    values = ((name, getattr(args, name)) for name in names)
    return {name: value for name, value in values if value is not None and value is not False}


def plan_pairs(model: Any, args: argparse.Namespace, init: InitImage | None, edits: bool) -> list[Recipe]:
    """Return the recipes of the first images, and of their edited versions if there are any: one batch, of n pairs."""
    from ldm.inference.generate import check_other, default_recipe

    own, n = settings_of(args), args.n_samples or 1
    if init is not None:
        size = init.size((model.defaults["width"], model.defaults["height"]), args.width, args.height, args.resize)
        own |= {"width": size[0], "height": size[1], "init_hash": init.init_hash}
    prompt = PROMPT if args.prompts is None else args.prompts
    first = default_recipe(model, model.path.stem, prompt=prompt, **own)
    prompts = usable_prompts(model, [prompt, *([prompt if args.to is None else args.to] if edits else [])], args)
    note_unused([args], [first])
    if args.embedding:
        note_unused_words(model, prompts, [first])
    if args.to is not None and not (args.reweight or args.silence):
        check_other(model, first, args.to)
    check_memory(first, n * len(prompts), n * len(prompts))
    recipes = plan(first, prompts, n, n * len(prompts))  # pairs have the same seeds
    return [replace(recipe, seed=first.seed + i % n, index=i % n) for i, recipe in enumerate(recipes)]


def invert_file(
    model: Any, image: Image.Image, recipe: Recipe, settings: Inverting, optimise: bool
) -> "tuple[Inversion, NullText | None, list[Image.Image]]":
    """Invert the image under the recipe's prompt and settings; optimise the null conditions, if asked to.

    The images are the given one as the model sees it, and what its first stage alone makes of that.
    """
    from tqdm import tqdm

    from ldm.diffusion.denoiser import to_vp
    from ldm.editing import invert_images, null_text
    from ldm.images import to_pil
    from ldm.init_image import InitImages

    if optimise and recipe.scale == 1:  # before the inversion
        raise ValueError("--null-text would have no effect: at guidance scale 1 there is no guidance")
    way = {name: getattr(recipe, name) for name in SAMPLING if name not in (*GUIDANCE, "negative")}
    with tqdm(total=recipe.steps * (1 + optimise), unit="step", delay=2, disable=None, leave=False) as bar:
        options = {"corrections": settings.corrections, "callback": lambda step: bar.update()}
        found, nulls = invert_images(model, image, [recipe.prompt], **way, **options), None
        if optimise:
            guided = {name: getattr(recipe, name) for name in GUIDANCE} | {"null_steps": settings.null_steps}
            nulls = null_text(model, found, recipe.negative, **guided, callback=lambda i, error: bar.update())
    seen = InitImages(image, None, 1, model.image_channels, model.multiple).seen
    pixels = model.decode(to_vp(found.states[-1], found.sigmas[-1]))[..., : image.height, : image.width]
    return found, nulls, [*to_pil(seen), *to_pil(pixels)]


def report(given: Image.Image, coded: Image.Image, made: Image.Image) -> None:
    """Print how far the image that is made again is from the given one, and how far the first stage alone is."""
    import numpy as np

    least, found = (np.abs(np.asarray(image, float) - np.asarray(given, float)).mean() / 255 for image in (coded, made))
    print(f"the image made again differs by {found:.4f} of 1, by its first stage alone by {least:.4f}", file=sys.stderr)


def texts_of(
    args: argparse.Namespace, recipes: Sequence[Recipe], n: int, editing: Editing, inverting: Inverting
) -> list[str]:
    """Return the texts of the images' files. An edited image's has how it was edited, one by inversion how it was."""
    how = [recipes[0].prompt]
    if args.init_img is not None:
        how.append(f"--corrections={inverting.corrections}")
        how += ["--null-text", f"--null-steps={inverting.null_steps}"] if args.null_text else []
    inverted, texts = list(how), [recipe.to_text() for recipe in recipes]
    how += [*(f"--reweight={text}" for text in args.reweight), *(f"--silence={text}" for text in args.silence)]
    how += [f"{row.flags[0]}={row.type.write(getattr(editing, name))}" for name, row in setting_rows(Editing).items()]
    if args.init_img is not None:
        texts[:n] = [f"{text}, Edit of: {json.dumps(shlex.join(inverted))}" for text in texts[:n]]
    return texts[:n] + [f"{text}, Edit of: {json.dumps(shlex.join(how))}" for text in texts[n:]]


def read_weight(text: str) -> tuple[str, float]:
    """Read WORD=X. ValueError for anything else."""
    word, equals, number = text.rpartition("=")
    try:
        return word, float(number if word else "")
    except ValueError:
        raise ValueError(f"--reweight takes WORD=X, with a number X, got {text!r}") from None
