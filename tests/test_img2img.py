"""img2img: levels by --strength, sizes, files of all kinds, what each PNG says, making it again; mistakes."""

from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image
from script_runs import check_reproduced, load_script, names, pixels, recipe, runner, samples, saved

import ldm
from ldm.inference.again import read_image_text
from ldm.inference.recipe import save_image

img2img = load_script("img2img")


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    return runner(img2img, tiny_checkpoint, tmp_path)


@pytest.fixture
def five(tmp_path) -> Path:
    """An image file, 32 x 32, grey."""
    return saved(tmp_path / "five.png", make_image())


def make_image(width=32, height=32, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_one_image_and_its_grid_at_the_default_strength(generate, five, tiny_model):
    out = generate("--init-img", five, steps=None)
    assert names(out) == ["grid-0000.png", "samples"] and names(out / "samples") == ["00000.png"]
    made = recipe(samples(out)[0])
    assert (made.prompt, made.strength, made.steps) == ("", 0.75, tiny_model.defaults["steps"])
    assert (made.width, made.height) == Image.open(samples(out)[0]).size == (32, 32)
    assert len(made.init_hash) == 10 and int(made.init_hash, 16) >= 0 and made.mask_hash == ""
    assert "Denoising strength: 0.75, Init image hash: " in read_image_text(samples(out)[0])


def test_the_image_is_that_of_the_library(generate, five, tiny_checkpoint):
    out = generate("--init-img", five, "--prompt", "a seven", "--strength", 0.4, "--seed", 5, "--scale", 3, steps=5)
    settings = {"image": Image.open(five), "strength": 0.4, "steps": 5, "seed": 5, "scale": 3.0}
    (image,) = ldm.load(tiny_checkpoint, device="cpu").generate(["a seven"], **settings)
    assert np.array_equal(pixels(samples(out)[0]), np.asarray(image))


def test_counts_and_seeds_are_as_in_txt2img(generate, five, tmp_path):
    (tmp_path / "prompts.txt").write_text("a one\na two\n")
    out = generate("--init-img", five, "--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--seed", 7)
    assert [(r.prompt, r.seed) for r in map(recipe, samples(out))] == [
        ("a one", 7),
        ("a one", 8),
        ("a two", 9),
        ("a two", 10),
    ]
    assert len({pixels(path).tobytes() for path in samples(out)}) == 4
    assert read_image_text(out / "grid-0000.png").endswith("Grid: 2x2")


def test_compvis_flags_and_the_default_folder(five):
    compvis = (
        "--prompt x --init-img y --outdir z --skip_grid --skip_save --ddim_steps 50 --plms --fixed_code --ddim_eta 0.0 "
        "--n_iter 1 --C 4 --f 8 --n_samples 2 --n_rows 0 --scale 5.0 --strength 0.75 --config c --ckpt k --seed 42 "
        "--precision autocast"
    )
    args = img2img.parse(compvis.split())
    assert (args.init_img, args.strength, args.sampler, args.steps) == (Path("y"), 0.75, "plms", 50)
    assert img2img.parse(["--from-file", "p", "--init_img", "y"]).outdir == Path("outputs/img2img-samples")


VARIETY = {
    "plain": [],
    "batch": ["--n_samples", 5, "--batch-size", 3, "--seed", 11],
    "ddpm": ["--n_samples", 2, "--sampler", "ddpm", "--strength", 0.5, "--negative-prompt", "a: b, c"],
    "fixed": ["--n_samples", 3, "--batch-size", 2, "--fixed_code", "--strength", 1],
    "nothing": ["--strength", 0],
    "resized": ["--W", 48, "--H", 20],
    "wide": ["--W", 64],
}


@pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY)
def test_every_image_can_be_made_again_to_the_byte(generate, five, options):
    check_reproduced(generate, samples(generate("--init-img", five, *options)), "--init-img", five)


def test_made_again_with_a_change_from_the_same_pixels_in_another_file(generate, five, tmp_path):
    other = saved(tmp_path / "five.bmp", make_image())
    (path,) = samples(generate("--init-img", five, "--prompt", "a one", "--W", 40))
    out = generate("--from-png", path, "--init-img", other, "--strength", 0.2, out="strength", steps=None)
    made = recipe(samples(out)[0])
    assert (made.prompt, made.strength, made.width, made.height) == ("a one", 0.2, 40, 40)
    out = generate("--from-png", path, "--init-img", other, "--resize", out="size", steps=None)
    assert (recipe(samples(out)[0]).width, recipe(samples(out)[0]).strength) == (32, 0.75)


def test_making_again_needs_the_same_image(generate, five, tmp_path, tiny_checkpoint):
    (path,) = samples(generate("--init-img", five))
    with pytest.raises(ValueError, match="00000.png was made from an init image with hash .* by --init-img"):
        generate("--from-png", path, "--init-img", saved(tmp_path / "other.png", make_image(seed=1)))
    refused("needs an init image", generate, "--from-png", path)
    txt2img = runner(load_script("txt2img"), tiny_checkpoint, tmp_path)
    refused("00000.png was made from an init image.* use the command img2img", txt2img, "--from-png", path)
    (plain,) = samples(txt2img(out="text"))
    with pytest.raises(ValueError, match="00000.png was made from text alone: use the command txt2img"):
        generate("--from-png", plain, "--init-img", five)


def test_an_image_of_another_program_says_no_hash(generate, five, tmp_path):
    text = (
        "a five\nSteps: 4, Sampler: ddim, CFG scale: 2.0, Seed: 3, Size: 32x32, Denoising strength: 0.5, Version: v1.9"
    )
    save_image(make_image(), tmp_path / "foreign.png", text)
    out = generate("--from-png", tmp_path / "foreign.png", "--init-img", five, steps=None)
    made = recipe(samples(out)[0])
    assert (made.strength, made.seed) == (0.5, 3) and made.init_hash != ""


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((28, 28), [], (28, 28)),
        ((45, 31), [], (45, 31)),
        ((500, 400), ["--resize"], (40, 32)),
        ((16, 8), ["--resize"], (64, 32)),
        ((500, 400), ["--W", 40, "--H", 40], (40, 40)),
        ((500, 400), ["--W", 50], (50, 40)),
        ((400, 500), ["--H", 50], (40, 50)),
    ],
)
def test_sizes(generate, tmp_path, size, options, expected):
    out = generate("--init-img", saved(tmp_path / "a.png", make_image(*size)), *options)
    made = recipe(samples(out)[0])
    assert Image.open(samples(out)[0]).size == (made.width, made.height) == expected


def test_strength_means_nothing_in_one_step(generate, five, capsys):
    note = (
        "note: 1 step is all of the steps at strength {}, too, so almost nothing of the init image is kept: give more"
    )
    for given, steps, expected in (
        ([], 1, "0.75"),
        (["--strength", 0.1], 1, "0.1"),
        ([], 2, ""),
        (["--strength", 1], 1, ""),
    ):
        made = samples(generate("--init-img", five, *given, steps=steps))
        found = capsys.readouterr().err
        assert made and (note.format(expected) in found if expected else "note" not in found)


@pytest.mark.parametrize("size", [(500, 400), (129, 32), (32, 7), (4000, 3000)])
def test_sizes_far_from_the_models_are_refused(generate, tmp_path, size):
    with pytest.raises(ValueError, match=f"the image is {size[0]} x {size[1]} pixels and the model's size is 32 x 32"):
        generate("--init-img", saved(tmp_path / "a.png", make_image(*size)))
    assert not list(tmp_path.glob("out/**/*.png"))


def turned_jpeg(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(path, make_image(32, 48), exif=exif, quality=95)


FILES = {
    "jpeg": (lambda p: saved(p / "a.jpg", make_image(), quality=95), (32, 32)),
    "turned by the camera": (lambda p: turned_jpeg(p / "a.jpg"), (48, 32)),
    "webp": (lambda p: saved(p / "a.webp", make_image(), lossless=True), (32, 32)),
    "palette": (lambda p: saved(p / "a.png", make_image().convert("RGB").quantize(256)), (32, 32)),
    "rgba": (lambda p: saved(p / "a.png", make_image().convert("RGBA")), (32, 32)),
    "16 bits": (
        lambda p: saved(p / "a.png", Image.fromarray(np.asarray(make_image()).astype(np.uint16) * 257)),
        (32, 32),
    ),
    "cmyk": (lambda p: saved(p / "a.tif", make_image().convert("CMYK")), (32, 32)),
    "animation": (
        lambda p: saved(
            p / "a.gif", make_image(), save_all=True, append_images=[make_image(seed=1), make_image(seed=2)]
        ),
        (32, 32),
    ),
}


@pytest.mark.parametrize(("make", "size"), FILES.values(), ids=FILES)
def test_files_of_all_kinds(generate, tmp_path, tiny_model, make, size):
    """At strength 0 the first stage shows what was read: the same image in each, but for a lossy file's losses."""
    path = make(tmp_path)
    (made,) = samples(generate("--init-img", path, "--strength", 0))
    original = make_image(32, 48).transpose(Image.Transpose.ROTATE_270) if size == (48, 32) else make_image()
    (expected,) = tiny_model.generate([""], image=original, strength=0)
    assert Image.open(made).size == size
    assert np.abs(pixels(made).astype(int) - np.asarray(expected)).mean() < 3


def test_a_resized_image_is_that_of_the_middle(generate, tmp_path, tiny_model):
    wide = Image.new("L", (96, 32))
    wide.paste(make_image(), (32, 0))
    (made,) = samples(generate("--init-img", saved(tmp_path / "w.png", wide), "--W", 32, "--H", 32, "--strength", 0))
    (expected,) = tiny_model.generate([""], image=make_image(), strength=0)
    assert np.array_equal(pixels(made), np.asarray(expected))


def test_strip_shows_the_steps_that_were_taken(generate, five):
    out = generate("--init-img", five, "--strength", 0.3, "--strip", steps=20)
    assert Image.open(out / "strip-0000.png").width == 6 * (96 + 4) + 8
    assert names(generate("--init-img", five, "--strength", 0, "--strip", out="none")) == ["grid-0000.png", "samples"]


def truncated(path: Path) -> Path:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    data = saved(path, noise).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


DAMAGED = {
    "png": (lambda p: truncated(p / "cut.png"), "cut.png cannot be read as an image: .*truncated"),
    "jpeg": (lambda p: truncated(p / "cut.jpg"), "cut.jpg cannot be read as an image: .*truncated"),
    "empty": (lambda p: written(p / "empty.png", b""), "empty.png is not an image"),
    "text": (lambda p: written(p / "notes.png", b"notes"), "notes.png is not an image"),
    "missing": (lambda p: p / "missing.png", "missing.png"),
    "folder": (lambda p: p, "is a folder, not a file"),
    "floats": (lambda p: saved(p / "f.tif", Image.new("F", (32, 32))), "f.tif .*mode F.* unknown range"),
}


@pytest.mark.parametrize(("make", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_found_before_the_model_is_loaded(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr("ldm.load", None)
    with pytest.raises((ValueError, OSError), match=message):
        img2img.main(["--init-img", str(make(tmp_path)), "--outdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_mistakes(generate, five):
    refused("needs an init image", generate)
    refused("--resize sets the size", generate, "--init-img", five, "--resize", "--W", 32)
    refused("leave out --n_samples", generate, "--init-img", five, "--from-png", five, "--n_samples", 2)


def test_an_image_that_resizing_would_blow_up(generate, tmp_path):
    line = saved(tmp_path / "line.png", Image.new("L", (1, 1_000_000)))
    for options in (["--resize"], ["--W", 32]):
        refused("32 x 32000000 pixels are far too many", generate, "--init-img", line, *options)
