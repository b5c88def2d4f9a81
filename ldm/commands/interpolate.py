"""Generate images on the way from one prompt to another, from one seed to another, or both, as a GIF and on a grid.

ldm interpolate --prompt "a bold digit three" --to "a thin digit eight"
ldm interpolate --prompt "a handwritten digit five" --seed 0 --seed-to 1 --frames 16
ldm interpolate --ckpt emoji --prompt "a flat drawing of a grinning face" --to "a flat drawing of a crying face"

Prompts are interpolated on a straight line between their hidden states, and seeds on the sphere of their noise. The
first and the last image are those of txt2img. Files: OUTDIR/animation-0000.gif, which goes there and back, and
OUTDIR/grid-0000.png, each image under its share of the way.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import Parser, finite_float, int_range
from ldm.commands.edit import SAMPLING
from ldm.inference.options import add_model_options, add_settings, load_model, settings_of
from ldm.inference.recipe import plan
from ldm.inference.run import BATCH, OutputFolder, check_memory, note_unused, note_unused_words, usable_prompts

COLUMNS = 8  # of the grid


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--prompt", dest="prompts", required=True, metavar="TEXT", help="of the first image")
    add("--to", metavar="TEXT", help="prompt of the last image (--prompt)")
    add_settings(group, "seed")
    add("--seed-to", type=int_range(0), metavar="N", help="seed of the last image (--seed)")
    add("--frames", type=int_range(2), default=16, metavar="N", help="number of images (16)")
    add("--per-second", type=finite_float(0.1, 50), default=8, metavar="X", help="of them, in the GIF (8)")
    add("--batch-size", type=int_range(1), metavar="N", help=f"images at a time ({BATCH}): only bounds the memory")
    add_settings(group, "height", "width")
    add_settings(parser.add_argument_group("sampling (what is not given is the checkpoint's own)"), *SAMPLING)
    add_model_options(parser)
    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path("outputs/interpolations"), metavar="DIR", help="(outputs/interpolations)")
    add("--enlarge", type=int_range(1, 64), metavar="N", help="repeat each pixel N times (as often as is needed)")
    parser.set_defaults(autoguide=None, classifier=None, classes=False, from_file=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    ends = [args.prompts, args.prompts if args.to is None else args.to]
    if ends[0] == ends[1] and args.seed_to in (None, args.seed or 0):
        raise ValueError("both ends are the same: give another prompt by --to, another seed by --seed-to, or both")
    output = OutputFolder(args.outdir, enlarge=args.enlarge)

    model: Any = load_model(args)
    from ldm.inference.generate import arguments_of, check_other, check_recipes, default_recipe, progress
    from ldm.inference.nan_check import generate_checked
    from ldm.interpolation import interpolate
    from ldm.labels import Row, labelled_rows

    count, batch_size = args.frames, BATCH if args.batch_size is None else args.batch_size
    first = default_recipe(model, model.path.stem, **settings_of(args), prompt=ends[0])
    check_recipes(model, [first, first.changed(prompt=ends[1])])
    usable_prompts(model, ends, args)
    note_unused([args], [first])
    if args.embedding:
        note_unused_words(model, ends, [first])
    if args.seed_to in (None, first.seed):
        check_other(model, first, ends[1])
    check_memory(first, count, min(batch_size, count))
    prompts = [args.prompts] * count if args.to is None else interpolate(*ends, count)
    last = first.seed if args.seed_to is None else args.seed_to
    seeds = [first.seed] * count if args.seed_to is None else interpolate(first.seed, last, count)
    arguments = arguments_of(model, first, None) | {"seeds": seeds, "batch_size": batch_size}
    with progress(plan(first, ends[:1], count, batch_size)) as callback:
        images = generate_checked(model, prompts, callback=callback, **arguments)
    how = [f"--to={ends[1]}", f"--seed-to={last}", f"--frames={count}"]
    text = f"{first.to_text()}, Interpolation: {json.dumps(shlex.join(how))}"
    captions = [f"{i / (count - 1):.2f}" for i in range(count)]
    rows = [Row("", images[i : i + COLUMNS], captions[i : i + COLUMNS]) for i in range(0, count, COLUMNS)]
    rows[0] = rows[0]._replace(label=f"{ends[0]}, seed {first.seed} -> {ends[1]}, seed {last}")
    print(output.save_animation(images, text, args.per_second))
    print(output.save_sheet(labelled_rows(rows, 96, args.enlarge), f"{count} labelled", text))
