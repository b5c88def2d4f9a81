"""The output folder: numbering, grids, and finding out early that it cannot be written."""

import os

import pytest
from conftest import refused
from PIL import Image

from ldm.inference.recipe import read_png_text
from ldm.inference.run import OutputFolder

IMAGE = Image.new("L", (8, 8), 255)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_numbers_go_on_after_the_highest(tmp_path):
    output = OutputFolder(tmp_path / "new" / "out")
    assert [output.save_sample(IMAGE, "t").name for _ in range(2)] == ["00000.png", "00001.png"]
    samples = tmp_path / "new" / "out" / "samples"
    (samples / "00000.png").unlink()  # a gap is not filled: 00001.png would be the next to be overwritten by a count
    for other in ("100000.png.txt", "x00009.png", "notes.txt"):
        (samples / other).touch()
    assert OutputFolder(tmp_path / "new" / "out").save_sample(IMAGE, "t").name == "00002.png"
    (samples / "99999.png").touch()
    assert OutputFolder(tmp_path / "new" / "out").save_sample(IMAGE, "t").name == "100000.png"


def test_two_runs_at_once_do_not_overwrite_each_other(tmp_path):
    one, two = OutputFolder(tmp_path), OutputFolder(tmp_path)
    paths = [output.save_sample(IMAGE, "t") for output in (one, two, one, two)]
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png", "00003.png"]


def test_grids_and_strips_count_for_themselves(tmp_path):
    output = OutputFolder(tmp_path)
    output.save_sample(IMAGE, "a")
    grid = output.save_grid([IMAGE] * 5, 2, "text of image 0")
    strip = output.save_strip(IMAGE, "text")
    assert names(tmp_path) == ["grid-0000.png", "samples", "strip-0000.png"]
    assert read_png_text(grid) == "text of image 0, Grid: 2x3"
    width, height = Image.open(grid).size
    assert width < height  # two columns, three rows
    assert output.save_grid([IMAGE], 4, "t").name == "grid-0001.png"
    assert read_png_text(strip) == "text"


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_way(below, tmp_path):
    (tmp_path / "file").touch()
    refused("cannot write into the output folder .*file", OutputFolder, tmp_path / f"file{below}", error=OSError)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples").chmod(0o500)
    refused("Permission denied", OutputFolder, tmp_path, error=OSError)


def test_trying_leaves_nothing(tmp_path):
    OutputFolder(tmp_path)
    assert names(tmp_path) == ["samples"] and names(tmp_path / "samples") == []
