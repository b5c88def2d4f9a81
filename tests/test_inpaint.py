"""inpaint: what the mask keeps is in the file to the byte; folders of pairs; models trained to inpaint; mistakes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomised, refused
from PIL import Image
from script_runs import check_reproduced, load_script, names, pixels, recipe, runner, samples, saved

import ldm
from ldm.inference.again import read_image_text

inpaint = load_script("inpaint")


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    return runner(inpaint, tiny_checkpoint, tmp_path)


@pytest.fixture
def pair(tmp_path) -> list:
    """The options that name an image and a mask, white in the upper half."""
    return ["--init-img", saved(tmp_path / "five.png", make_image()), "--mask", saved(tmp_path / "mask.png", upper())]


def make_image(width=32, height=32, mode="L", seed=0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def upper(width=32, height=32) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width, height // 2))
    return mask


def folder(path: Path, **images: Image.Image) -> Path:
    for name, image in images.items():
        saved(path / f"{name}.png", image)
    return path


def test_the_image_is_that_of_the_library_and_says_how_it_was_made(generate, pair, tiny_checkpoint):
    out = generate(*pair, "--prompt", "a seven", "--seed", 5)
    assert names(out) == ["grid-0000.png", "samples"]
    model = ldm.load(tiny_checkpoint, device="cpu")
    (image,) = model.generate(["a seven"], image=make_image(), mask=upper(), steps=3, seed=5)
    assert np.array_equal(pixels(samples(out)[0]), np.asarray(image))
    made = recipe(samples(out)[0])
    assert (made.strength, len(made.init_hash), len(made.mask_hash)) == (1.0, 10, 10)
    assert made.mask_hash != made.init_hash
    assert "Mask hash: " in read_image_text(samples(out)[0])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(32, 32), (45, 31)])
def test_what_the_mask_keeps_is_in_the_file_to_the_byte(generate, tmp_path, mode, size):
    original = make_image(*size, mode)
    files = ["--init-img", saved(tmp_path / "a.png", original), "--mask", saved(tmp_path / "m.png", upper(*size))]
    out, inverse = (
        generate(*files, "--n_samples", 2),
        generate(*files, "--invert-mask", "--strength", 0.5, out="inverse"),
    )
    half = size[1] // 2
    for path, kept in [*((path, slice(half, None)) for path in samples(out)), (samples(inverse)[0], slice(None, half))]:
        result = Image.open(path)
        assert (result.mode, result.size) == (mode, size)
        assert np.array_equal(np.asarray(result)[kept], np.asarray(original)[kept])
        assert not np.array_equal(np.asarray(result), np.asarray(original))


def test_greys_blend(generate, tmp_path):
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 32, 0))
    files = ["--init-img", saved(tmp_path / "a.png", make_image())]
    soft = pixels(samples(generate(*files, "--mask", saved(tmp_path / "soft.png", ramp)))[0])
    hard_mask = ramp.point(lambda level: 255 if level >= 128 else 0)
    hard = pixels(samples(generate(*files, "--mask", saved(tmp_path / "hard.png", hard_mask), out="hard"))[0])
    share = np.asarray(ramp)[:, 16:] / 255
    expected = share * hard[:, 16:] + (1 - share) * np.asarray(make_image())[:, 16:]
    assert np.abs(soft[:, 16:] - expected).max() <= 0.501
    assert np.array_equal(soft[:, 0], np.asarray(make_image())[:, 0])


VARIETY = {
    "plain": [],
    "batch": ["--n_samples", 3, "--batch-size", 2, "--sampler", "ddpm"],
    "inverted": ["--invert-mask", "--strength", 0.6],
    "resized": ["--W", 40, "--prompt", "a three"],
}


@pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY)
def test_every_image_can_be_made_again_to_the_byte(generate, pair, options):
    again = [*pair, "--invert-mask"] if "--invert-mask" in options else pair
    check_reproduced(generate, samples(generate(*pair, *options)), *again)


def test_making_again_needs_the_same_image_and_mask(generate, pair, tmp_path, tiny_checkpoint):
    (path,) = samples(generate(*pair))
    other = saved(tmp_path / "other.png", make_image(seed=1))
    refused("from an init image with hash .*--init-img", generate, "--from-png", path, "--init-img", other, *pair[2:])
    for change in (["--mask", other], [*pair[2:], "--invert-mask"]):
        refused("from a mask with hash .*--mask, with --invert-mask", generate, "--from-png", path, *pair[:2], *change)
    img2img = runner(load_script("img2img"), tiny_checkpoint, tmp_path)
    refused("was made with a mask: use the command inpaint", img2img, "--from-png", path, *pair[:2])
    (plain,) = samples(img2img(*pair[:2], out="plain"))
    refused("was made without a mask: use the command img2img", generate, "--from-png", plain, *pair)
    with pytest.raises(ValueError, match="made from an init image.* use the command inpaint"):
        runner(load_script("txt2img"), tiny_checkpoint, tmp_path)("--from-png", path)


def test_masks_may_be_painted_on_transparency(generate, pair, tmp_path):
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 32, 16))
    out = generate(*pair[:2], "--mask", saved(tmp_path / "clear.png", clear), out="clear")
    assert np.array_equal(pixels(samples(out)[0]), pixels(samples(generate(*pair))[0]))


def test_a_folder_of_pairs(generate, tmp_path, tiny_model):
    """b has another size; c is no pair; each is generated as it would be alone, with a seed of its own."""
    pairs = {
        "b": make_image(24, 40, "RGB"),
        "b_mask": upper(24, 40),
        "a": make_image(),
        "a_mask": upper(),
        "c": make_image(),
    }
    indir = folder(tmp_path / "pairs", **pairs)
    out = generate("--indir", indir, "--seed", 3, "--prompt", "a nine")
    assert names(out) == ["a.png", "b.png"]
    for i, name in enumerate("ab"):
        files = ["--init-img", indir / f"{name}.png", "--mask", indir / f"{name}_mask.png"]
        (alone,) = samples(generate(*files, "--seed", 3 + i, "--prompt", "a nine", out=f"alone-{name}"))
        assert np.array_equal(pixels(out / f"{name}.png"), pixels(alone))
        assert Image.open(out / f"{name}.png").mode == pairs[name].mode
        assert (recipe(out / f"{name}.png").seed, recipe(out / f"{name}.png").index) == (3 + i, i)
        (again,) = samples(generate("--from-png", out / f"{name}.png", *files, out=f"again-{name}", steps=None))
        assert np.array_equal(pixels(out / f"{name}.png"), pixels(again))
    before = pixels(out / "a.png")
    generate("--indir", indir, "--seed", 9)
    assert names(out) == ["a.png", "b.png"] and not np.array_equal(pixels(out / "a.png"), before)


FOLDERS = {
    "empty": ({}, [], "holds no X_mask.png beside an X.png"),
    "no masks": ({"a": make_image()}, [], "holds no X_mask.png beside an X.png"),
    "no image": ({"a_mask": upper()}, [], "a_mask.png has no image: a.png is not there"),
    "another size": (
        {"a": make_image(), "a_mask": upper(), "b": make_image(), "b_mask": upper(16, 32)},
        [],
        "the mask .*b_mask.png is 16 x 32 pixels and the image .*b.png 32 x 32",
    ),
    "too large": (
        {"a": make_image(), "a_mask": upper(), "b": make_image(300, 300), "b_mask": upper(300, 300)},
        [],
        "the image is 300 x 300 pixels and the model's size is 32 x 32",
    ),
    "many": ({"a": make_image(), "a_mask": upper()}, ["--n_samples", 2], "leave out --n-samples, --n-iter"),
    "two ways": ({"a": make_image(), "a_mask": upper()}, ["--mask", "m.png", "--strip"], "leave out --mask, --strip"),
    "no grid": ({"a": make_image(), "a_mask": upper()}, ["--n_rows", 2, "--batch-size", 2], "--n-rows, --batch-size"),
}


@pytest.mark.parametrize(("images", "options", "message"), FOLDERS.values(), ids=FOLDERS)
def test_mistakes_in_folders_are_found_before_anything_is_generated(generate, tmp_path, images, options, message):
    (tmp_path / "pairs").mkdir()
    refused(message, generate, "--indir", folder(tmp_path / "pairs", **images), *options)
    assert not list(tmp_path.glob("out/*"))


def test_damaged_pairs_are_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.load", None)
    indir = folder(tmp_path / "pairs", a=make_image(), a_mask=upper(), b=make_image(), b_mask=upper(16, 32))
    refused("b_mask.png is 16 x 32 pixels", inpaint.main, ["--indir", str(indir), "--outdir", str(tmp_path / "out")])
    (indir / "b.png").write_bytes((indir / "b.png").read_bytes()[:-300])
    with pytest.raises(ValueError, match="b.png cannot be read as an image"):
        inpaint.main(["--indir", str(indir), "--outdir", str(tmp_path / "out")])


def test_a_folder_is_not_written_into_itself(generate, tmp_path):
    indir = folder(tmp_path / "out", a=make_image(), a_mask=upper())
    refused("out is --indir, where the images would be replaced", generate, "--indir", indir)
    assert np.array_equal(pixels(indir / "a.png"), np.asarray(make_image()))
    with pytest.raises(FileNotFoundError):
        generate("--indir", tmp_path / "missing")


@pytest.mark.parametrize(("concat", "channels"), [("mask_latents", 9), ("latents_mask", 9), ("latents", 8)])
def test_models_trained_to_inpaint(tmp_path, pair, concat, channels):
    config = copy.deepcopy(TINY) | {"concat": concat}
    config["unet_config"]["params"]["in_channels"] = channels
    torch.manual_seed(0)
    ldm.save(randomised(ldm.LatentDiffusion(**config)), tmp_path / "inpainting.safetensors")
    out = runner(inpaint, tmp_path / "inpainting.safetensors", tmp_path)(*pair)
    result = pixels(samples(out)[0])
    assert np.array_equal(result[16:], np.asarray(make_image())[16:]) and not np.array_equal(
        result, np.asarray(make_image())
    )


def test_mistakes(generate, pair, tmp_path):
    for part in ([], pair[:2], pair[2:]):
        refused("needs --init-img FILE and --mask FILE", generate, *part)
    small = saved(tmp_path / "small.png", upper(16, 16))
    with pytest.raises(ValueError, match="the mask .*small.png is 16 x 16 pixels and the image .*five.png 32 x 32"):
        generate(*pair[:2], "--mask", small)
    (tmp_path / "notes.png").write_text("notes")
    refused("notes.png is not an image", generate, *pair[:2], "--mask", tmp_path / "notes.png")
