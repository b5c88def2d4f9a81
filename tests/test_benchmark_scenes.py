"""The benchmark of the number of scenes: its table, its plot, and what is no report."""

import json

import pytest
from conftest import refused
from PIL import Image

from benchmarks.scenes import HELD_OUT, SHOWN, main


def write(path, share: float) -> str:
    """A report in which the share of seen captions is this, and of others 0, 0.1 and 0.2 less."""
    kinds = {"seen": share} | {kind: share - 0.1 * i for i, kind in enumerate(HELD_OUT)}
    report = {kind: {"generated": {name: {"accuracy": own} for name in SHOWN}} for kind, own in kinds.items()}
    path.write_text(json.dumps({"measured": "scenes", **report}))
    return str(path)


def test_the_table_and_the_plot(tmp_path, capsys):
    reports = [f"20000={write(tmp_path / 'many.json', 0.7)}", f"500={write(tmp_path / 'few.json', 0.4)}"]
    main([*reports, "--plot", str(tmp_path / "new" / "plot.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| scenes | objects | colours | binding | places |"
    assert lines[2:4] == ["| 500, seen | 40% | 40% | 40% | 40% |", "| 500, held out | 30% | 30% | 30% | 30% |"]
    assert lines[4].startswith("| 20,000, seen | 70%") and len(lines) == 6
    with Image.open(tmp_path / "new" / "plot.png") as image:
        assert image.size == (660, 440)


@pytest.mark.parametrize("text", ["500", "x={}", "500=missing.json", "500={}.empty"])
def test_what_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "a.json.empty").write_text("{}")
    write(tmp_path / "a.json", 0.5)
    refused("is not N=FILE with a report", main, [text.format(tmp_path / "a.json")])
