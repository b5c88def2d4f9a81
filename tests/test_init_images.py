"""InitImages: what the model sees, what is kept to the byte, sizes that do not divide, modes, mistakes."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.generation import steps_taken
from ldm.init_image import InitImages

RANDOM = np.random.default_rng(0)


def grey(width=32, height=32) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width), dtype=np.uint8))


def colour(width=32, height=32, mode="RGB") -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, len(mode)), dtype=np.uint8))


def array(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def drawn(count=1, channels=1, size=(32, 32)) -> torch.Tensor:
    """What a model may have drawn, beyond [-1, 1] too: (count, channels, h, w)."""
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def levels(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (b, c, h, w) in [-1, 1] as levels 0..255, rounded: (b, h, w, c)."""
    return np.rint((pixels.clamp(-1, 1).numpy().transpose(0, 2, 3, 1).astype(float) + 1) * 127.5).astype(int)


def test_a_strength_takes_whole_steps_rounded_down_but_one_at_least():
    for steps in (10, 20, 50, 100, 1000):
        for hundredths in range(101):  # decimals, exactly: what a user types
            expected = int(Fraction(hundredths, 100) * steps)
            assert steps_taken(hundredths / 100, steps) == (expected if hundredths == 0 else max(expected, 1))
            assert expected - int(hundredths / 100 * steps) in (0, 1)  # CompVis's, less what a float loses
    assert int(0.29 * 100) == 28 and steps_taken(0.29, 100) == 29
    for steps in range(1, 1001):
        assert [steps_taken(k / steps, steps) for k in (0, 1, steps // 3, steps)] == [0, 1, steps // 3, steps]


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), float("inf")])
def test_strengths_that_are_none(strength):
    refused(f"strength must be from 0 to 1, got {strength}", steps_taken, strength, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_images_and_come_back_exactly(channels):
    image = grey() if channels == 1 else colour()
    source = InitImages(image, None, 1, channels, 8)
    assert source.pixels.shape == (1, channels, 32, 32) and source.mask is None
    assert (
        np.abs(source.pixels.numpy() - (array(image).reshape(32, 32, -1).transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-6
    )
    assert np.array_equal(source.finish(source.pixels).permute(0, 2, 3, 1).squeeze().numpy(), np.asarray(image))


@pytest.mark.parametrize(("size", "padded"), [((28, 30), (32, 32)), ((33, 8), (40, 8)), ((40, 64), (40, 64))])
def test_sizes_that_do_not_divide_are_padded_by_their_edge_and_cut_back(size, padded):
    image, mask = grey(*size), grey(*size)
    source = InitImages(image, mask, 1, 1, 8)
    for tensor, original in ((source.pixels * 127.5 + 127.5, array(image)), (source.mask, array(mask) >= 128)):
        expected = np.pad(original, ((0, padded[1] - size[1]), (0, padded[0] - size[0])), mode="edge")
        assert np.allclose(tensor[0, 0].numpy(), expected, atol=1e-4)
    assert source.finish(drawn(size=padded[::-1])).shape == (1, 1, size[1], size[0])


def test_what_is_black_in_the_mask_stays_and_greys_blend():
    image, mask = grey(), Image.fromarray(np.arange(1024, dtype=np.uint32).reshape(32, 32).astype(np.uint8))
    new = drawn()
    result = InitImages(image, mask, 1, 1, 8).finish(new)[0, 0].numpy()
    share = array(mask) / 255
    expected = array(image) * (1 - share) + levels(new)[0, :, :, 0] * share
    assert np.abs(result - expected).max() <= 0.5 + 1e-4  # rounded to the nearest level
    assert np.array_equal(result[array(mask) == 0], np.asarray(image)[array(mask) == 0])
    assert np.array_equal(result[array(mask) == 255], levels(new)[0, :, :, 0][array(mask) == 255])


def alpha_image() -> Image.Image:
    image = array(colour(mode="RGBA"))
    image[:8, :, 3], image[8:16, :, 3] = 0, 255
    return Image.fromarray(image.astype(np.uint8))


def keyed_palette() -> Image.Image:
    palette = colour().quantize(16)
    palette.info["transparency"] = 3
    return palette


def sixteen_bits() -> Image.Image:
    return Image.fromarray((RANDOM.integers(0, 256, (32, 32)) * 257).astype(np.uint16))


MODES = {
    "grey": (grey, "L"),
    "rgb": (colour, "RGB"),
    "rgba": (alpha_image, "RGBA"),
    "grey with alpha": (lambda: alpha_image().convert("LA"), "RGBA"),
    "palette": (lambda: colour().quantize(16), "RGB"),
    "palette with a transparent colour": (keyed_palette, "RGBA"),
    "black and white": (lambda: grey().convert("1"), "L"),
    "cmyk": (lambda: colour().convert("CMYK"), "RGB"),
    "16 bits": (sixteen_bits, "L"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("make", "mode"), MODES.values(), ids=MODES)
def test_unmasked_pixels_keep_colours_and_transparency_to_the_byte(make, mode, channels):
    image, mask = make(), Image.new("L", (32, 32))
    mask.paste(255, (0, 4, 32, 12))
    source = InitImages(image, mask, 1, channels, 8)
    new = drawn(channels=channels)
    result = source.finish(new)[0].permute(1, 2, 0).numpy()
    result_mode = "RGB" if mode == "L" and channels == 3 else mode
    assert result.shape[2] == {"L": 1, "RGB": 3, "RGBA": 4}[result_mode]
    if image.mode.startswith("I"):
        expected = (np.asarray(image)[..., None] // 257).repeat(result.shape[2], 2)
    else:
        expected = np.asarray(image.convert(result_mode)).reshape(32, 32, -1)
    assert np.array_equal(result[:4], expected[:4]) and np.array_equal(result[12:], expected[12:])
    inside = levels(new)[0, 4:12]
    colours = result[4:12, :, : min(result.shape[2], 3)]
    assert np.array_equal(colours, np.broadcast_to(inside, colours.shape))
    assert result.shape[2] < 4 or (result[4:12, :, 3] == 255).all()  # what was drawn is opaque


def test_the_model_sees_transparency_as_white():
    image = alpha_image()
    seen = InitImages(image, None, 1, 3, 8).pixels[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
    share = array(image)[..., 3:] / 255
    # Pillow's blend rounds to a level
    assert np.abs(seen - (array(image)[..., :3] * share + 255 * (1 - share))).max() <= 1
    assert np.allclose(seen[:8], 255)


def test_a_model_of_one_channel_sees_luminance_and_one_of_three_sees_grey():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert np.allclose(InitImages(red, None, 1, 1, 8).pixels.numpy() * 127.5 + 127.5, 76)  # 0.299 of 255 (ITU-R 601)
    half = Image.new("L", (8, 8), 51)
    assert np.allclose(InitImages(half, None, 1, 3, 8).pixels.numpy() * 127.5 + 127.5, 51)


def test_masks_of_any_mode_are_white_where_they_are_bright_and_opaque():
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., :4, :] = 1
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 8, 4))
    for one in (mask, mask.convert("1"), mask.convert("RGB"), mask.convert("P"), clear):
        assert torch.equal(InitImages(grey(8, 8), one, 1, 1, 8).mask, expected)


def test_images_and_masks_are_turned_as_the_camera_says():
    upright = colour(16, 8)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera's top is at the right: turn it clockwise
    turned.info["exif"] = exif.tobytes()
    source = InitImages(turned, turned, 1, 3, 8)
    assert torch.equal(source.pixels, InitImages(upright, None, 1, 3, 8).pixels)
    assert source.mask.shape[-2:] == (8, 16)


def test_one_for_all_or_one_each():
    images, masks = [grey() for _ in range(3)], [grey() for _ in range(3)]
    new = drawn(3)
    each = InitImages(images, masks, 3, 1, 8)
    assert each.pixels.shape[0] == each.mask.shape[0] == 3
    part = each[1:3]
    assert torch.equal(part.pixels, each.pixels[1:3]) and torch.equal(part.mask, each.mask[1:3])
    assert torch.equal(part.finish(new[1:3]), each.finish(new)[1:3])
    one = InitImages(images[0], masks, 3, 1, 8)
    assert len(one.pixels) == 1  # encoded once
    for i in range(3):
        alone = InitImages(images[0], masks[i], 1, 1, 8)
        assert torch.equal(one[i : i + 1].finish(new[i : i + 1]), alone.finish(new[i : i + 1]))
        assert torch.equal(one.finish(new)[i : i + 1], alone.finish(new[i : i + 1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((grey(5, 5), None, 1), "the image is 5 x 5 pixels, too small for this model: its minimum is 8 x 8"),
        ((grey(32, 7), None, 1), "32 x 7 pixels, too small"),
        ((grey(), grey(16, 32), 1), "the mask is 16 x 32 pixels and the image 32 x 32: they must have one size"),
        (([grey(), grey(8, 8)], None, 2), "2 results need one or 2 images of one size, got 2 of sizes"),
        (([grey(), grey()], None, 3), "3 results need one or 3 images of one size, got 2"),
        ((grey(), [grey()] * 2, 3), "3 results need one or 3 masks of one size, got 2"),
        (([], None, 2), "2 results need one or 2 images of one size, got 0"),
        (("five.png", None, 1), "images are PIL images, as PIL.Image.open reads them, got str"),
        ((grey(), np.zeros((32, 32)), 1), "masks are PIL images, as PIL.Image.open reads them, got ndarray"),
        ((Image.new("F", (32, 32)), None, 1), "mode F. are of unknown range"),
    ],
)
def test_mistakes(arguments, message):
    refused(message, InitImages, *arguments, 1, 8)


def test_a_black_mask_is_said():
    with pytest.warns(UserWarning, match="the mask is black .* everywhere"):
        InitImages(grey(), Image.new("L", (32, 32), 127), 1, 1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InitImages(grey(), Image.new("L", (32, 32), 128), 1, 1, 8)
