"""Measure how far images that are made again by DDIM inversion are from themselves, at several numbers of steps.

python -m benchmarks.inversion --out digits.jsonl --plot digits.png
python -m benchmarks.inversion --ckpt emoji --dataset emoji --out emoji.jsonl

The images are MNIST's test images (LDM_DATA), or emoji that no training saw (LDM_EMOJI), under their captions. "guided"
samples with the model's own guidance from the noise that was found without it; "null-text" optimises against that.
Errors are mean differences of pixels, of 1 for white on black. Rows that --out has already are kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_row, check_plot, import_pyplot, markdown, read_rows
from ldm.cli import Parser, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.program import run

# Kind -> how often the noise of a step is corrected, whether sampling is guided, and whether null-text is optimised.
KINDS = {
    "no correction": (0, False, False),
    "one correction": (1, False, False),
    "guided": (1, True, False),
    "guided, null-text": (1, True, True),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows that are there are kept")
    add("--plot", type=Path, metavar="FILE", help="plot the table (needs matplotlib)")
    add("--dataset", choices=("mnist", "emoji"), default="mnist", help="(mnist)")
    add("--data", metavar="DIR", help="its folder (LDM_DATA or LDM_EMOJI)")
    add("--kinds", nargs="*", choices=KINDS, default=list(KINDS), metavar="NAME", help="(all)")
    add("--steps", nargs="*", type=int_range(1), default=[5, 10, 20, 50], metavar="N", help="(5 10 20 50)")
    add("--n", type=int_range(1), default=20, metavar="N", help="images, all at once (20)")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = compare_steps(args)
    print(inversion_table(rows))
    if args.plot is not None:
        plot_inversion(rows, args.plot)


def compare_steps(args: argparse.Namespace) -> list[dict]:
    """Measure what the output file does not have yet, adding a row to it each time; return all its rows."""
    rows = read_rows(args.out)
    if any(row["n"] != args.n for row in rows):
        raise ValueError(f"{args.out} has rows of {rows[0]['n']} images each: name another --out, or the same --n")
    done = {(row["kind"], row["steps"]) for row in rows}
    model, (images, prompts) = load_model(args), examples(args.dataset, args.data, args.n)
    for kind in args.kinds:
        for steps in args.steps:
            if (kind, steps) not in done:
                found = measure_inversion(model, images, prompts, steps, *KINDS[kind])
                add_row(args.out, rows, {"kind": kind, "steps": steps, **found, "n": args.n})
    return rows


def examples(dataset: str, root: str | None, n: int) -> tuple[list[Any], list[str]]:
    """Return n images, evenly spaced in the data set, and their captions."""
    from ldm.images import to_pil

    if dataset == "mnist":
        from ldm.data.mnist import MNIST

        data: Any = MNIST(root, split="test")
    else:
        from ldm.data.emoji import Emoji

        data = Emoji(root, split="held_out")
    samples = [data[i * len(data) // n] for i in range(n)]
    return [to_pil(sample["image"][None])[0] for sample in samples], [sample["caption"] for sample in samples]


def measure_inversion(
    model: Any, images: Sequence[Any], prompts: Sequence[str], steps: int, corrections: int, guided: bool, null: bool
) -> dict[str, float]:
    """Invert and sample; return the error of the pixels, that of the first stage alone, and the processor's seconds."""
    import time
    from contextlib import ExitStack

    import numpy as np

    from ldm.editing import invert_images, null_text, null_text_guidance
    from ldm.images import to_pil

    def error(made: Sequence[Any]) -> float:
        pairs = zip(made, images, strict=True)
        return float(np.mean([np.abs(np.asarray(one, float) - np.asarray(other)).mean() / 255 for one, other in pairs]))

    start, settings = time.process_time(), {"steps": steps, **({} if guided else {"scale": 1})}
    found = invert_images(model, images, prompts, corrections=corrections, steps=steps)
    with ExitStack() as hooks:
        if null:
            hooks.enter_context(null_text_guidance(model, null_text(model, found)))
        made = model.generate(prompts, noise=found.noise, batch_size=len(prompts), **settings)
    seconds = time.process_time() - start
    return {"error": error(made), "first_stage": error(to_pil(model.decode(found.states[-1]))), "seconds": seconds}


def inversion_table(rows: Sequence[dict]) -> str:
    """Return Markdown, a row for each kind: the error at each number of steps."""
    steps = sorted({row["steps"] for row in rows})
    cells = {(row["kind"], row["steps"]): f"{row['error']:.4f}" for row in rows}
    names = dict.fromkeys(row["kind"] for row in rows)
    table = [[name, *(cells.get((name, s), "-") for s in steps)] for name in names]
    table.append(["first stage alone", *(f"{rows[0]['first_stage']:.4f}" for _ in steps)])
    return markdown(["", *(f"{s} steps" for s in steps)], table)


def plot_inversion(rows: Sequence[dict], path: Path) -> None:
    """Plot the error against the steps, both logarithmic: a line for each kind, and one for the first stage."""
    figure, axes = import_pyplot().subplots(figsize=(6, 3.6), layout="constrained")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = sorted((row["steps"], row["error"]) for row in rows if row["kind"] == kind)
        axes.plot(*zip(*own, strict=True), "o-", markersize=4, label=kind)
    axes.axhline(rows[0]["first_stage"], color="0.6", linestyle="--", label="first stage alone")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="mean difference of pixels")
    steps = sorted({row["steps"] for row in rows})
    axes.set_xticks(steps, labels=list(map(str, steps)))
    axes.set_xticks([], minor=True)
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    run(main)
