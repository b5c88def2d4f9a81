"""Plot how often scenes obey their captions against the number of scenes that a model trained on.

python -m benchmarks.scenes 500=few.json 20000=many.json --plot scenes.png

Each file is a report of `ldm evaluate scenes --out FILE`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import check_plot, import_pyplot, markdown
from ldm.cli import Parser
from ldm.program import run

HELD_OUT = ("colours", "pairs", "relations")
SHOWN = ("objects", "colours", "binding", "places")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="N=FILE", help="scenes in training, and the report")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the table (needs matplotlib)")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = sorted((read(report) for report in args.reports), key=lambda own: own["scenes"])
    print(markdown(["scenes", *rows[0]["seen"]], table(rows)))
    if args.plot is not None:
        plot(rows, args.plot)


def read(report: str) -> dict[str, Any]:
    """Read N=FILE, and return its `row`."""
    count, _, name = report.partition("=")
    try:
        return row(int(count), json.loads(Path(name).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        what = "N=FILE with a report of `ldm evaluate scenes --out FILE`"
        raise ValueError(f"{report!r} is not {what}") from None


def row(count: int, content: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracies of seen captions, and their means over the kinds of captions held out."""
    found = {kind: content[kind]["generated"] for kind in ("seen", *HELD_OUT)}
    shares = {kind: {name: float(own[name]["accuracy"]) for name in SHOWN} for kind, own in found.items()}
    mean = {name: sum(shares[kind][name] for kind in HELD_OUT) / len(HELD_OUT) for name in SHOWN}
    return {"scenes": count, "seen": shares["seen"], "held out": mean}


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [f"{own['scenes']:,}, {kind}", *(f"{share:.0%}" for share in own[kind].values())]
        for own in rows
        for kind in ("seen", "held out")
    ]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the accuracies against the number of scenes; dashed for captions held out."""
    figure, axes = import_pyplot().subplots(figsize=(6, 4), layout="constrained")
    counts = [own["scenes"] for own in rows]
    for color, name in zip(("C0", "C1", "C2", "C3"), SHOWN, strict=True):
        for kind, style in (("seen", "o-"), ("held out", "s--")):
            shares = [own[kind][name] for own in rows]
            axes.plot(counts, shares, style, markersize=4, color=color, label=f"{name}, {kind}")
    axes.set(xscale="log", xlabel="scenes in training", ylabel="share right", ylim=(0, 1))
    axes.set_xticks(counts, labels=[f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
