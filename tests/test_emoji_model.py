"""The colour model that ships: its size, and that its images show what simple prompts say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.checkpoint.networks import PRETRAINED
from ldm.commands.txt2img import main


@pytest.fixture(scope="module")
def model():
    return ldm.load("emoji", device="cpu")


def test_it_is_small():
    assert (PRETRAINED / "emoji.safetensors").stat().st_size <= 16_000_000


@pytest.mark.smoke
def test_colours_of_things_and_backgrounds(model):
    prompts = [
        "a flat drawing of a red heart",
        "a flat drawing of a green heart",
        "a flat drawing of a red heart on a blue background",
        "a flat drawing of a red heart on a black background",
    ]
    images = [np.asarray(image, np.float32) for image in model.generate(prompts, seed=0, steps=10)]
    assert all(image.shape == (64, 64, 3) for image in images)
    middle = [image[28:36, 28:36].mean((0, 1)) for image in images]
    corner = [image[:4, :4].mean((0, 1)) for image in images]
    for k in (0, 2, 3):
        assert middle[k][0] > 150 > 1.4 * middle[k][1:].max()
    assert middle[1].argmax() == 1
    assert corner[0].min() > 225 and corner[1].min() > 225
    assert corner[2].argmax() == 2 and corner[2][2] > corner[2][0] + 60
    assert corner[3].max() < 80


def test_skin_tones_are_ordered(model):
    tones = ("light", "medium", "dark")
    prompts = [f"a flat drawing of a thumbs up with {tone} skin" for tone in tones]
    images = [np.asarray(image, np.float32) for image in model.generate(prompts, seed=1, steps=10)]
    light = [image[image.min(2) < 235].mean() for image in images]  # of what is not the white background
    assert light[0] > light[1] + 15 > light[2] + 30


def test_the_command_takes_its_name(tmp_path, capsys):
    main(["--ckpt", "emoji", "--prompt", "a cat face", "--steps", "2", "--device", "cpu", "--outdir", str(tmp_path)])
    (path,) = Path(tmp_path).rglob("samples/*.png")
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
