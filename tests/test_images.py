"""Pixels in [-1, 1] -> 8-bit levels -> images -> grids."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from ldm.checkpoint.file import file_hash
from ldm.checkpoint.tensors import read_tensors
from ldm.conditioning.bert import read_vocab
from ldm.data.image_files import read_image
from ldm.data.image_formats import READ, open_pillow
from ldm.images import image_grid, to_pil, to_uint8
from ldm.inference.again import read_image_text
from ldm.input_files import load_yaml
from ldm.labels import GAP, LINE, Row, labelled_rows

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    for name in ("a.png", "a.eps", "a.jpg"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        assert Image.open(tmp_path / name).format == "EPS"  # as Pillow alone would read it
        refused("cannot identify", open_pillow, tmp_path / name, error=UnidentifiedImageError)
        refused(f"{name} is not an image of a format that is read: PNG, JPEG", read_image, tmp_path / name)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    refused("not an image", read_image, tmp_path / "a.pdf")
    assert started == [] and not {"EPS", "PDF", "PSD", "MPEG", "WMF"} & READ.keys()


@pytest.mark.skipif(os.name != "posix", reason="pipes with names, and sparse files")
def test_pipes_and_files_without_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse.jpg").write_bytes(b"\xff\xd8\xff")  # Pillow would look for a marker in it, byte by byte
    os.truncate(tmp_path / "sparse.jpg", 1 << 34)
    for reads in (read_image, read_image_text):
        refused("is a device or a pipe, not a file", reads, tmp_path / "pipe")
        refused("more than 1024 MiB", reads, tmp_path / "sparse.jpg")
    for reads in (read_tensors, file_hash, load_yaml, read_vocab):
        refused("is a device or a pipe, not a file", reads, tmp_path / "pipe")
        refused("is a device or a pipe, not a file", reads, Path("/dev/zero"))


def test_every_format_is_read(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    Image.init()
    for name in READ.keys() & Image.SAVE.keys():
        image.save(tmp_path / "a.png", format=name)  # the content counts
        assert open_pillow(tmp_path / "a.png").format == name
        assert read_image(tmp_path / "a.png").size == (8, 8)
    assert READ.keys() - Image.SAVE.keys() <= {"AVIF", "JPEG2000", "HEIF"}


def test_levels_round_to_the_nearest_and_clip():
    # level n stands for n / 127.5 - 1: all 256 come back, and half a level either way is the limit
    levels = torch.arange(256)
    exact = levels.double() / 127.5 - 1
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    assert torch.equal(to_uint8((exact + 0.49 / 127.5).clamp(max=1)), levels.to(torch.uint8))
    assert torch.equal(to_uint8((exact - 0.49 / 127.5).clamp(min=-1)), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, -1.0, 1.0, 7.0, float("inf"), -float("inf")])).tolist() == [
        0,
        0,
        255,
        255,
        255,
        0,
    ]
    for dtype in (torch.float16, torch.bfloat16):
        assert to_uint8(torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)).tolist() == [0, 128, 255]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 3, 4, 5)


def test_images_are_grey_or_rgb():
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    colour, grey = to_pil(pixels), to_pil(pixels[:, :1])
    assert [(p.mode, p.size) for p in colour] == [("RGB", (5, 4))] * 2  # PIL's size is (width, height)
    assert [(p.mode, p.size) for p in grey] == [("L", (5, 4))] * 2
    assert np.array_equal(np.asarray(colour[1]), to_uint8(pixels)[1].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(grey[0]), to_uint8(pixels)[0, 0].numpy())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grid(mode):
    colours = [10, 60, 110, 160, 210]
    images = [Image.new(mode, (4, 3), c if mode == "L" else (c, 0, c)) for c in colours]
    grid = image_grid(images, columns=3, gap=2)
    assert grid.mode == mode and grid.size == (3 * 4 + 2 * 2, 2 * 3 + 2)
    pixels = np.asarray(grid)
    pixels = pixels if mode == "L" else pixels[:, :, 0]
    for i, c in enumerate(colours):
        top, left = i // 3 * 5, i % 3 * 6
        assert (pixels[top : top + 3, left : left + 4] == c).all()
    assert (pixels[3:5] == 128).all() and (pixels[:, 4:6] == 128).all() and (pixels[5:, 12:] == 128).all()


def test_grid_is_no_wider_than_its_images_and_never_empty():
    assert image_grid([Image.new("L", (4, 3))], columns=8).size == (4, 3)
    refused("at least one image", image_grid, [], columns=2)


@pytest.mark.parametrize(
    ("count", "columns", "side", "size"),
    [
        (1, 1, 32, (256, 256)),
        (8, 4, 32, (4 * 128 + 6, 2 * 128 + 2)),
        (100, 100, 32, (3200 + 198, 32)),  # is wide enough
        (1, 1, 200, (400, 400)),
        (1, 1, 256, (256, 256)),
    ],
)
def test_small_grids_are_enlarged(count, columns, side, size):
    images = [Image.effect_noise((side, side), 50)] * count
    grid = image_grid(images, columns, factor=None)
    assert grid.size == size
    factor = size[1] // side if count == 1 else 1
    assert count > 1 or np.array_equal(np.asarray(grid)[::factor, ::factor], np.asarray(images[0]))


def test_labels_and_captions_do_not_meet_the_images_or_each_other():
    black = Image.new("L", (32, 32))
    rows = [Row("a long label of several words that is wider than the images", [black, black], ["step 20", "b\nc"])]
    sheet = np.asarray(labelled_rows([*rows, Row("", [black] * 3)], side=40))
    dark = (sheet < 200).any(2)
    assert sheet.shape[0] == 3 * LINE + 64 + GAP + LINE + 64 + 2 * GAP  # enlarged twice
    for top in (3 * LINE, 3 * LINE + 64 + GAP + LINE):
        assert dark[top : top + 64, GAP : GAP + 64].all() and not dark[top + 64 : top + 64 + GAP].any()
    ink = np.flatnonzero(dark[:LINE].any(0))
    assert ink.max() < sheet.shape[1] - GAP
    gaps = np.diff(ink)
    assert (gaps > 4).sum() == 11  # between twelve words


def test_captions_wider_than_their_images_move_these_apart():
    dot, captions = Image.new("L", (8, 8)), ["sigma 0.00012", "sigma 0.00034"]
    sheet = np.asarray(labelled_rows([Row("", [dot, dot], captions)], factor=1))
    assert len(np.flatnonzero((sheet[2 * LINE + 3] < 200).any(1))) == 16
    text = (sheet[LINE : 2 * LINE] < 200).any((0, 2))
    assert np.diff(np.flatnonzero(text)).max() >= GAP
