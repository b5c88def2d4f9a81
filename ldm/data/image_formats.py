"""The formats of image files that are opened here, and the only place that opens them. It imports nothing heavy."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ldm.checks import check_file

# Pillow's name of each format that is read -> its plugin and its files' suffixes. Pillow decides by the content, not by
# the suffix, and gives PostScript to Ghostscript, a program: so no EPS, PS or PDF, and nothing that is not needed.
READ = {
    "PNG": ("PIL.PngImagePlugin", ".png .apng"),
    "JPEG": ("PIL.JpegImagePlugin", ".jpg .jpeg .jfif .jpe"),
    "WEBP": ("PIL.WebPImagePlugin", ".webp"),
    "GIF": ("PIL.GifImagePlugin", ".gif"),
    "BMP": ("PIL.BmpImagePlugin", ".bmp .dib"),
    "TIFF": ("PIL.TiffImagePlugin", ".tif .tiff"),
    "PPM": ("PIL.PpmImagePlugin", ".ppm .pgm .pbm .pnm"),
    "AVIF": ("PIL.AvifImagePlugin", ".avif"),
    "JPEG2000": ("PIL.Jpeg2KImagePlugin", ".jp2 .j2k .jpx .jpf .j2c"),
    "HEIF": ("pillow_heif", ".heic .heif .hif"),  # that package, where it is installed
    "TGA": ("PIL.TgaImagePlugin", ".tga"),  # the last: it has no signature
}
SUFFIXES = frozenset(suffix for _, suffixes in READ.values() for suffix in suffixes.split())


def check_image_file(path: Path) -> None:
    """Raise OSError or ValueError unless it is a regular file, of at most 1 GiB."""
    check_file(path, "image")
    if path.stat().st_size > 1 << 30:  # Pillow looks through a damaged one byte by byte
        raise ValueError(f"image {str(path)!r} has more than 1024 MiB: it is damaged, or no image")


def open_pillow(file: str | Path | BinaryIO, formats: Iterable[str] = READ) -> Image.Image:
    """Open an image file of one of these formats, as `PIL.Image.open` does, the only place that calls it."""
    return Image.open(file, formats=[name for name in formats if _has_plugin(name)])


@cache
def _has_plugin(name: str) -> bool:
    """Import the plugin of a format; False where this Pillow is older than it or pillow-heif is not installed."""
    if name not in Image.OPEN:
        try:
            plugin = import_module(READ[name][0])
        except ImportError:
            return False
        if name == "HEIF":
            plugin.register_heif_opener()
    return True
