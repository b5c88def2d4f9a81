"""Read image files as viewers show them: EXIF orientation applied, transparency over white, 16 bits scaled to 8."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.images import READ, check_image_file, open_pillow

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})

# What Pillow reports damage as: SyntaxError for a broken PNG chunk, RuntimeError for a broken AVIF ...
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)


def read_image(source: Path | bytes, channels: int = 3, name: str = "an image") -> Image.Image:
    """Read an image in mode "RGB" (channels 3) or "L" (channels 1), 8 bits, of any size.

    It is a file, or the bytes of one that errors call `name`.
    EXIF orientation is applied, transparency is composited over white, 16-bit grey is scaled by 1/257, palettes and
    CMYK are converted, and an animation gives its first frame. Raises FileNotFoundError if there is no such file, and
    ValueError if it is not an image, damaged, or of unknown range (32-bit, float).
    """
    with _open(source, name) as opened:
        # The orientation first: a conversion may drop its metadata.
        image = over(_to_eight_bits(_turned(opened)), "white")
        return image.convert("RGB" if channels == 3 else "L")


def open_image(path: Path) -> Image.Image:
    """Read an image and apply `upright`; errors as in `read_image`."""
    with _open(path) as opened:
        return upright(opened)


def upright(image: Image.Image) -> Image.Image:
    """Return the image as `read_image` does, but in mode "L", "RGB" or, if it has transparency, "RGBA"."""
    image = _to_eight_bits(_turned(image))
    if image.has_transparency_data:
        return image.convert("RGBA")
    result = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if image.mode == "CMYK":
        result.info.pop("icc_profile", None)  # it describes ink
    return result


def _turned(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Damaged EXIF data is left out, as by viewers: the pixels are whole."""
    image.load()  # what raises here is damage of the image
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image


def check_image(path: Path) -> None:
    """Raise as `read_image` does for a file that is not an image, without decoding its pixels."""
    with _open(path):
        pass


@contextmanager
def _open(source: Path | bytes, name: str = "an image") -> Iterator[Image.Image]:
    """Open an image, with the name of the file in every error."""
    if isinstance(source, Path):
        check_image_file(source)
        name = str(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns above 89 million pixels and raises above twice as many; only the error matters.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_pillow(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                yield opened
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of a format that is read: {', '.join(READ)}") from error
    except DAMAGE as error:
        raise ValueError(f"{name} cannot be read as an image: {str(error).rstrip('.')}") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to mode "L"; Pillow's own conversion would clip everything above 255 to white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels (mode {image.mode}) are of unknown range: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def over(image: Image.Image, colour: str) -> Image.Image:
    """Composite the image over that colour, if it has transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
