"""The command `ldm interpolate`: its files, and that their ends are the images of txt2img."""

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from script_runs import load_script, pixels, runner
from test_pixel_diffusion import PIXEL

from ldm.inference.again import read_recipe
from ldm.interpolation import interpolate
from ldm.pixel_diffusion import PixelDiffusion
from ldm.saving import save


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    return runner(load_script("interpolate"), tiny_checkpoint, tmp_path)


@pytest.mark.smoke
def test_the_way_there_and_back(run, tiny_model, tmp_path):
    out = run("--prompt", "five", "--to", "ab", "--seed", 3, "--seed-to", 8, "--frames", 3, "--enlarge", 1)
    assert sorted(path.name for path in out.iterdir()) == ["animation-0000.gif", "grid-0000.png"]
    expected = tiny_model.generate(interpolate("five", "ab", 3), seeds=interpolate(3, 8, 3), steps=3)
    with Image.open(out / "animation-0000.gif") as animation:
        assert animation.n_frames == 4 and animation.info["loop"] == 0 and animation.info["duration"] == 120
        for i, image in enumerate([*expected, expected[1]]):
            animation.seek(i)
            assert np.abs(np.asarray(animation.convert("L"), int) - np.asarray(image)).max() <= 1
        assert b'"--to=ab --seed-to=8 --frames=3"' in animation.info["comment"]
    sheet = pixels(out / "grid-0000.png")[..., 0].astype(int)
    for image in expected:  # each is somewhere on it
        own = np.asarray(image, int)
        places = np.lib.stride_tricks.sliding_window_view(sheet, own.shape)[-own.shape[0] :]
        assert np.abs(places - own).max((-1, -2)).min() <= 1
    for name in ("grid-0000.png", "animation-0000.gif"):
        refused("it was interpolated, which the command interpolate does", read_recipe, out / name)


def test_one_of_them_alone_changes(run):
    def sheet(*options):
        out = run("--prompt", "five", "--seed", 3, "--frames", 2, *options, out=options[0].strip("-"))
        return pixels(out / "grid-0000.png")

    prompts, seeds = sheet("--to", "ab"), sheet("--seed-to", 8)
    assert prompts.shape != seeds.shape or (prompts != seeds).any()


def test_a_model_without_prompts(tmp_path):
    """It takes two seeds and the empty prompt."""
    unet = {k: v for k, v in PIXEL["unet_config"]["params"].items() if k != "num_classes"}
    own = {"cond_stage_config": None, "unet_config": {**PIXEL["unet_config"], "params": unet}}
    save(PixelDiffusion(**{**PIXEL, **own}), tmp_path / "m.safetensors")
    run = runner(load_script("interpolate"), tmp_path / "m.safetensors", tmp_path)
    refused("unconditional and takes no prompt", run, "--prompt", "five", "--seed-to", 1)
    assert (run("--prompt", "", "--seed-to", 1, "--frames", 2) / "animation-0000.gif").is_file()


def test_mistakes_are_one_sentence(run, tmp_path):
    for same in ([], ["--to", "five"], ["--seed-to", 0], ["--to", "five", "--seed", 3, "--seed-to", 3]):
        refused("both ends are the same", run, "--prompt", "five", *same)
    same = ("--prompt", "five", "--to", "FIVE")
    refused("reads 'FIVE' as it reads 'five': give --to other words", run, *same)
    refused("reads 'FIVE' as it reads 'five': give --to other words", run, *same, "--precision", "bf16")
    refused("'.ud800' is not valid UTF-8 text", run, "--prompt", "five", "--to", "\ud800")
    refused("use a positive multiple of", run, "--prompt", "five", "--to", "ab", "--H", 33)
    refused("at a time, take at least", run, "--prompt", "five", "--to", "ab", "--frames", 10**9)
    assert not list(tmp_path.rglob("*.png"))
