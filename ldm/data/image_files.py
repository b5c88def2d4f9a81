"""Reads an image file as people see it: turned as the camera says, transparency over white, 16 bits kept in range."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """The image in mode "RGB" (channels 3) or "L" (channels 1), 8 bits, any size.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled by 1/257, palettes and CMYK
    are resolved, of an animation the first frame is taken. Raises FileNotFoundError when there is no such file, and
    ValueError naming it when it is no image, damaged, or of a kind whose range is unknown (32-bit, float).
    """
    with _open(path) as opened:
        opened.load()
        # The orientation first: a conversion may drop the metadata that tells it.
        image = over(_to_eight_bits(ImageOps.exif_transpose(opened)), "white")
        return image.convert("RGB" if channels == 3 else "L")


def open_image(path: Path) -> Image.Image:
    """The image as `upright` gives it. Raises as read_image does."""
    with _open(path) as opened:
        opened.load()
        return upright(opened)


def upright(image: Image.Image) -> Image.Image:
    """The image as read_image gives it, but in mode "L", "RGB" or, where there is transparency, "RGBA".

    Raises ValueError for pixels whose range is unknown, or a mode without a way to RGB.
    """
    image = _to_eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        return image.convert("RGBA")
    result = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if image.mode == "CMYK":
        result.info.pop("icc_profile", None)  # it describes ink
    return result


def check_image(path: Path) -> None:
    """Raises what read_image would for a file that does not begin like an image, without decoding it."""
    with _open(path):
        pass


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """Image.open, with the name of the file in every complaint."""
    try:
        with warnings.catch_warnings():
            # Pillow warns above 89 million pixels and refuses above twice as many: only the refusal is news.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                yield opened
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read.") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        # Pillow reports damage as any of these: SyntaxError for a broken PNG chunk, ValueError for a broken header ...
        raise ValueError(f"{path} cannot be read as an image: {str(error).rstrip('.')}.") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits -> mode "L"; Pillow's own conversion would clip everything above 255 to white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels (mode {image.mode}) are of unknown range, save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def over(image: Image.Image, colour: str) -> Image.Image:
    """The image laid over that colour, where it has transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
