"""Generate parts of an image anew.

ldm inpaint --init-img photo.png --mask mask.png --prompt "a red kite"
ldm inpaint --init-img five.png --mask mask.png --n_samples 4
ldm inpaint --indir images --outdir outputs/restored

The mask has the image's size: what is white there is generated anew, what is black (or transparent) is kept, to the
byte. At least half white is generated, and greys then blend it with the image. Any model will do: one that was trained
to inpaint has the mask in its input, for any other the rest of the image is put back at every step.

The result is a PNG of 8 bits, grey, RGB or RGBA: grey where both image and model are, with the image's transparency
if it has any (the model sees that as white, and generated parts are opaque), in RGB if the image is a palette's or
CMYK.

Sizes, --strength (1: what is white in the mask is forgotten) and files are as of img2img. --indir takes each pair
DIR/X.png, DIR/X_mask.png, generates one image of it and writes OUTDIR/X.png, replacing one that is there; the pairs, by
name, have the seeds `--seed`, `--seed` + 1, ...
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.cli import check_folder
from ldm.inference.init_image import InitImage
from ldm.inference.options import add_init_image_options, image_parser, settings_of
from ldm.inference.recipe import plan, save_image
from ldm.inference.run import build_guides, check_format, chosen_prompts, generate_files, load_checked, note_unused

MASK = "_mask.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = image_parser(__doc__, "", "outputs/inpaint-samples")
    add_init_image_options(parser)
    add = parser.add_argument_group("mask").add_argument
    add("--mask", type=Path, metavar="FILE", help="white where the image is generated anew")
    add("--invert-mask", action="store_true", help="black where it is generated anew")
    text = "a folder of pairs X.png, X_mask.png, in place of --init-img and --mask"
    add("--indir", type=Path, metavar="DIR", help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.indir is not None:
        inpaint_folder(args)
        return
    if args.init_img is None or args.mask is None:
        raise ValueError("inpaint needs --init-img FILE and --mask FILE, or --indir DIR with many of both")
    generate_files(args, InitImage.read(args.init_img, args.mask, args.invert_mask))


def inpaint_folder(args: argparse.Namespace) -> None:
    """Generate one image of each pair in --indir, saved under its name in --outdir.

    All pairs are checked before the first is generated, but only one is in memory at a time.
    """
    others = "init_img mask from_file from_png fixed_code skip_save strip enlarge n_rows batch_size".split()
    given = [name for name in others if getattr(args, name) not in (None, False)]
    given += ["n_samples", "n_iter"] if args.n_samples * args.n_iter != 1 else []
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--indir makes one image of each pair that is there: leave out {options}")
    if args.outdir.resolve() == args.indir.resolve():
        raise ValueError(f"--outdir {args.outdir} is --indir, where the images would be replaced: name another folder")
    pairs, prompts = find_pairs(args.indir), chosen_prompts(args)
    if len(prompts) > 1:
        raise ValueError(f"--indir makes one image of each pair: give one --prompt, not {len(prompts)}")

    def inits() -> Iterator[InitImage]:
        return (InitImage.read(*pair, args.invert_mask) for pair in pairs)

    for init in inits():
        check_format(args.format, prompts, init)
    check_folder(args.outdir)

    model = load_checked(args, len(pairs))
    from ldm.inference.generate import default_recipe, generate_run, progress
    from ldm.inference.guiders import guide_hashes

    assert model.path is not None
    first = default_recipe(model, model.path.stem, **settings_of(args), **guide_hashes(args, None))
    note_unused([args], [first])
    recipes = [
        recipe.changed(**init.settings(args, model))
        for recipe, init in zip(plan(first, prompts, len(pairs), 1), inits(), strict=True)
    ]
    (guide,) = build_guides(model, args, [first])
    paths = [args.outdir / f"{path.stem}.{args.format}" for path, _ in pairs]
    with progress(recipes) as callback:
        for recipe, init, path in zip(recipes, inits(), paths, strict=True):
            init = init.resized(recipe.width, recipe.height)
            for result in generate_run(model, [recipe], callback, init, guide):
                save_image(result.image, path, recipe.to_text())
    for path in paths:
        print(path)


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return (X.png, X_mask.png) of a folder, sorted."""
    masks = sorted(path for path in folder.iterdir() if path.name.endswith(MASK))
    pairs = [(mask.with_name(mask.name.removesuffix(MASK) + ".png"), mask) for mask in masks]
    if not pairs:
        raise ValueError(f"{folder} holds no X{MASK} beside an X.png: a pair is an image and its mask")
    for path, mask in pairs:
        if not path.is_file():
            raise ValueError(f"{mask} has no image: {path.name} is not there")
    return pairs
