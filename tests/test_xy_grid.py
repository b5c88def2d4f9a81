"""X/Y grids: the cells in their order, each image that of its own recipe, and what a grid cannot be."""

import re

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from script_runs import load_script, pixels, recipe, runner, samples

import ldm
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.inference.again import read_image_text
from ldm.inference.generate import check_recipes, default_recipe
from ldm.inference.xy_grid import axis, grid_cells, read_axis
from ldm.settings import Settings, from_keywords

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


def test_settings_that_one_of_the_axes_turns_off(generate, capsys):
    """--pag-layers is of the cells with pag, and guidance of those above scale 1: no word is said of the others."""
    out = generate("--grid", "pag=0,1", "--pag-layers", "middle_block", "input_blocks.3", "--prompt", "five")
    off, on = map(recipe, samples(out))
    assert (off.pag, off.is_default("pag_layers")) == (0, True)
    assert (on.pag, on.pag_layers) == (1, ("middle_block", "input_blocks.3"))
    alone = generate("--pag", 1, "--pag-layers", "middle_block", "input_blocks.3", "--prompt", "five", out="alone")
    assert np.array_equal(pixels(samples(out)[1]), pixels(samples(alone)[0]))
    assert not np.array_equal(*map(pixels, samples(out)))
    refused("--pag-layers has no effect without --pag", generate, "--grid", "pag=0", "--pag-layers", "middle_block")
    refused(
        "--pag-layers has no effect without --pag", generate, "--grid", "steps=1,2", "--pag-layers", "out", steps=None
    )
    capsys.readouterr()
    generate("--grid", "scale=1,3", "--rescale", 0.7, "--grid", "seed=1,2")
    assert "no effect" not in capsys.readouterr().err
    generate("--scale", 1, "--rescale", 0.7, "--grid", "seed=1,2")
    assert capsys.readouterr().err.count("--rescale has no effect at guidance scale 1") == 1


def test_a_learned_word_in_one_cell_is_used(generate, tmp_path, capsys):
    write_words(tmp_path / "it.safetensors", LearnedWord("<it>", torch.ones(1, 32)), "diffusers")
    word = ["--embedding", tmp_path / "it.safetensors", "--prompt", "a five"]
    generate(*word, "--grid", "prompt=five,<it>")
    assert "no prompt contains" not in capsys.readouterr().err
    generate(*word, "--grid", "prompt=five,six")
    assert capsys.readouterr().err.count("no prompt contains the learned word '<it>'") == 1


def test_the_check_of_all_cells_encodes_nothing_but_another_layer(tiny_checkpoint, monkeypatch):
    model = ldm.load(tiny_checkpoint, device="cpu")
    first, seen = default_recipe(model, "tiny", prompt="five"), []
    monkeypatch.setattr(model, "condition", lambda texts, **options: seen.append(options))
    check_recipes(model, [first.changed(**more) for more in ({}, {"steps": 2}, {"prompt": "six"}, {"seed": 2})])
    assert seen == []
    check_recipes(model, [first.changed(clip_skip=skip) for skip in (1, 3, 3)])
    assert seen == [{"clip_skip": 3}]
    for name in ("prompt", "negative"):
        refused("makes more than 32 chunks", check_recipes, model, [first, first.changed(**{name: "a " * 500})])
        refused("of 'a' must be from -1000 to 1000", check_recipes, model, [first, first.changed(**{name: "(a:2000)"})])


def test_the_cells_share_the_hash_of_what_guides(generate, tiny_checkpoint, monkeypatch):
    seen: list = []
    monkeypatch.setattr("ldm.inference.guiders.file_hash", lambda path: seen.append(path) or "0123456789")
    out = generate("--grid", "scale=1,2", "--autoguide", tiny_checkpoint, "--prompt", "five")
    assert seen == [tiny_checkpoint]
    assert {recipe(path).autoguide_hash for path in samples(out)} == {"0123456789"}


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
        (["steps=1,2", "eta=0,1", "scale=1,2"], "columns and rows, not 3 settings"),
        (["prompt=seven,six"], "does not contain 'seven'"),
        (["strength=0.1,0.5"], "strength has no effect without an init image, which the commands img2img and inpaint"),
        (["seed=1,2"], "--seed has no effect beside a --grid over it"),
        (["scale=1,2,1.0"], r"scale needs one or several different values, got \[1.0, 2.0, 1.0\]"),
    ],
)
def test_what_a_grid_cannot_be(options, message, generate):
    given = [part for option in options for part in ("--grid", option)]
    refused(message, generate, "--prompt", "a five", "--seed", 3, *given, steps=None)


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
        ({"pag": [0, 1]}, "a grid over 'pag' is not possible: the settings are prompt, steps, .*, seed$"),
        ({"autoguide_scales": [0, 1]}, "a grid over 'autoguide_scales' is not possible: [^;]*$"),
        ({5: [1]}, "a grid over 5 is not possible"),
        ([("steps", [1])], "axes must be a mapping of settings to their values"),
        ({"seed": [1, 2]}, "seed has no effect beside a grid over it"),
    ],
)
def test_axes_of_python(axes, message):
    refused(message, ldm.xy_grid, None, "a five!", axes, seed=3)


def test_an_axis_of_seeds_beside_seeds(tiny_model):
    refused("seed 1 would have no effect beside seeds", ldm.xy_grid, tiny_model, "five", {"seed": [1, 2]}, seeds=[3])


def test_every_axis_of_python_is_an_argument_of_generate():
    (settings,) = re.findall("settings are (.*)", str(pytest.raises(ValueError, ldm.xy_grid, None, "", {"": 1}).value))
    for name in settings.split(", "):
        assert name in ("prompt", "negative", "seed") or from_keywords({name: None}) == Settings()


def test_words_of_a_prompt_that_is_not_text():
    refused("the prompt 5 does not contain 'five'", ldm.xy_grid, None, 5, {"prompt": ["five", "six"]})


def test_several_prompts_leave_room_for_one_setting(generate):
    grids = ["--grid", "scale=1,2", "--grid", "seed=1,2"]
    refused("not 2 settings and 2 prompts", generate, "--prompt", "a one", "--prompt", "a two", *grids)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("clip_skip=1,99", "clip_skip 99 does not exist"),
        ("final_sigma=zero,nosuch", "nosuch"),
        ("width=32,33", "width 33"),
        ("pag=0,1", "layer 'nosuch' has no self-attention"),
        ("spacing=trailing|5,5,1", "5,5,1"),
    ],
)
def test_no_cell_is_made_where_another_cannot_be(grid, message, generate, tmp_path):
    refused(message, generate, "--grid", grid, *(["--pag-layers", "nosuch"] if grid.startswith("pag") else []))
    assert not list(tmp_path.rglob("*.png"))
