"""Measure the trade-off of guidance: accuracy, distance, precision and recall at guidance scales from 1 to 10.

python -m benchmarks.guidance --out guidance.jsonl --plot guidance.png --precision autocast

Each scale is used at every noise level, and in the model's own interval. Rows are made as `benchmarks.samplers` makes
them; those that --out has already are kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import add_row, check_plot, import_pyplot, markdown, read_rows
from ldm.cli import Parser, finite_float, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.program import run

EVERYWHERE, INTERVAL = "everywhere", "in the interval"
SHOWN = {"accuracy": "prompt accuracy", "precision": "precision", "recall": "recall"}  # in the plot's second half


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    add, scales = parser.add_argument, [1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0]
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows that are there are kept")
    add("--plot", type=Path, metavar="FILE", help="plot the table (needs matplotlib)")
    add("--scales", nargs="*", type=finite_float(), default=scales, metavar="S", help="(1 1.25 1.5 2 3 5 10)")
    add("--n", type=int_range(1), default=2000, metavar="N", help="images of each (2000)")
    add("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    add("--data", metavar="DIR", help="folder of MNIST (LDM_DATA, or ./data)")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = compare_scales(args)
    print(guidance_table(rows))
    if args.plot is not None:
        plot_guidance(rows, args.plot)


def compare_scales(args: argparse.Namespace) -> list[dict]:
    """Measure what the output file does not have yet, adding a row to it each time; return all its rows."""
    from benchmarks.generators import measure_prompts
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.networks import Measuring

    rows = read_rows(args.out)
    if any(row["n"] != args.n for row in rows):
        raise ValueError(f"{args.out} has rows of {rows[0]['n']} images each: name another --out, or the same --n")
    done = {(row["scale"], row["where"]) for row in rows}
    model, networks = load_model(args), Measuring.load()
    reference, _ = find_reference("mnist", "heldout", args.data, networks, args.n)
    intervals = {EVERYWHERE: (0.0, float("inf"))}
    if model.defaults.get("interval") is not None:
        intervals[INTERVAL] = tuple(model.defaults["interval"])
    for scale in args.scales:
        for where, interval in intervals.items():
            if (scale, where) in done or (scale == 1 and where == INTERVAL):  # at scale 1 there is no guidance
                continue
            settings = {"scale": scale, "interval": interval}
            found = measure_prompts(model, args.n, reference, networks, args.batch_size, **settings)
            add_row(args.out, rows, {"scale": scale, "where": where, **found})
    return rows


def guidance_table(rows: Sequence[dict]) -> str:
    """Return Markdown, a row for each scale and interval."""
    titles = ["scale, where", "accuracy", "distance / floor", "precision", "recall"]
    return markdown(
        titles,
        [
            [f"{row['scale']:g} {row['where']}", f"{row['accuracy']:.1%}"]
            + [f"{row['ratio']:.2f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}"]
            for row in sorted(rows, key=lambda row: (row["where"], row["scale"]))
        ],
    )


def plot_guidance(rows: Sequence[dict], path: Path) -> None:
    """Plot distance over the floor, and the shares of SHOWN, against the scale; dashed in the interval."""
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for where, style in ((EVERYWHERE, "o-"), (INTERVAL, "s--")):
        own = sorted((row for row in rows if row["where"] == where or row["scale"] == 1), key=lambda row: row["scale"])
        scales = [row["scale"] for row in own]
        left.plot(scales, [row["ratio"] for row in own], style, markersize=4, label=where)
        for color, (key, name) in zip(("C0", "C1", "C2"), SHOWN.items(), strict=True):
            right.plot(scales, [row[key] for row in own], style, markersize=4, color=color, label=f"{name}, {where}")
    left.set(xscale="log", yscale="log", xlabel="guidance scale", ylabel="Fréchet distance / floor")
    right.set(xscale="log", xlabel="guidance scale", ylabel="share")
    for axes in (left, right):
        axes.set_xticks([1, 2, 3, 5, 10], labels=["1", "2", "3", "5", "10"])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_yticks([1, 2, 3, 5], labels=["1", "2", "3", "5"])
    left.set_yticks([], minor=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
