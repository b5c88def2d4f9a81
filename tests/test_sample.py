"""scripts/sample.py: drawing of classes, and of nothing."""

import pytest
from conftest import refused
from script_runs import check_reproduced, load_script, pixels, recipe, runner, samples
from test_pixel_diffusion import PIXEL, build

from ldm.saving import save

UNET = PIXEL["unet_config"]
ALONE = {**UNET, "params": {name: value for name, value in UNET["params"].items() if name != "num_classes"}}


@pytest.fixture
def generate(tmp_path):
    save(build(), tmp_path / "model.safetensors")
    return runner(load_script("sample"), tmp_path / "model.safetensors", tmp_path)


@pytest.fixture
def generate_alone(tmp_path):
    save(build(unet_config=ALONE, cond_stage_config=None), tmp_path / "alone.safetensors")
    return runner(load_script("sample"), tmp_path / "alone.safetensors", tmp_path)


def test_each_class_gets_its_images(generate):
    out = generate("--class", 5, 3, "--n_samples", 2)
    recipes = [recipe(out / "samples" / f"{i:05}.png") for i in range(4)]
    assert [(r.prompt, r.seed) for r in recipes] == [("5", 0), ("5", 1), ("3", 2), ("3", 3)]
    assert {r.sampler for r in recipes} == {"ddpm"} and pixels(out / "grid-0000.png").shape[0] > 60


@pytest.mark.parametrize("scale", [1, 2.5])
def test_an_image_among_other_classes_is_made_again(generate, scale):
    out = generate("--class", 5, 3, 1, "--scale", scale)
    check_reproduced(generate, samples(out))


def test_any_class_and_none(generate, generate_alone):
    for run in (generate, generate_alone):
        out = run("--n_samples", 2, "--strip", out="one" if run is generate else "two")
        assert len(list((out / "samples").iterdir())) == 2 and recipe(out / "samples" / "00000.png").prompt == ""


def test_a_model_without_a_null_class(tmp_path):
    cond = {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 11, "null": False}}
    save(build(cond_stage_config=cond), tmp_path / "model.safetensors")
    generate = runner(load_script("sample"), tmp_path / "model.safetensors", tmp_path)
    refused("this model has no null class: name a class, 0 to 10", generate)
    refused("guidance scale 2 needs a null or negative condition", generate, "--class", 5, "--scale", 2)
    out = generate("--class", 5, "--scale", 2, "--negative-prompt", 3)
    assert recipe(out / "samples" / "00000.png").negative == "3"


def test_mistakes(generate, generate_alone, tmp_path):
    refused("this one takes texts", load_script("sample").main, ["--class", "5", "--outdir", str(tmp_path)])
    refused("class 'five' does not exist: this model's are 0 to 10", generate, "--class", "five")
    refused("class 'five' does", generate, "--class", 5, "five", "--batch-size", 1)  # before the first batch
    assert not list(tmp_path.rglob("*.png"))
    refused("--class needs a class-conditional model, or --classifier", generate_alone, "--class", 5)
    refused("guidance scale 2 needs a null or negative condition", generate_alone, "--scale", 2)
