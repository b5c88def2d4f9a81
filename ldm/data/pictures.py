"""Reads a picture file as people see it: turned as the camera says, transparency over white, 16 bits kept in range."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def read_picture(path: Path, channels: int = 3) -> Image.Image:
    """The picture in mode "RGB" (channels 3) or "L" (channels 1), 8 bits, any size.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled by 1/257, palettes and CMYK
    are resolved, of an animation the first frame is taken. Raises FileNotFoundError when there is no such file, and
    ValueError naming it when it is no picture, damaged, or of a kind whose range is unknown (32-bit, float).
    """
    with _open(path) as opened:
        opened.load()
        # The orientation first: a conversion may drop the metadata that tells it.
        picture = over(_to_eight_bits(ImageOps.exif_transpose(opened)), "white")
        return picture.convert("RGB" if channels == 3 else "L")


def open_picture(path: Path) -> Image.Image:
    """The picture as `upright` gives it. Raises as read_picture does."""
    with _open(path) as opened:
        opened.load()
        return upright(opened)


def upright(picture: Image.Image) -> Image.Image:
    """The picture as read_picture gives it, but in mode "L", "RGB" or, where there is transparency, "RGBA".

    Raises ValueError for pixels whose range is unknown, or a mode without a way to RGB.
    """
    picture = _to_eight_bits(ImageOps.exif_transpose(picture))
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    result = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    if picture.mode == "CMYK":
        result.info.pop("icc_profile", None)  # it describes ink
    return result


def check_picture(path: Path) -> None:
    """Raises what read_picture would for a file that does not begin like a picture, without decoding it."""
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
        raise ValueError(f"{path} is no picture that Pillow can read.") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        # Pillow reports damage as any of these: SyntaxError for a broken PNG chunk, ValueError for a broken header ...
        raise ValueError(f"{path} cannot be read as a picture: {str(error).rstrip('.')}.") from error


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits -> mode "L"; Pillow's own conversion would clip everything above 255 to white."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels (mode {picture.mode}) are of unknown range, save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def over(picture: Image.Image, colour: str) -> Image.Image:
    """The picture laid over that colour, where it has transparency."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture)
