"""Make README's sheet: prompts that a person would type; a star marks what no image of the training data shows.

python -m benchmarks.emoji_sheet --out docs/images/emoji.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from ldm.cli import Parser, check_writable, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.program import run

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.latent_diffusion import LatentDiffusion

COLUMNS, CHARACTERS, LINES = 6, 22, 3  # of the sheet, of a line of text, and lines of a prompt
# what is typed, and its icon's name in ldm/data/held_out.txt if no training saw that combination
PROMPTS = {
    "a flat drawing of a person biking with dark skin": "fluent-emoji-flat:person-biking-dark",
    "a detailed drawing of a woman pilot with medium-light skin": "noto:woman-pilot-medium-light-skin-tone",
    "a flat drawing of a woman judge with light skin": "fluent-emoji-flat:woman-judge-light",
    "a detailed drawing of a vampire with light skin": "noto:vampire-light-skin-tone",
    "a flat drawing of a woman police officer with medium skin": "fluent-emoji-flat:woman-police-officer-medium",
    "a detailed drawing of people holding hands with light skin": "noto:people-holding-hands-light-skin-tone",
    "a flat drawing of a man scientist with medium skin": "fluent-emoji-flat:man-scientist-medium",
    "a detailed drawing of a health worker with medium-dark skin": "noto:health-worker-medium-dark-skin-tone",
    "a detailed drawing of a person running with dark skin": "noto:person-running-dark-skin-tone",
    "a detailed drawing of a woman in steamy room with medium skin": "noto:woman-in-steamy-room-medium-skin-tone",
    "a detailed drawing of a man rowing boat with dark skin": "noto:man-rowing-boat-dark-skin-tone",
    "a detailed drawing of women holding hands with medium skin": "noto:women-holding-hands-medium-skin-tone",
    "a grinning face": None,
    "a crying face": None,
    "a detailed drawing of a prince": None,
    "a detailed drawing of a man farmer": None,
    "a detailed drawing of a woman teacher with medium-dark skin": None,
    "a baby angel with dark skin on a yellow background": None,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--seed", type=int_range(0), default=0, metavar="N", help="seed of the first image (0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the PNG to write")
    parser.add_argument("--steps", type=int_range(1), metavar="N", help="denoising steps (the model's own)")
    args = parser.parse_args(argv)
    check_writable(args.out)
    make_sheet(load_model(args), args).save(args.out, optimize=True)
    print(args.out)


def make_sheet(model: "LatentDiffusion", args: argparse.Namespace) -> "Image":
    """Return the sheet, an image of each prompt with a seed of its own."""
    from ldm.labels import Row, labelled_rows

    prompts = list(PROMPTS)
    images = model.generate(prompts, seed=args.seed, steps=args.steps, progress=True)
    captions = [fill(("* " if PROMPTS[prompt] else "") + prompt, CHARACTERS) for prompt in prompts]
    captions = [text + "\n" * (LINES - 1 - text.count("\n")) for text in captions]
    places = range(0, len(prompts), COLUMNS)
    rows = [Row("", images[i : i + COLUMNS], captions[i : i + COLUMNS]) for i in places]
    return labelled_rows(rows, factor=2)


if __name__ == "__main__":
    run(main)
