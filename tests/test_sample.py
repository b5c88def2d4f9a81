"""scripts/sample.py: drawing of classes, and of nothing."""

import pytest
from script_runs import load_script, pixels, recipe, runner
from test_pixel_diffusion import PIXEL, build

from ldm.loading import save

UNET = PIXEL["unet_config"]
ALONE = {**UNET, "params": {name: value for name, value in UNET["params"].items() if name != "num_classes"}}


@pytest.fixture
def draw(tmp_path):
    save(build(), tmp_path / "model.safetensors")
    return runner(load_script("sample"), tmp_path / "model.safetensors", tmp_path)


@pytest.fixture
def draw_alone(tmp_path):
    save(build(unet_config=ALONE, cond_stage_config=None), tmp_path / "alone.safetensors")
    return runner(load_script("sample"), tmp_path / "alone.safetensors", tmp_path)


def test_each_class_gets_its_images(draw):
    out = draw("--class", 5, 3, "--n_samples", 2)
    recipes = [recipe(out / "samples" / f"{i:05}.png") for i in range(4)]
    assert [(r.prompt, r.seed) for r in recipes] == [("5", 0), ("5", 1), ("3", 2), ("3", 3)]
    assert {r.sampler for r in recipes} == {"ddpm"} and pixels(out / "grid-0000.png").shape[0] > 60


@pytest.mark.parametrize("scale", [1, 2.5])
def test_a_image_among_other_classes_is_made_again(draw, scale):
    out = draw("--class", 5, 3, 1, "--scale", scale)
    for i in range(3):
        again = draw("--from-png", out / "samples" / f"0000{i}.png", out=f"again{i}", steps=None)
        assert (pixels(again / "samples" / "00000.png") == pixels(out / "samples" / f"0000{i}.png")).all()
        assert recipe(again / "samples" / "00000.png") == recipe(out / "samples" / f"0000{i}.png")


def test_any_class_and_none(draw, draw_alone):
    for run in (draw, draw_alone):
        out = run("--n_samples", 2, "--strip", out="one" if run is draw else "two")
        assert len(list((out / "samples").iterdir())) == 2 and recipe(out / "samples" / "00000.png").prompt == ""


def test_a_model_without_a_class_that_says_nothing(tmp_path):
    cond = {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 11, "null": False}}
    save(build(cond_stage_config=cond), tmp_path / "model.safetensors")
    draw = runner(load_script("sample"), tmp_path / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="this model has no null class: name a class, 0 to 10"):
        draw()
    with pytest.raises(ValueError, match="guidance scale 2 needs a null or negative condition"):
        draw("--class", 5, "--scale", 2)
    out = draw("--class", 5, "--scale", 2, "--negative-prompt", 3)
    assert recipe(out / "samples" / "00000.png").negative == "3"


def test_mistakes(draw, draw_alone):
    with pytest.raises(ValueError, match="class 'five' does not exist: this model's are 0 to 10"):
        draw("--class", "five")
    with pytest.raises(ValueError, match="--class needs a class-conditional model, or --classifier"):
        draw_alone("--class", 5)
    with pytest.raises(ValueError, match="guidance scale 2 needs a null or negative condition"):
        draw_alone("--scale", 2)
