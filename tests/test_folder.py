"""A folder of images: every format read as people see it, crops that repeat, and every fault named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from tiny_stages import config_of, write_inputs

from ldm.data.folder import Folder
from ldm.data.image_files import open_image, read_image
from ldm.training.loop import train

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def colour(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: tells where a crop lies and how an image is turned."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 99)], 2).round().astype(np.uint8))


def save(folder: Path, name: str, image: Image.Image, caption: str | None = "a caption", **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "tif", "webp", "ppm", "jpg", "jpeg", "PNG", "jfif", "tga", "avif", "jp2"]
)
def test_formats(tmp_path: Path, suffix: str) -> None:
    lossy = suffix in ("jpg", "jpeg", "jfif", "avif")
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if lossy else {}
    save(tmp_path, f"a.{suffix}", colour(16, 16), "a ramp\n", **options)
    sample = Folder(str(tmp_path), 16)[0]
    expected = np.asarray(colour(16, 16)).transpose(2, 0, 1) / 127.5 - 1
    assert sample["caption"] == "a ramp" and sample["image"].dtype == torch.float32
    # Lossless is exact up to float32; JPEG at quality 100 still subsamples colour: a few grey levels.
    np.testing.assert_allclose(sample["image"].numpy(), expected, atol=0.15 if lossy else 1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """A camera's turned image comes out upright, for all eight orientations (Exif 2.3, tag 0x0112)."""
    upright = np.asarray(colour(12, 8))
    turned = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    turned |= {5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2)}
    turned |= {8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    path = save(tmp_path, "a.png", stored, exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), upright)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, [[0, 128, 255, 255]]
    seen = np.asarray(read_image(save(tmp_path, "rgba.png", Image.fromarray(rgba))))
    assert seen[0, :, 0].tolist() == [255, 227, 200, 200]  # 200 a + 255 (1 - a) with a = 0, 128/255, 1
    assert seen[0, :, 1].tolist() == [255, 127, 0, 0]
    grey = Image.fromarray(np.stack([np.full((2, 2), 10), np.full((2, 2), 0)], 2).astype(np.uint8), "LA")
    assert np.asarray(read_image(save(tmp_path, "la.png", grey), 1)).tolist() == [[255, 255]] * 2
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    path = save(tmp_path, "p.png", palette, transparency=1)
    assert np.asarray(read_image(path)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    keyed = save(tmp_path, "key.png", colour(4, 4), transparency=(0, 0, 99))  # RGB with one transparent colour
    assert np.asarray(read_image(keyed))[0, 0].tolist() == [255, 255, 255]


def test_grey_sixteen_bits_and_other_modes(tmp_path: Path) -> None:
    wide = RAMP.astype(np.uint16) * 257
    for name in ("a.png", "a.tif", "a.pgm"):
        path = save(tmp_path, name, Image.fromarray(wide))
        assert np.array_equal(np.asarray(read_image(path, 1)), RAMP), name
        assert np.array_equal(np.asarray(read_image(path, 3)), np.stack([RAMP] * 3, 2)), name
    grey = save(tmp_path, "grey.png", Image.fromarray(RAMP))
    assert np.array_equal(np.asarray(read_image(grey))[..., 1], RAMP)
    binary = save(tmp_path, "bw.png", Image.fromarray(RAMP).convert("1"))
    assert set(np.asarray(read_image(binary, 1)).ravel()) == {0, 255}
    palette = colour(8, 8).quantize(64)
    assert np.array_equal(
        np.asarray(read_image(save(tmp_path, "pal.png", palette))), np.asarray(palette.convert("RGB"))
    )
    cmyk = save(tmp_path, "cmyk.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0)))
    assert np.asarray(read_image(cmyk))[0, 0].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (4, 4), value) for value in ("red", "blue")]
    gif = save(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(gif))[0, 0].tolist() == [255, 0, 0]
    refused(r"float.tif.*mode F", read_image, save(tmp_path, "float.tif", Image.fromarray(np.ones((2, 2), np.float32))))


def test_center_crop_and_resize(tmp_path: Path) -> None:
    save(tmp_path, "wide.png", colour(30, 10))
    exact = Folder(str(tmp_path), 10)[0]["image"]
    expected = np.asarray(colour(30, 10))[:, 10:20].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(exact.numpy(), expected, atol=1e-6)  # no resampling where none is needed
    for size in (5, 40):  # smaller and larger than the image: still the middle third
        image = Folder(str(tmp_path), size)[0]["image"]
        assert image.shape == (3, size, size)
        # A linear ramp stays linear: its mean is the crop's, (10 + 19) / 2 of 29 steps; two levels for rounding.
        assert image[0].mean().item() == pytest.approx(14.5 / 29 * 2 - 1, abs=2 / 127.5)
    assert Folder(str(tmp_path), 5, channels=1)[0]["image"].shape == (1, 5, 5)
    save(tmp_path, "strip.png", Image.new("RGB", (9000, 1)))
    assert Folder(str(tmp_path), 64)[0]["image"].shape == (3, 64, 64)


def test_resize_rules(tmp_path: Path, capsys) -> None:
    save(tmp_path, "wide.png", colour(32, 16))
    expected = np.asarray(colour(32, 16).resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)

    def levels(size: int, **settings) -> np.ndarray:
        return ((Folder(str(tmp_path), size, **settings)[0]["image"] + 1) * 127.5).round().numpy()

    assert np.array_equal(levels(16, resize="exact"), expected)
    whole = np.asarray(colour(32, 16)).transpose(2, 0, 1)
    assert np.array_equal(levels(8, resize="none"), whole[:, 4:12, 12:20])
    assert np.array_equal(levels(8, resize="none", buckets=[[24, 12]]), whole[:, 2:14, 4:28])
    save(tmp_path, "small.png", colour(8, 9))
    refused("small.png is 8 x 9 pixels, too small for 16 x 16 with resize 'none'", levels, 16, resize="none")
    assert len(Folder(str(tmp_path), 16, resize="none", on_error="skip")) == 1
    refused("resize 'shortest' must be 'shorter' or 'exact' or 'none'", levels, 8, resize="shortest")
    refused("'exact' cuts nothing off", levels, 8, resize="exact", crop="random")


def test_large_jpegs_are_decoded_at_a_fraction(tmp_path: Path) -> None:
    """As much as is needed for twice the size: within 2 levels of all of it, which viewers do not see."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise = noise.resize((1200, 900), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, "a.jpg", noise, quality=95, exif=exif)
    data = Folder(str(tmp_path), 64, buckets=[[48, 64], [64, 48]])
    for bad in ([[48.5, 64]], ["ab"], [[48]]):
        refused("buckets .*a list of 2 entries, each an integer from 1", Folder, str(tmp_path), 64, buckets=bad)
    read = data.read(data.paths[0], least=data.transform.least(data.shapes[0]))
    assert data.groups == [(48, 64)] and read.size == (225, 300)  # a quarter: an eighth has a side below 2 * 64
    seen = data[0]["image"]
    whole = data.transform(data.read(data.paths[0]), 0, 0)
    assert ((seen - whole) * 127.5).abs().mean() < 2


def test_random_crop_and_flip_are_functions_of_seed_epoch_index(tmp_path: Path) -> None:
    for n in range(4):
        save(tmp_path, f"{n}.png", colour(64, 16))

    def lefts(epoch: int, seed: int = 0, flip: bool = False) -> list[tuple[float, float]]:
        data = Folder(str(tmp_path), 16, crop="random", flip=flip, seed=seed)
        data.set_epoch(epoch)
        samples = data.__getitems__([3, 0, 2, 1])
        assert data.augments
        return [(s["image"][0, 0, 0].item(), s["image"][0, 0, -1].item()) for s in samples]

    assert lefts(1) == lefts(1) and lefts(1) != lefts(2) and lefts(1) != lefts(1, seed=1)
    seen = [pair for epoch in range(40) for pair in lefts(epoch, flip=True)]
    positions = {min(pair) for pair in seen}
    assert min(positions) < -0.9 and max(positions) > 0.4 and len(positions) > 30  # all of the 49 places, end to end
    mirrored = sum(left > right for left, right in seen) / len(seen)
    assert mirrored == pytest.approx(0.5, abs=0.15)  # 160 draws: standard error 0.04
    fixed = Folder(str(tmp_path), 16)
    before = fixed[0]["image"]
    fixed.set_epoch(9)
    assert not fixed.augments and fixed[0]["image"].equal(before)
    assert before[0, 0, 0] < before[0, 0, -1]  # never mirrored unless asked


def test_metadata_and_sidecars(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.png", "c.png"):
        save(tmp_path, name, colour(8, 8), None)
    save(tmp_path, ".cache/x.png", colour(8, 8), None)
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "c.txt").write_bytes("\ufeffdrawn é\n".encode())
    rows = [{"file_name": "sub/a.png", "text": "in sub"}, {"file_name": "b.png", "text": " top ", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    data = Folder(str(tmp_path), 8)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in data.paths] == ["b.png", "c.png", "sub/a.png"]
    assert data.captions == [["top"], ["drawn é"], ["in sub"]]
    assert data.caption_of(1).text == "drawn é" and data.caption_of(1).digit is None
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert batch["image"].shape == (3, 3, 8, 8) and batch["caption"] == ["top", "drawn é", "in sub"]
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", "line 2"),
        ('{"file_name": "a.png"}', "line 2.*not of the form"),
        ('["a.png", "text"]', "line 2"),
        ('{"file_name": "../a.png", "text": "x"}', "line 2.*no image '../a.png'"),
        ('{"file_name": "gone.png", "text": "x"}', "line 2.*no image 'gone.png'"),
        ('{"file_name": "a.png", "text": null}', "line 2.*None"),
    ],
)
def test_bad_metadata(tmp_path: Path, line: str, match: str) -> None:
    save(tmp_path, "a.png", colour(8, 8), None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    refused(match, Folder, str(tmp_path), 8)


def test_faults_are_named(tmp_path: Path) -> None:
    refused("gone is not a folder", Folder, str(tmp_path / "gone"), 8, error=FileNotFoundError)
    refused("holds no images", Folder, str(tmp_path), 8, error=FileNotFoundError)
    bare = save(tmp_path, "bare.png", colour(8, 8), None)
    refused("none of the 1 images in .* has a caption: write bare.txt", Folder, str(tmp_path), 8)
    (tmp_path / "bare.txt").write_text("\ufeff\n")
    refused("the caption of .*bare.txt is empty", Folder, str(tmp_path), 8)
    assert Folder(str(tmp_path), 8, caption="").texts() == [""]  # asked for
    bare.unlink()
    save(tmp_path, "a.png", colour(8, 8))
    for settings in (
        *({"size": 0}, {"size": -8}, {"size": 8.5}, {"size": 8193}, {"channels": 5}, {"crop": "centre"}),
        *({"buckets": [[8, 8193]]}, {"buckets": []}, {"buckets": [[8, 8]] * 1025}, {"reads": "image"}),
        *({"on_error": "ignore"}, {"alpha": "keep"}, {"background": "ivry"}),
    ):
        refused(next(iter(settings)), Folder, str(tmp_path), **{"size": 8} | settings)
    refused("alpha 'composite' is for channels 1", Folder, str(tmp_path), 8, channels=4, alpha="composite")
    refused("background 'red' needs channels 1 or 3", Folder, str(tmp_path), 8, channels=2, background="red")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    refused("a.txt is not UTF-8", Folder, str(tmp_path), 8)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_foreign_file_is_found_at_once(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, "a.png", colour(8, 8))
    path = save(tmp_path, "broken.png", colour(8, 8))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.png (is not an image|cannot be read as an image)") as caught:
        Folder(str(tmp_path), 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "tga", "avif", "jp2"])
def test_images_that_cannot_be_used_are_all_named_before_training(tmp_path: Path, suffix: str, capsys) -> None:
    """Damaged after the header, of unknown range, a link to nothing: counted and listed, refused or left out."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path, f"broken.{suffix}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (tmp_path / "link.png").symlink_to("nothing.png")
    (tmp_path / "link.txt").write_text("a caption")
    save(tmp_path, "nan.tif", Image.fromarray(np.full((8, 8), np.nan, np.float32)))
    save(tmp_path, "wide.png", colour(32, 16))
    match = rf"3 of 4 images cannot be used: .*broken.{suffix} (cannot|is not).*link.png is a link.*nan.tif.*finite"
    refused(match, Folder, str(tmp_path), 8)
    data = Folder(str(tmp_path), 8, on_error="skip", buckets=[[16, 8], [8, 8]])
    assert [Path(path).name for path in data.paths] == ["wide.png"] and data.groups == [(16, 8)] and data.captions
    assert "note: 3 of 4 images are left out: " in capsys.readouterr().err
    (tmp_path / "wide.png").unlink()
    refused("none of 3 images can be used", Folder, str(tmp_path), 8, on_error="skip")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_damaged_exif_data_is_left_out(tmp_path: Path, kind: str) -> None:
    """The pixels are whole, and viewers show them; of a truncated image they are not."""
    image, path = Image.effect_noise((32, 32), 90).convert("RGB"), tmp_path / f"a.{kind}"
    image.save(path, lossless=True, exif=b"Exif\0\0no TIFF")
    assert read_image(path).tobytes() == open_image(path).tobytes() == image.tobytes()
    path.write_bytes(path.read_bytes()[:-600])
    refused(f"a.{kind} cannot be read as an image", read_image, path)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "large.png", colour(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused("large.png", read_image, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert read_image(path).size == (64, 64)


def test_texts_are_the_captions_and_a_folder_must_be_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save(tmp_path, f"{name}.png", colour(8, 8), f"image {name}")
    data = Folder(str(tmp_path), 8)
    assert data.texts() == ["image a", "image b"]
    refused("data.params.root=DIR", Folder, None, 8)


def test_a_run_lists_all_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Notes name three images; the file in the run folder has every image and caption file that is not used."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        (tmp_path / f"faulty/x{i:02}.png").touch()
    (tmp_path / "faulty/notes.txt").touch()
    config = config_of("folder")
    config["data"]["params"] |= {"root": "faulty", "on_error": "skip"}
    train(config, device="cpu")
    path, said = Path("out/folder/left_out.txt"), capsys.readouterr().err
    lines = path.read_text().splitlines()
    assert len(lines) == 26 and all(f"x{i:02}.png" in lines[i + 1] for i in range(24))
    assert "damaged.png" in lines[0] and lines[25] == "faulty/notes.txt has no image"
    assert "note: 25 of 29 images are left out: " in said and said.count("x00.png") == 1 and "x02.png" not in said
    assert f"note: {path} lists all that is left out" in said
    for name in lines[:25]:
        Path(name.split(" ")[0]).unlink()
    Path("faulty/notes.txt").unlink()
    config["loop"]["steps"] = 3
    train(config, device="cpu", resume=True)
    assert not path.exists()
