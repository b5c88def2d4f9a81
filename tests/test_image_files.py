"""One image file as a network sees it: channels, alpha, bits and colour profiles."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import refused
from PIL import Image, ImageCms

from ldm.data.finding import find_images
from ldm.data.image_files import Reader, examine_image, open_image
from ldm.data.image_formats import READ

# Of Display P3, adapted to D50: https://www.color.org/chardata/rgb/DisplayP3.xalter
P3_XYZ = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]
# XYZ of D50 -> linear sRGB: http://www.brucelindbloom.com/index.html?Eqn_RGB_XYZ_Matrix.html (Bradford)
XYZ_SRGB = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]


def profile(space: bytes, curve: bytes, colorants: list[list[float]] | None = None) -> bytes:
    """Return an ICC profile, version 4 (ICC.1:2010), by three colorants or, for grey, a curve alone."""

    def fixed(values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = b"mluc" + struct.pack(">7I", 0, 1, 12, 0x656E5553, 4, 28, 0)[:24] + "ab".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": b"XYZ \0\0\0\0" + fixed([0.9642, 1, 0.8249])}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for name, xyz in zip("rgb", colorants, strict=True):
            tags |= {f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(xyz), f"{name}TRC".encode(): curve}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s4s24s", start + len(body), b"\0" * 4, 0x04300000, b"mntr", space, b"XYZ ",
                       b"\0" * 12, b"acsp", b"\0" * 4, b"\0" * 24)  # fmt: skip
    head += fixed([0.9642, 1, 0.8249])
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def gamma(value: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">2H", 0, 0) + struct.pack(">i", round(value * 65536))


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">2H", 3, 0) + struct.pack(
    ">5i", *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)  # fmt: skip
P3 = profile(b"RGB ", SRGB_CURVE, P3_XYZ)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB -> 8 bits, IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_display_p3_becomes_srgb():
    """By the closed form: decode, to XYZ, to linear sRGB, clip, encode; littlecms rounds to a level."""
    values = COLOURS / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    expected = encoded(linear @ np.array(P3_XYZ) @ np.array(XYZ_SRGB).T)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        seen = np.asarray(Reader()(file_of(Image.fromarray(COLOURS), kind, icc_profile=P3, **options)))
        assert np.abs(seen - expected).max() < 1.6 and np.abs(seen - COLOURS.astype(int)).max() > 30, kind
    clear = Image.fromarray(np.concatenate([COLOURS, COLOURS[..., :1]], 2))
    kept = np.asarray(Reader(4)(file_of(clear, icc_profile=P3)))
    assert np.array_equal(kept[..., 3], COLOURS[..., 0]) and np.abs(kept[..., :3] - expected).max() < 1.6


def test_grey_and_cmyk_profiles():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    linear = profile(b"GRAY", gamma(1.0))
    for wide in (ramp, ramp.astype(np.uint16) * 257):
        seen = Reader(1)(file_of(Image.fromarray(wide), icc_profile=linear))
        assert seen.mode == "L" and np.abs(np.asarray(seen) - encoded(ramp / 255)).max() < 1.6
    # grey files often hold the profile of the colours that they were made of
    seen = np.asarray(Reader(1)(file_of(Image.fromarray(ramp), icc_profile=profile(b"RGB ", gamma(1.0), P3_XYZ))))
    assert np.abs(seen - encoded(ramp / 255)).max() < 1.6


def test_srgb_profiles_change_nothing_and_broken_ones_are_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "L"):
        image = Image.fromarray(COLOURS).convert(mode)
        assert Reader(len(mode))(file_of(image, icc_profile=srgb)).tobytes() == image.tobytes()
    for broken in (P3[:100], b"not a profile", profile(b"GRAY", gamma(2.2)), P3[:300]):
        seen = file_of(Image.fromarray(COLOURS), icc_profile=broken)
        assert np.array_equal(np.asarray(Reader()(seen)), COLOURS)
        assert examine_image(seen) == ((16, 16), examine_image(seen)[1]) and "profile" in examine_image(seen)[1]


def test_a_broken_profile_of_an_init_image_warns(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(Image.fromarray(COLOURS), icc_profile=b"?"))
    with pytest.warns(UserWarning, match="a.png: ignored its colour profile"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_and_background(channels):
    """Half transparent red: composited over blue, or kept with alpha."""
    image = file_of(Image.new("RGBA", (2, 1), (255, 0, 0, 128)))
    expected = {1: (53,), 2: (76, 128), 3: (128, 0, 127), 4: (255, 0, 0, 128)}[channels]
    keeps = channels in (2, 4)
    read = Reader(channels, "keep" if keeps else "composite", "white" if keeps else "#0000ff")
    assert np.asarray(read(image))[0, 0].ravel().tolist() == list(expected)
    opaque = np.asarray(Reader(channels)(file_of(Image.fromarray(COLOURS))))
    assert opaque.reshape(16, 16, -1).shape[2] == channels and (not keeps or (opaque[..., -1] == 255).all())


def test_sixteen_bit_colour_gives_the_upper_eight():
    """PNG and TIFF; Pillow writes neither, so the bytes are made here."""
    values = (COLOURS.astype(">u2") << 8) + 255 - COLOURS
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    chunks = {b"IHDR": struct.pack(">2I5B", 16, 16, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
    assert np.array_equal(np.asarray(Reader()(png)), COLOURS)
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140),
            (277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, 16 * 16 * 6)]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHIHH" if kind == 3 and n == 1 else "<HHII", tag, kind, n, value,
                                 *((0,) if kind == 3 and n == 1 else ())) for tag, kind, n, value in tags)  # fmt: skip
    tiff = (head + b"\0" * 4).ljust(134, b"\0") + struct.pack("<3H", 16, 16, 16) + values.astype("<u2").tobytes()
    assert np.array_equal(np.asarray(Reader()(tiff)), COLOURS)


def test_heic_names_its_package(monkeypatch):
    monkeypatch.delitem(READ, "HEIF")  # as where it is not installed
    heic = struct.pack(">I", 24) + b"ftypheic" + b"\0" * 4 + b"mif1heic" + b"\0" * 100
    message = "a.heic is HEIC, which pillow-heif reads: python -m pip install pillow-heif"
    refused(message, Reader(), heic, "a.heic")


def test_heic_is_read_as_other_formats(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    turned, exif = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (48, 1))).convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.HEIC", quality=95, exif=exif.tobytes())
    (path,) = find_images(tmp_path)
    seen, expected = (np.asarray(image).astype(int) for image in (Reader()(path), turned.transpose(Image.ROTATE_270)))
    assert examine_image(path) == ((48, 64), "") and np.abs(seen - expected).max() < 8


def test_folders_links_and_what_is_hidden(tmp_path):
    inside, outside = tmp_path / "images", tmp_path / "elsewhere"
    for path in (inside / "b/c.PNG", outside / "d.jfif", inside / ".git/x.png", inside / "._b.png",
                 inside / "__MACOSX/b.png", inside / "note.eps", inside / "dir.png/e.tga"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (inside / "a").symlink_to(outside)
    found = [path.relative_to(inside).as_posix() for path in find_images(inside)]
    assert found == ["a/d.jfif", "b/c.PNG", "dir.png/e.tga"]
    (outside / "back").symlink_to(inside)
    refused("back is a link to .*images, which it lies in", find_images, inside)
