"""Measure every sampler at several numbers of steps on the model that ships, or another.

python -m benchmarks.samplers --out samplers.jsonl --plot samplers.png --precision autocast

Each row generates the captions of held-out MNIST images (--data or LDM_DATA), with the model's own settings otherwise,
and measures prompt accuracy, the Fréchet distance over that between as many real images, and recall. Rows that --out
has already are kept, so an interrupted run continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Label, add_labels, add_row, check_plot, import_pyplot, markdown, read_rows
from ldm.cli import Parser, int_range
from ldm.inference.options import add_model_options, load_model
from ldm.program import run

NAMED = ("ddim", "ddpm", "dpmpp_2m", "unipc", "heun", "lcm")  # in the plot
ALIASES = ("euler", "euler_a")  # ddim and ddpm under their other names


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows that are there are kept")
    add("--plot", type=Path, metavar="FILE", help="plot the table (needs matplotlib)")
    add("--samplers", nargs="*", metavar="NAME", help="(all but aliases)")
    add("--steps", nargs="*", type=int_range(1), default=[5, 10, 20, 50], metavar="N", help="(5 10 20 50)")
    add("--n", type=int_range(1), default=2000, metavar="N", help="images of each (2000)")
    add("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    add("--data", metavar="DIR", help="folder of MNIST (LDM_DATA, or ./data)")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = compare_samplers(args)
    print(sampler_table(rows))
    if args.plot is not None:
        plot_samplers(rows, args.plot)


def compare_samplers(args: argparse.Namespace) -> list[dict]:
    """Measure what the output file does not have yet, adding a row to it each time; return all its rows."""
    from benchmarks.generators import evaluations, measure_prompts
    from ldm.diffusion.sampling import SAMPLERS, get_sampler
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.networks import Measuring

    rows = read_rows(args.out)
    if any(row["n"] != args.n for row in rows):
        raise ValueError(f"{args.out} has rows of {rows[0]['n']} images each: name another --out, or the same --n")
    done = {(row["sampler"], row["steps"]) for row in rows}
    names = [name for name in SAMPLERS if name not in ALIASES] if args.samplers is None else args.samplers
    wanted = [(steps, name) for steps in args.steps for name in names if (name, steps) not in done]
    for _, name in wanted:
        get_sampler(name)  # an unknown name is an error before anything is generated
    model, networks = load_model(args), Measuring.load()
    reference, _ = find_reference("mnist", "heldout", args.data, networks, args.n)
    for steps, name in wanted:
        settings = {"sampler": name, "steps": steps}
        found = measure_prompts(model, args.n, reference, networks, args.batch_size, **settings)
        add_row(args.out, rows, {**settings, "evaluations": evaluations(model, **settings), **found})
    return rows


def sampler_table(rows: Sequence[dict]) -> str:
    """Return Markdown, a row for each sampler: accuracy, distance / floor and recall at each number of steps."""
    steps = sorted({row["steps"] for row in rows})
    cells = {(r["sampler"], r["steps"]): f"{r['accuracy']:.1%}, {r['ratio']:.2f}, {r['recall']:.2f}" for r in rows}
    names = dict.fromkeys(row["sampler"] for row in rows)
    table = [[f"`{name}`", *(cells.get((name, s), "-") for s in steps)] for name in names]
    return markdown(["sampler", *(f"{s} steps" for s in steps)], table)


def plot_samplers(rows: Sequence[dict], path: Path) -> None:
    """Plot distance over the floor against network evaluations, both logarithmic: a line for each sampler.

    Those of NAMED have a colour and their name beside them; the others are grey.
    """
    figure, axes = import_pyplot().subplots(figsize=(8, 5), layout="constrained")
    labels: dict[bool, list[Label]] = {True: [], False: []}  # at left ends, and at right ones
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own = sorted((row["evaluations"], row["ratio"]) for row in rows if row["sampler"] == name)
        style = {"zorder": 3} if name in NAMED else {"color": "0.8"}
        (line,) = axes.plot(*zip(*own, strict=True), "o-", markersize=4, linewidth=1.5, **style)
        if name in NAMED:
            # beside its left end, if that is where most lines begin
            left = own[0][0] == min(row["evaluations"] for row in rows)
            labels[left].append(Label(name, own[0] if left else own[-1], color=line.get_color()))
    axes.plot([], "o-", color="0.8", markersize=4, label="other samplers")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance / floor")
    axes.set_xlim(2.7, 150)
    for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100)), (axes.yaxis, (0.8, 1, 1.5, 2, 3))):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend()
    axes.grid(alpha=0.3)
    add_labels(axes, labels[True], ((-1, 0), (-1, -1), (-1, 1)))
    add_labels(axes, labels[False], ((1, 0), (1, 1), (1, -1)))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
