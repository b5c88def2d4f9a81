"""Measure what ours costs, plain and in its fast form (`ldm.optimize`), beside diffusers and the machine's limit.

python -m benchmarks.speed                      # everything
python -m benchmarks.speed --only unet --precision bf16 --rounds 5
python -m benchmarks.speed --only curves --plot speed.png

The forms of a network share their weights and their process, and take turns; so do whole processes. Times are CPU time
on one thread, medians over the rounds, with the spread beside them, of four and more rounds without the smallest and
the largest. No weights are needed: Stable Diffusion's networks have random ones. Its UNet takes 8 GB of memory.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.common import check_plot, import_pyplot, markdown
from ldm.cli import Parser, int_range
from ldm.program import run

TITLES = ["work", "precision", "form", "ms", "spread", "x", "of the limit", "off by", "peak, GiB", "private, GiB"]
BATCHES, SIDES, STEPS = (1, 2, 4, 16, 64), (4, 8, 16, 32), (1, 5, 10, 20, 50)  # of the curves
CURVES = {
    "the UNet, by images at a time": [("unet", n, 8, "digits", max(1, 16 // n)) for n in BATCHES],
    "the UNet, by the side of a latent": [("unet", 1, n, "digits", max(1, 64 // n**2)) for n in SIDES],
}
BY_STEPS = "an image, by denoising steps"
CASES = {  # speed_networks.Case
    "unet": [("unet", 2, side, "sd") for side in (32, 64)],
    "digits": [("unet", n, 8, "digits", max(1, 16 // n)) for n in (1, 2, 16, 64)],
    "vae": [("decoder", 1, 32, "sd")],
    "text": [("text", 2, 77, "sd")],
}
WORKS = (*CASES, "training", "starts", "pipeline", "curves")


class Row(NamedTuple):
    """What one form of some work takes."""

    work: str
    precision: str
    form: str
    seconds: list[float]
    error: float | None = None  # relative, to the plain form
    flops: float | None = None
    memory: tuple[float, float] | None = None  # GiB: by how much it grew at most, and what of that is private


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=WORKS, default=WORKS, metavar="WORK", help=f"of {', '.join(WORKS)}")
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="of UNets (both)")
    add("--rounds", type=int_range(1), default=3, metavar="N", help="(3)")
    add("--plot", type=Path, metavar="FILE", help="save the ratios, and how the cost grows, as a plot")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = []
    for row in measured(args.only, args.precision, args.rounds):
        rows.append(row)
        print(*table([row], {})[0], file=sys.stderr)  # should a later one be interrupted
    limits = {p: max(rate(row) for row in rows if row.work == "limit" and row.precision == p) for p in args.precision}
    print(markdown(TITLES, table(rows, limits)))
    print(*(f"limit in {precision}: {1e-9 * limit:.0f} GFLOP/s" for precision, limit in limits.items()), sep="\n")
    if args.plot is not None:
        plot_speeds(rows, args.plot)


def measured(works: Sequence[str], precisions: Sequence[str], rounds: int) -> Iterator[Row]:
    """Yield what all forms of these works take, and what large products take."""
    import torch

    from benchmarks import speed_networks as networks
    from benchmarks import speed_processes as processes

    torch.set_num_threads(1)
    for precision in precisions:
        yield from rows_of("limit", precision, networks.limits(precision, rounds))
    for work in (name for name in CASES if name in works):
        for case in (networks.Case(*values) for values in CASES[work]):
            for precision in precisions if case.part == "unet" else ["fp32"]:
                yield from rows_of(str(case), precision, networks.measure(case, precision, rounds))
                gc.collect()
    if "training" in works:
        for network, precision in (("digits", "fp32"), ("100M", precisions[-1])):
            found = networks.training_steps(network, precision, rounds)
            yield from rows_of(f"training step, {network}", precision, found)
    if "starts" in works:
        for name, found in processes.starts(rounds).items():
            yield from rows_of(name, "fp32", found)
    if "pipeline" in works:
        for name, found in processes.with_a_large_model(rounds).items():
            yield from rows_of(name, "fp32", found)
    if "curves" in works:
        for name, cases in CURVES.items():
            for case in (networks.Case(*values) for values in cases):
                found = networks.measure(case, "fp32", rounds)
                yield from rows_of(f"{name}: {case.batch if 'images' in name else case.side}", "fp32", found)
        for steps in STEPS:
            yield from rows_of(f"{BY_STEPS}: {steps}", "fp32", networks.generation(steps, rounds))


def rows_of(work: str, precision: str, found: dict[str, Any]) -> list[Row]:
    """Return a row for each form, of what was found for it."""
    return [Row(work, precision, form, **own._asdict()) for form, own in found.items()]


def rate(row: Row) -> float:
    """Return the FLOPs in a second, 0 where they were not counted."""
    return 0.0 if row.flops is None else row.flops / median(row.seconds)


def ratios(rows: Sequence[Row]) -> list[float]:
    """Return how many calls of each form take the time of diffusers' form, or of the first one, of the same work."""
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        kinds.setdefault((row.work, row.precision), {})[row.form] = median(row.seconds)
    bases = {kind: forms.get("diffusers", next(iter(forms.values()))) for kind, forms in kinds.items()}
    return [bases[row.work, row.precision] / median(row.seconds) for row in rows]


def table(rows: Sequence[Row], limits: dict[str, float]) -> list[list[str]]:
    """Return the cells of a table's rows; limits: FLOPs in a second, by precision."""
    cells = []
    for row, ratio in zip(rows, ratios(rows), strict=True):
        ordered, middle = sorted(row.seconds), median(row.seconds)
        inner = ordered[1:-1] if len(ordered) > 3 else ordered
        own = [row.work, row.precision, row.form, f"{1e3 * middle:.2f}", f"{(inner[-1] - inner[0]) / middle:.0%}"]
        own += [f"{ratio:.2f}", f"{rate(row) / limits[row.precision]:.0%}" if row.flops and limits else ""]
        own.append("" if row.error is None else f"{row.error:.0e}")
        cells.append([*own, *(("", "") if row.memory is None else (f"{part:.2f}" for part in row.memory))])
    return cells


def plot_speeds(rows: Sequence[Row], path: Path) -> None:
    """Save a plot: a bar for the ratio of each of our forms, and a curve for each form of what grows."""
    figure, panels = import_pyplot().subplots(2, 2, figsize=(13, 9), layout="constrained")
    bars, *curves = panels.flat
    shown = [(row, ratio) for row, ratio in zip(rows, ratios(rows), strict=True) if ":" not in row.work]
    shown = [(row, ratio) for row, ratio in shown if row.form in ("plain", "optimized")][::-1]
    bars.barh([f"{r.work}, {r.precision}, {r.form}" for r, _ in shown], [ratio for _, ratio in shown])
    bars.axvline(1, color="black")
    bars.set(title="times as fast as diffusers, or the first form")
    bars.tick_params(axis="y", labelsize=7)
    for axes, name in zip(curves, [*CURVES, BY_STEPS], strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.work.startswith(f"{name}: "):
                lines.setdefault(row.form, []).append((float(row.work.split(": ")[1]), 1e3 * median(row.seconds)))
        for form, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=form)
            ticks = [x for x, _ in points]
        axes.set(title=f"digits, {name}", ylabel="CPU ms", xscale="log", yscale="log")
        if lines:
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
            axes.minorticks_off()
            axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run(main)
