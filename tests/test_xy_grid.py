"""X/Y grids: the cells in their order, each image that of its own recipe, and what a grid cannot be."""

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from script_runs import load_script, pixels, recipe, runner, samples

import ldm
from ldm.inference.again import read_image_text
from ldm.inference.xy_grid import axis, grid_cells, read_axis

txt2img = load_script("txt2img")


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    return runner(txt2img, tiny_checkpoint, tmp_path)


def test_each_cell_is_the_image_of_its_own_settings(generate, tiny_checkpoint):
    out = generate("--grid", "cfg=1,3", "--grid", "prompt=five,a bold six", "--seed", 4, "--prompt", "five")
    made = [recipe(path) for path in samples(out)]
    wanted = [(scale, prompt) for prompt in ("five", "a bold six") for scale in (1.0, 3.0)]
    assert [(one.scale, one.prompt) for one in made] == wanted and {one.seed for one in made} == {4}
    model = ldm.load(tiny_checkpoint, device="cpu")
    for path, (scale, prompt) in zip(samples(out), wanted, strict=True):
        (alone,) = model.generate([prompt], scale=scale, steps=3, seed=4)
        assert np.array_equal(pixels(path), np.asarray(alone))
    again = generate("--from-png", samples(out)[2], steps=None, out="again")
    assert np.array_equal(pixels(samples(again)[0]), pixels(samples(out)[2]))
    assert read_image_text(out / "grid-0000.png").endswith("Grid: 4 labelled")
    sheet = ldm.xy_grid(model, "five", {"scale": [1, 3], "prompt": ["five", "a bold six"]}, steps=3, seed=4)
    assert np.array_equal(np.asarray(sheet), pixels(out / "grid-0000.png"))


def test_a_made_image_is_varied_with_its_own_settings(generate):
    first = generate("--seed", 9, "--prompt", "a bold two")
    out = generate(
        "--from-png", samples(first)[0], "--grid", "scale=1,5", "--grid", "prompt=two,six", steps=None, out="x"
    )
    made = [recipe(path) for path in samples(out)]
    assert [one.prompt for one in made] == ["a bold two"] * 2 + ["a bold six"] * 2
    assert {(one.seed, one.steps) for one in made} == {(9, 3)} and [one.scale for one in made] == [1, 5] * 2


def test_several_prompts_make_the_rows(generate):
    out = generate("--grid", "steps=1,2,3", "--prompt", "a one", "--prompt", "a two", steps=None)
    assert [(r.prompt, r.steps) for r in map(recipe, samples(out))] == [
        (prompt, steps) for prompt in ("a one", "a two") for steps in (1, 2, 3)
    ]
    width, height = Image.open(out / "grid-0000.png").size
    assert width == 3 * (128 + 4) + 8 and height > 2 * 128


def test_labels_and_values():
    cells = grid_cells(["a red five"], [read_axis("scale=1,2.5"), read_axis("negative=|a, b")])
    assert [(cell.column, cell.row) for cell in cells[1:3]] == [
        ("scale 2.5", "negative "),
        ("scale 1", "negative a, b"),
    ]
    assert cells[3].settings == {"scale": 2.5, "negative": "a, b"} and cells[3].prompt == "a red five"
    words = grid_cells(["five, fives: a five"], [read_axis("prompt=five,six")])
    assert [cell.prompt for cell in words] == ["five, fives: a five", "six, fives: a six"]
    assert read_axis("interval=0 to 1,0.3 to 2.5").values == [(0.0, 1.0), (0.3, 2.5)]
    assert axis("guidance_scale", [2]).name == "scale"
    assert len({cell.column for cell in grid_cells([""], [axis("scale", [1.0, 1.0000001])])}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["steps"], "needs a setting and its values"),
        (["stepz=1,2"], "a grid over 'stepz' is not possible.*did you mean steps"),
        (["steps=1,two"], "steps 'two' is not an integer"),
        (["steps=0,2"], "steps must be at least 1"),
        (["steps=1,2", "ddim_steps=3"], "two different settings, not steps twice"),
        (["steps=1,2", "seed=1,2", "scale=1,2"], "columns and rows, not 3 settings"),
        (["prompt=seven,six"], "does not contain 'seven'"),
        (["scale=1,2,1.0"], r"scale needs one or several different values, got \[1.0, 2.0, 1.0\]"),
    ],
)
def test_what_a_grid_cannot_be(options, message, generate):
    given = [part for option in options for part in ("--grid", option)]
    refused(message, generate, "--prompt", "a five", *given, steps=None)


@pytest.mark.parametrize(
    "option", [["--n_samples", 2], ["--skip_grid"], ["--strip"], ["--n_rows", 2], ["--enlarge", 2]]
)
def test_options_without_a_meaning_beside_it(option, generate):
    refused("leave out", generate, "--grid", "scale=1,2", *option)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "needs one or two settings"),
        ({"steps": []}, "needs one or several different values"),
        ({"negative": "ab"}, "must be a list of negative, not 'ab'"),
        ({"steps": 3}, "must be a list of steps, not 3"),
        ({"prompt": ["five", 6]}, "prompt 6 is not text"),
        ({"prompt": ["", "six"]}, "does not contain ''"),
    ],
)
def test_axes_of_python(axes, message):
    refused(message, ldm.xy_grid, None, "a five!", axes)


def test_several_prompts_leave_room_for_one_setting(generate):
    grids = ["--grid", "scale=1,2", "--grid", "seed=1,2"]
    refused("not 2 settings and 2 prompts", generate, "--prompt", "a one", "--prompt", "a two", *grids)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("clip_skip=1,99", "clip_skip 99 does not exist"),
        ("final_sigma=zero,nosuch", "nosuch"),
        ("width=32,33", "width 33"),
        ("spacing=trailing|5,5,1", "5,5,1"),
    ],
)
def test_no_cell_is_made_where_another_cannot_be(grid, message, generate, tmp_path):
    refused(message, generate, "--grid", grid)
    assert not list(tmp_path.rglob("*.png"))
