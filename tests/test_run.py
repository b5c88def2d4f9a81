"""The output folder: numbering, grids, and finding out early that it cannot be written."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image, ImageChops

import ldm
from ldm.conditioning.tokenizer import Tokenizer
from ldm.finetune.embeddings import add_word
from ldm.inference.again import read_image_text
from ldm.inference.init_image import InitImage
from ldm.inference.recipe import save_image
from ldm.inference.run import OutputFolder, check_format, unknown_prompts

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
    assert read_image_text(grid) == "text of image 0, Grid: 2x3"
    width, height = Image.open(grid).size
    assert width < height  # two columns, three rows
    assert output.save_grid([IMAGE], 4, "t").name == "grid-0001.png"
    assert read_image_text(strip) == "text"


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
    OutputFolder(tmp_path / "new" / "out")
    assert names(tmp_path) == []


WRITE = """
import sys
from pathlib import Path
from PIL import Image
from ldm.inference.run import OutputFolder
output = OutputFolder(Path(sys.argv[1]))
sys.stdin.readline()  # both processes start at once
for _ in range(300):
    output.save_sample(Image.new("L", (8, 8)), sys.argv[2])
"""


def test_two_processes_in_one_folder_lose_nothing(tmp_path):
    """Each text is on exactly as many images as its process saved."""
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    running = [subprocess.Popen([*command, text], stdin=subprocess.PIPE) for text in ("a", "b")]
    for process in running:
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in running] == [0, 0]
    texts = [read_image_text(path) for path in (tmp_path / "samples").iterdir()]
    assert (texts.count("a"), texts.count("b"), len(texts)) == (300, 300, 600)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_none(links, tmp_path, monkeypatch):
    def no_links(old, new):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    save_image(IMAGE, tmp_path / "a.png", "first", new=True)
    refused("a.png", save_image, IMAGE, tmp_path / "a.png", "second", new=True, error=FileExistsError)
    assert names(tmp_path) == ["a.png"] and read_image_text(tmp_path / "a.png") == "first"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_other_formats_carry_the_text_too(suffix, mode, tmp_path):
    image = Image.linear_gradient("L").resize((16, 16)).convert(mode)
    path = OutputFolder(tmp_path, suffix).save_sample(image, "a ö 🎨\nSteps: 1")
    assert path.name == f"00000{suffix}" and read_image_text(path) == "a ö 🎨\nSteps: 1"
    same = ImageChops.difference(Image.open(path).convert(mode), image).getextrema()
    assert max(high for _, high in np.reshape(same, (-1, 2))) <= (8 if suffix == ".jpg" else 0)
    assert OutputFolder(tmp_path).save_sample(image, "t").name == "00001.png"


def test_what_jpeg_cannot_hold():
    clear = InitImage(Image.new("RGBA", (8, 8)), Image.new("L", (8, 8)))
    refused("JPEG has no transparency", check_format, "jpg", [""], clear)
    refused("30,000 characters", check_format, "jpg", ["a" * 30_001], None)
    check_format("webp", ["a" * 30_001], clear)


@pytest.mark.parametrize(
    ("prompts", "unknown"),
    [(["cat", "a cat", "Fluffy, giraffe!", "a five", "a bold cat"], 3), (["five", "<mine>", "9", "", "a 7"], 0)],
)
def test_prompts_of_words_that_the_captions_never_had(prompts, unknown):
    model = ldm.load(device="cpu")
    add_word(model, "<mine>", torch.ones(2, 128))
    assert unknown_prompts(model.cond_stage_model.tokenizer, prompts) == prompts[:unknown]
    assert unknown_prompts(Tokenizer(), prompts) == unknown_prompts(None, prompts) == []
