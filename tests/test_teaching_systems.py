"""DDPM's and the teaching systems' configurations, from training to images, at as little of all as possible."""

import pytest
from omegaconf import OmegaConf
from PIL import Image
from script_runs import ROOT, load_script, names, pixels

from ldm.evaluation.networks import Measuring
from ldm.training.lr_scheduler import lr_multiplier

train, sample = load_script("train"), load_script("sample")
SHORT = ["loop.steps=2", "loop.batch_size=4", "loop.report_to=none"]
NARROW = {
    "simple_unet": ["widths=[4,4,8,8,8]"],
    "mnist14": ["widths=[8,8,8]", "norm_groups=4"],
    "ddpm": ["model_channels=16", "num_head_channels=16"],
}
NETWORK = "stage.params.model.params.unet_config.params"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name, side, classes",
    [("simple_unet", 32, []), ("mnist14", 14, ["--class", "5", "9"]), ("ddpm", 32, ["--class", "5", "9"])],
)
def test_a_system_trains_and_generates(name, side, classes, mnist, tmp_path, capsys):
    changes = [*SHORT, f"data.params.root={mnist}", "data.params.first=8", f"outdir={tmp_path / 'runs'}"]
    changes += ["stage.params.previews=2", "stage.params.model.params.defaults.steps=2"]
    changes += [f"{NETWORK}.{change}" for change in NARROW[name]]
    train.main([str(ROOT / "configs" / "pixel" / f"{name}.yaml"), *changes, "--device", "cpu"])
    noted = "still has signal level 0.219" in capsys.readouterr().err
    assert noted == (name == "simple_unet")
    checkpoint, out = tmp_path / "runs" / name / "model.safetensors", tmp_path / "out"
    options = ["--ckpt", checkpoint, "--outdir", out, "--steps", 3, "--n_samples", 2, "--strip", "--device", "cpu"]
    sample.main([str(option) for option in [*options, *classes]])
    count = 2 * max(1, len(classes) - 1)
    assert len(names(out / "samples")) == count
    assert pixels(out / "samples" / "00000.png").shape == (side, side)
    assert min(Image.open(out / "strip-0000.png").size) > 3 * side  # test_strip.py has its layout


def test_the_numbers_that_were_published():
    config = OmegaConf.load(ROOT / "configs" / "pixel" / "mnist14.yaml")
    loop, data = config.loop, config.data.params
    steps = data.first // loop.batch_size
    assert (data.first, data.pool, loop.batch_size, steps, loop.steps) == (5120, 2, 512, 10, 41 * 10)
    rates = [1e-3 * lr_multiplier(step, loop.steps, **loop.lr_schedule) for step in range(loop.steps)]
    assert rates == pytest.approx([1e-3] * 250 + [1e-4] * 160) and config.stage.params.learning_rate == 1e-3
    model = config.stage.params.model.params
    assert OmegaConf.to_container(model.schedule) == {"name": "cosine", "T": 1000}
    config = OmegaConf.load(ROOT / "configs" / "pixel" / "simple_unet.yaml")
    model = config.stage.params.model.params
    assert OmegaConf.to_container(model.schedule) == {"name": "linear", "T": 300} and config.stage.params.error == "l1"
    assert (model.defaults.sampler, model.defaults.steps) == ("ddpm", 300)
    model = OmegaConf.load(ROOT / "configs" / "pixel" / "ddpm.yaml").stage.params.model.params
    assert OmegaConf.to_container(model.schedule) == {"name": "linear"} and model.prediction == "eps"  # of 1000 levels
    assert (model.defaults.sampler, model.defaults.steps) == ("ddpm", 1000)


def test_the_networks_that_measure_images_of_fourteen_pixels_train(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(mnist))
    networks = ("judge14", "features14")
    configs = [str(ROOT / "configs" / "evaluation" / f"{name}.yaml") for name in networks]
    train.main([*configs, *SHORT, f"outdir={tmp_path / 'runs'}", "--device", "cpu"])
    assert Measuring.load(*(tmp_path / "runs" / name / "model.safetensors" for name in networks)).size == 14
