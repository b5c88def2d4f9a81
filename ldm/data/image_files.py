"""Read image files as viewers show them: upright, in sRGB, transparency over a colour, 16 bits scaled to 8."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ldm.data.buckets import Shape
from ldm.data.image_formats import READ, check_image_file, open_pillow
from ldm.data.profiles import to_srgb

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels
Alpha = Literal["composite", "keep"]

# What Pillow reports damage as: SyntaxError for a broken PNG chunk, RuntimeError for a broken AVIF ...
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Reader:
    """Reads an image with 8 bits a channel, of any size.

    EXIF orientation is applied, an embedded colour profile converted to sRGB, 16-bit grey scaled by 1/257 (of 16-bit
    colour Pillow gives the upper 8), palettes and CMYK are converted, and an animation gives its first frame.

    Args:
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        alpha: "keep" with 2 and 4 channels; "composite" with 1 and 3. None: as the channels say.
        background: The colour that transparency is composited over, as Pillow reads colours: white, "#808080".
    """

    channels: int = 3
    alpha: Alpha | None = None
    background: str = "white"

    def __post_init__(self) -> None:
        if self.channels not in _MODES:
            raise ValueError(f"channels is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA), not {self.channels!r}")
        if self.alpha not in (None, "keep" if self.channels in (2, 4) else "composite"):
            fits = "2 (grey and alpha) or 4 (RGBA)" if self.alpha == "keep" else "1 (grey) or 3 (RGB)"
            raise ValueError(f"alpha {self.alpha!r} is for channels {fits}, not {self.channels}")
        if self.channels in (2, 4) and self.background != "white":
            raise ValueError(
                f"background {self.background!r} needs channels 1 or 3: alpha is kept with {self.channels}"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"background is a colour such as white or '#808080', not {self.background!r}") from None

    def __call__(self, source: Path | bytes, name: str = "an image", least: int | None = None) -> Image.Image:
        """Read a file, or the bytes of one that errors call `name`, in mode "L", "LA", "RGB" or "RGBA".

        A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep `least` pixels.
        Raises FileNotFoundError if there is no such file, and ValueError if it is not an image, damaged, or of unknown
        range (32-bit, float).
        """
        with _open(source, name) as opened:
            if least is not None:
                opened.draft(None, (least, least))
            image = upright(opened)
        if image.mode == "RGBA" and self.channels in (1, 3):
            image = over(image, self.background)
        return image.convert(_MODES[self.channels])


def read_alpha(source: Path | bytes, name: str = "an image") -> Image.Image | None:
    """Read the alpha of an image, mode "L"; None if it has none. Errors as in `Reader`."""
    with _open(source, name) as opened:
        image = upright(opened)
    return image.getchannel("A") if image.mode == "RGBA" else None


def read_image(path: Path, channels: int = 3) -> Image.Image:
    """Read an image in mode "RGB" (channels 3) or "L" (channels 1) as a `Reader` does, over white."""
    return Reader(channels)(path)


def open_image(path: Path) -> Image.Image:
    """Read an image and apply `upright`; errors as in `Reader`."""
    with _open(path) as opened:
        image = upright(opened)
    if ignored := image.info.get("ignored"):
        warnings.warn(f"{path}: ignored {ignored}", stacklevel=2)
    return image


def read_map(path: Path) -> Image.Image:
    """Read a map of classes, the levels of a grey image of 8 bits or its palette's numbers; errors as in `Reader`."""
    with _open(path) as opened:
        opened.load()
        image = opened.copy()
    if image.mode not in ("L", "P"):
        raise ValueError(
            f"{path} is not a map of classes: its pixels (mode {image.mode}) are not numbers of classes, as in a grey "
            "image of 8 bits or one with a palette"
        )
    return Image.fromarray(np.asarray(image))


def examine_image(source: Path | bytes, name: str = "an image") -> tuple[Shape, str]:
    """Decode an image, which finds damage, and return its upright (width, height) and what reading it ignores."""
    with _open(source, name) as opened:
        size = opened.size
        opened.draft(None, (1, 1))  # all of a JPEG's bytes are read for the smallest image too
        image = upright(opened)
        turned = (image.width > image.height) != (size[0] > size[1])
        return size[::-1] if turned else size, image.info.get("ignored", "")


def upright(image: Image.Image) -> Image.Image:
    """Return the image as a `Reader` does, but in mode "L", "RGB" or, if it has transparency, "RGBA"."""
    image = _to_eight_bits(_turned(image))  # the orientation first: a conversion may drop its metadata
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = to_srgb(image)
    return image.convert("RGB") if image.mode == "CMYK" else image


def _turned(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Damaged EXIF data is left out, as by viewers: the pixels are whole."""
    image.load()  # what raises here is damage of the image
    try:
        return ImageOps.exif_transpose(image)
    except DAMAGE:
        return image


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
        if _is_heic(source):
            raise ValueError(f"{name} is HEIC, which pillow-heif reads: python -m pip install pillow-heif") from error
        raise ValueError(f"{name} is not an image of a format that is read: {', '.join(READ)}") from error
    except DAMAGE as error:
        raise ValueError(f"{name} cannot be read as an image: {str(error).rstrip('.')}") from error


def _is_heic(source: Path | bytes) -> bool:
    """Say whether a file is one of HEIC by its major brand (ISO/IEC 23008-12)."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            source = file.read(12)
    return source[4:8] == b"ftyp" and source[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to mode "L"; Pillow's own conversion would clip everything above 255 to white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite")
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels (mode {image.mode}) are of unknown range: save it with 8 or 16 bits")
    result = Image.fromarray(np.round(values / 257).astype(np.uint8))
    result.info = image.info  # its colour profile
    return result


def over(image: Image.Image, colour: str) -> Image.Image:
    """Composite the image over that colour, if it has transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image)
