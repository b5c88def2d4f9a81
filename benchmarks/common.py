"""What the benchmarks share: rows in a file, tables, measurements in a fresh process, and matplotlib."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ldm.cli import check_writable


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, made now if missing: OSError before minutes of work, not after."""
    with open(path, "a"):
        return [json.loads(line) for line in path.read_text().splitlines()]


def add_row(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Append a row to the list and to the file, so that an interrupted run continues; print it to standard error."""
    rows.append(row)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), file=sys.stderr)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def run_fresh(name: str, *argv: object) -> dict[str, float]:
    """Run Python with these arguments; return the JSON of its last line. ValueError, with its own, if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ValueError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-300:] or 'killed?'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def process_memory() -> dict[str, int]:
    """Return this process's memory in bytes: VmHWM, its peak, VmRSS, and so on.

    Not getrusage: its peak lasts through exec, so that a process has at least that of the one that started it.
    """
    lines = [line for name in ("status", "smaps_rollup") for line in Path("/proc/self", name).read_text().splitlines()]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def restart_peak() -> None:
    """Let VmHWM begin anew, at what this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def import_pyplot() -> ModuleType:
    """Import matplotlib's pyplot; ValueError where it is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    return pyplot


class Label(NamedTuple):
    """A text beside a point of a plot, shown as a disc of that radius in points."""

    text: str
    point: tuple[float, float]
    radius: float = 3
    color: Any = "black"


def add_labels(axes: Any, labels: Sequence[Label], sides: Sequence[tuple[int, int]]) -> None:
    """Write labels where they meet neither each other nor a disc: on the first of these sides, or farther away.

    Call it last: it measures the figure as it is. sides: (x, y), each -1, 0 or 1, the best first.
    """
    axes.figure.draw_without_rendering()  # which lays it out
    scale = axes.figure.dpi / 72  # pixels in a point
    box_of, taken = type(axes.bbox.frozen()), []
    for label in labels:
        x, y = axes.transData.transform(label.point)
        taken.append(box_of.from_extents(x, y, x, y).padded(scale * label.radius))
    for label in labels:
        for far, side in [*product(range(4, 200, 12), sides), (4, sides[0])]:  # the last where nothing is free
            offset = [(label.radius + far) * part for part in side]
            align = {"ha": ("right", "center", "left")[side[0] + 1], "va": ("top", "center", "bottom")[side[1] + 1]}
            options = {"xytext": offset, "textcoords": "offset points", "color": label.color, "fontsize": 9}
            text = axes.annotate(label.text, label.point, **options, **align)
            box = text.get_window_extent().padded(scale)
            if not any(box.overlaps(other) for other in taken) and axes.bbox.count_contains(box.corners()) == 4:
                break
            text.remove()
        else:
            axes.add_artist(text)
        taken.append(box)


def check_plot(path: Path | None) -> None:
    """Raise ValueError or OSError where a plot is asked for and cannot be made, before minutes of work."""
    if path is not None:
        import_pyplot()
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
