"""Draw parts of an image anew.

python scripts/inpaint.py --init-img photo.png --mask mask.png --prompt "a red kite"
python scripts/inpaint.py --init-img five.png --mask mask.png --n_samples 4
python scripts/inpaint.py --indir images --outdir outputs/restored

The mask has the image's size: what is white there is drawn anew, what is black (or transparent) stays as it is, to
the byte. What is at least half white is drawn, and greys then blend it with the image. Any model will do: one that
was trained to inpaint is told of the mask, any other has the rest of the image put back at every step.

The result is a PNG of 8 bits, grey, RGB or RGBA: grey where both image and model are, with the image's transparency
if it has any (the model sees that as white, and what it draws is opaque), in RGB if the image is a palette's or CMYK.

Sizes, --strength (1: what is white in the mask is forgotten) and files are as in img2img.py. --indir takes each pair
DIR/X.png, DIR/X_mask.png, draws one image of it and writes OUTDIR/X.png, in the place of one that is there; the
pairs, by name, have the seeds `--seed`, `--seed` + 1, ...
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.cli import run
from ldm.inference.drawing import add_original_options, draw_run, drawing_parser, load, settings_of, settings_over
from ldm.inference.original import Original
from ldm.inference.output import make_writable
from ldm.inference.png import save_png
from ldm.inference.recipe import plan

MASK = "_mask.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = drawing_parser(__doc__, "", "outputs/inpaint-samples")
    add_original_options(parser, "1")
    add = parser.add_argument_group("what to draw anew").add_argument
    add("--mask", type=Path, metavar="FILE", help="white where the image is to be drawn anew")
    add("--invert-mask", action="store_true", help="black where it is to be drawn anew")
    add(
        "--indir",
        type=Path,
        metavar="DIR",
        help="a folder of pairs X.png, X_mask.png, in place of --init-img and --mask",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.indir is not None:
        draw_folder(args)
        return
    if args.init_img is None or args.mask is None:
        raise ValueError(
            "--init-img FILE and --mask FILE name an image and what of it to draw anew, or --indir DIR many"
        )
    draw_run(args, Original.read(args.init_img, args.mask, args.invert_mask))


def draw_folder(args: argparse.Namespace) -> None:
    """One image of each pair in --indir, saved under its name in --outdir.

    All pairs are looked at before the first is drawn, but only one is in memory at a time.
    """
    others = ("init_img", "mask", "from_file", "from_png", "fixed_code", "skip_save", "strip")
    given = [name for name in others if getattr(args, name) not in (None, False)]
    given += ["n_samples", "n_iter"] if args.n_samples * args.n_iter != 1 else []
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--indir draws one image of each pair that is there: leave out {options}")
    if args.outdir.resolve() == args.indir.resolve():
        raise ValueError(f"--outdir {args.outdir} is --indir, where the images would be replaced: name another folder")
    pairs = find_pairs(args.indir)
    for _ in originals(pairs, args):
        pass
    make_writable(args.outdir)

    model = load(args)
    from ldm.inference.draw import draw, own_recipe, watching

    first = own_recipe(model, model.path.stem, **settings_of(args))
    recipes = [
        recipe.changed(**settings_over(original, args, model))
        for recipe, original in zip(plan(first, args.prompts, len(pairs), 1), originals(pairs, args), strict=True)
    ]
    saved = []
    with watching(recipes) as callback:
        for recipe, original, (path, _) in zip(recipes, originals(pairs, args), pairs, strict=True):
            for drawn in draw(model, [recipe], callback, original.at(recipe.width, recipe.height)):
                saved.append(args.outdir / path.name)
                save_png(drawn.image, saved[-1], recipe.to_text())
    for path in saved:
        print(path)


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """(X.png, X_mask.png) in the folder, sorted. ValueError or OSError if there is none, or a mask without image."""
    masks = sorted(path for path in folder.iterdir() if path.name.endswith(MASK))
    pairs = [(mask.with_name(mask.name.removesuffix(MASK) + ".png"), mask) for mask in masks]
    if not pairs:
        raise ValueError(f"{folder} holds no X{MASK} beside an X.png: a pair is an image and what of it to draw anew")
    for path, mask in pairs:
        if not path.is_file():
            raise ValueError(f"{mask} has no image: {path.name} is not there")
    return pairs


def originals(pairs: list[tuple[Path, Path]], args: argparse.Namespace) -> Iterator[Original]:
    """Each pair, read when it is its turn."""
    return (Original.read(*pair, args.invert_mask) for pair in pairs)


if __name__ == "__main__":
    run(main, fast_exit=True)
