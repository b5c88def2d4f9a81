"""Recipes: their text in the PNG and back, the plan of a run, prompt files, PNG files."""

from dataclasses import replace

import pytest
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.changes import Change
from ldm.inference.again import read_image_text, recipe_from_text, refill
from ldm.inference.recipe import NEGATIVE, Recipe, plan, save_image
from ldm.settings import ALL_SIGMAS

FIVE = Recipe(
    prompt="a handwritten digit five", steps=20, sampler="ddim", scale=1.5, seed=3, width=32, height=32,
    model_hash="0123456789", model_name="digits",
)  # fmt: skip


def test_text_is_what_web_ui_users_know():
    lines = replace(FIVE, negative="blurry, bold", spacing="trailing", eta=0.0, index=3).to_text().split("\n")
    assert lines[:2] == ["a handwritten digit five", "Negative prompt: blurry, bold"]
    assert lines[2].startswith(
        "Steps: 20, Sampler: ddim, CFG scale: 1.5, Seed: 3, Size: 32x32, Model hash: 0123456789, Model: digits, "
        "Index: 3, Spacing: trailing, Eta: 0.0"
    )
    assert FIVE.to_text().count("\n") == 1  # no line for an empty negative prompt
    assert "Denoising" not in FIVE.to_text()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
prompts = texts.filter(lambda text: f"\n{NEGATIVE}" not in f"\n{text}")
numbers = st.floats(-1e6, 1e6)


@given(
    prompts,
    prompts,
    st.integers(1, 1000),
    numbers,
    st.integers(0, 2**63),
    st.none() | st.sampled_from(["trailing", "compvis"]),
    st.none() | st.floats(0, 1),
    st.tuples(st.floats(0, 10), st.floats(10, float("inf"))),
    st.booleans(),
    texts,
)
def test_text_gives_the_recipe_back(prompt, negative, steps, scale, seed, spacing, eta, interval, fixed, name):
    recipe = Recipe(
        prompt=prompt, negative=negative, steps=steps, sampler="ddpm", scale=scale, seed=seed, width=64, height=32,
        spacing=spacing, eta=eta, interval=interval, strength=eta, init_hash="0123456789", mask_hash="abcdefabcd",
        fixed_code=fixed, plain=fixed, clip_skip=steps, rescale=0.7, index=5, batch_size=16, batch_position=5,
        batch_prompts=4, prompt_position=2, model_name=name, precision="autocast",
    )  # fmt: skip
    assert recipe_from_text(recipe.to_text()) == recipe


def test_text_of_another_program_reads():
    text = 'a five\nsecond line\nNegative prompt: bold\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Lora hashes: "x: 1, y: 2", Version: v1.9'  # noqa: E501
    recipe = recipe_from_text(text)
    assert (recipe.prompt, recipe.negative, recipe.sampler) == ("a five\nsecond line", "bold", "Euler a")
    assert (recipe.width, recipe.height, recipe.scale, recipe.batch_size) == (512, 768, 7.0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it names no 'Size'"),
        ("a five\nSteps: 20, Size: 32x32", "it names no 'Sampler'"),
        (FIVE.to_text().replace("Steps: 20", "Steps: few"), "settings cannot be read"),
        (FIVE.to_text().replace("32x32", "32"), "settings cannot be read"),
        (FIVE.to_text() + ", Guidance interval: 1", "settings cannot be read"),
        (FIVE.to_text() + ", Grid: 2x3", "a grid of 2x3 images"),
    ],
)
def test_text_that_is_no_recipe(text, message):
    refused(message, recipe_from_text, text)


def test_prompts_that_the_text_could_not_give_back():
    refused("give that as the negative prompt", replace, FIVE, prompt="a five\nNegative prompt: bold")
    refused("UTF-8", replace, FIVE, prompt="a \udcff five")


def test_changed_keeps_what_is_not_given():
    assert FIVE.changed(scale=0.0, seed=None) == replace(FIVE, scale=0.0)
    with pytest.raises(TypeError):
        FIVE.changed(scael=1.0)


def test_plan_numbers_on_across_prompts_samples_and_iterations():
    run = plan(replace(FIVE, seed=10), ["one", "two"], per_prompt=3, batch_size=4)
    assert [recipe.prompt for recipe in run] == ["one"] * 3 + ["two"] * 3
    assert [recipe.seed for recipe in run] == [10, 11, 12, 13, 14, 15]
    assert [recipe.index for recipe in run] == [0, 1, 2, 3, 4, 5]
    assert [recipe.batch_size for recipe in run] == [4, 4, 4, 4, 2, 2]
    assert [recipe.batch_position for recipe in run] == [0, 1, 2, 3, 0, 1]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 9))
def test_refill_gives_a_batch_of_the_same_shape(prompts, per_prompt, batch_size):
    run = plan(FIVE, prompts, per_prompt, batch_size)
    for recipe in run:
        batch = refill(recipe)
        distinct = list(dict.fromkeys(batch))
        assert batch[recipe.batch_position] == recipe.prompt
        assert (len(batch), len(distinct)) == (recipe.batch_size, recipe.batch_prompts)
        assert distinct.index(recipe.prompt) == recipe.prompt_position


def test_a_batch_has_prompts_of_one_length():
    run = plan(FIVE, ["one", "two", "three", "four"], per_prompt=2, batch_size=3, lengths=[1, 2, 2, 1])
    shapes = [(r.batch_size, r.batch_position, r.batch_prompts, r.prompt_position) for r in run]
    assert shapes == [(2, 0, 1, 0), (2, 1, 1, 0), *[(3, 0, 2, 0), (3, 1, 2, 0), (3, 2, 2, 1)], (1, 0, 1, 0),
                      (2, 0, 1, 0), (2, 1, 1, 0)]  # fmt: skip
    assert [recipe.index for recipe in run] == list(range(8))


@pytest.mark.parametrize("prompt", ["a b", "a b c", "a b c d", "a 1", "a", "1 1 1", "a b c d e"])
def test_refill_keeps_the_length(prompt):
    def count(text):  # chunks of three words
        return -(-len(text.split()) // 3)

    run = plan(FIVE, [prompt, "x " * len(prompt.split()), "y"], per_prompt=1, batch_size=3)
    for recipe in run[:1]:
        batch = refill(recipe, count)
        assert batch[0] == prompt and len(set(batch)) == 3
        assert {count(other) for other in batch} == {count(prompt)}


def test_the_web_uis_schedules():
    text = "a\nSteps: 9, Sampler: {}, Schedule type: {}, CFG scale: 7, Seed: 1, Size: 64x64"
    for sampler, schedule, spacing in (
        ("Euler a", "Automatic", "linspace"), ("DPM++ SDE", "Automatic", "karras"), ("DDIM", "Automatic", "leading"),
        ("Euler", "SGM Uniform", "trailing"), ("DPM++ 2M", "Exponential", "exponential"), ("Euler", "Beta", "Beta"),
    ):  # fmt: skip
        assert recipe_from_text(text.format(sampler, schedule)).spacing == spacing


def test_a_large_batch_is_refilled_at_once():
    assert len(refill(replace(FIVE, batch_size=200_000, batch_position=199_999))) == 200_000


@pytest.mark.parametrize(
    "wrong", [{"batch_position": 4}, {"batch_prompts": 0}, {"prompt_position": 1}, {"batch_size": 0}]
)
def test_places_that_do_not_exist(wrong):
    refused("has no position", refill, replace(replace(FIVE, batch_size=4), **wrong))


OLD = {  # texts of before guidance and changes were structured
    ' "Steps: 5", ö 五\nNegative prompt: a: b, c\nSteps: 4, Sampler: ddim, CFG scale: 2.0, Seed: 1, Size: 32x32, '
    "Model hash: b1be4534fc, Model: digits, Index: 1, Spacing: trailing, Eta: 0.0, Guidance interval: 0.3 to 2.5, "
    "Precision: full, Batch size: 2, Batch pos: 1, Version: ldm 0.1.0": {"interval": (0.3, 2.5), "batch_position": 1},
    "five\nSteps: 4, Sampler: ddpm, CFG scale: 3.0, Seed: 10, Size: 32x40, Model hash: b1be4534fc, Model: digits, "
    "Index: 1, Spacing: leading, Eta: 0.5, Guidance rescale: 0.5, Fixed code: True, Plain prompt: True, "
    "Precision: autocast, Batch size: 2, Batch pos: 1, Version: ldm 0.1.0": {
        "rescale": 0.5, "fixed_code": True, "plain": True, "precision": "autocast", "height": 40,
        "interval": ALL_SIGMAS,
    },
    "\nSteps: 4, Sampler: ddim, CFG scale: 2.0, Seed: 0, Size: 32x32, Denoising strength: 0.5, Init image hash: "
    "767fa49e25, Model hash: b1be4534fc, Changes: lora a b 0123456789 at 0.5; vae 0123456789, Model: digits, "
    "Index: 0, Spacing: trailing, Eta: 0.0, Precision: full, Batch size: 1, Batch pos: 0, Version: ldm 0.1.0": {
        "strength": 0.5, "init_hash": "767fa49e25",
        "changes": (Change("lora", "a b", "0123456789", 0.5), Change("vae", hash="0123456789")),
    },
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), OLD.items())
def test_texts_of_earlier_versions_read_and_are_written_the_same(text, expected):
    made = recipe_from_text(text)
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.to_text() == text


def test_guidance_of_earlier_versions_was_among_the_changes():
    changes = "prediction v; autoguide b1be4534fc at 1.5; pag 2 middle_block output_blocks.1; threshold 0.95"
    made = recipe_from_text(f"five\nSteps: 4, Sampler: ddim, CFG scale: 2.0, Seed: 0, Size: 32x32, Changes: {changes}")
    assert made.changes == (Change("prediction", "v"),)
    assert (made.autoguide_hash, made.autoguide_scale, made.threshold) == ("b1be4534fc", 1.5, 0.95)
    assert (made.pag, made.pag_layers) == (2.0, ("middle_block", "output_blocks.1"))
    assert recipe_from_text(made.to_text()) == made


IMAGE = Image.linear_gradient("L").resize((32, 32))


@pytest.mark.parametrize("text", ["a five\nSteps: 20", "an ö", "五 🎨\nSteps: 1", "nul \0 and \r\n", ""])
def test_text_and_pixels_come_back(text, tmp_path):
    save_image(IMAGE, tmp_path / "a.png", text)
    assert read_image_text(tmp_path / "a.png") == text
    assert Image.open(tmp_path / "a.png").tobytes() == IMAGE.tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_web_ui_tools_find_the_text(tmp_path):
    save_image(IMAGE, tmp_path / "a.png", "a five\nSteps: 20")
    assert Image.open(tmp_path / "a.png").info == {"parameters": "a five\nSteps: 20"}
    assert b"tEXtparameters\0a five\nSteps: 20" in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, tmp_path, monkeypatch):
    save_image(IMAGE, tmp_path / "a.png", "old")

    def half(self, file, **options):
        file.write_bytes(b"\x89PNG half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(type(error)):
        save_image(IMAGE, tmp_path / "a.png", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert read_image_text(tmp_path / "a.png") == "old"


def test_files_without_a_text_are_refused(tmp_path):
    IMAGE.save(tmp_path / "plain.png")
    for name in ("a.jpg", "a.gif", "a.bmp"):
        IMAGE.save(tmp_path / name)
    (tmp_path / "empty.png").touch()
    save_image(IMAGE, tmp_path / "whole.png", "text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, message in [
        ("plain.png", "carries no text chunk 'parameters'"),
        ("a.jpg", "carries no text chunk"),
        ("a.gif", "carries no text chunk"),
        ("a.bmp", "not a PNG, JPEG, WebP or GIF image"),
        ("empty.png", "not a PNG, JPEG, WebP or GIF image"),
        ("cut.png", "not a PNG, JPEG, WebP or GIF image"),
    ]:
        refused(message, read_image_text, tmp_path / name)
    with pytest.raises(OSError):
        read_image_text(tmp_path / "missing.png")


def test_compressed_text_of_another_program_reads(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", "a 五", zip=True)
    IMAGE.save(tmp_path / "a.png", pnginfo=info)
    assert read_image_text(tmp_path / "a.png") == "a 五"
