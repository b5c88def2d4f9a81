"""Opening image files, conversions between tensors of pixels and PIL images, and grids of images."""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from ldm.checks import check_file

if TYPE_CHECKING:  # recipes are read before torch is imported
    from torch import Tensor

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


def to_uint8(pixels: "Tensor") -> "Tensor":
    """Clip pixels in [-1, 1] and round them to uint8, of the same shape."""
    import torch

    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(pixels: "Tensor") -> list[Image.Image]:
    """Convert pixels (b, c, h, w) in [-1, 1], or uint8, with c = 1 or 3, to b images in mode "L" or "RGB"."""
    levels = to_uint8(pixels) if pixels.is_floating_point() else pixels
    arrays = levels.permute(0, 2, 3, 1).cpu().numpy()  # (b, h, w, c)
    return [Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]


GRID, WIDEST = 256, 2048  # pixels: see `image_grid`


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """Repeat each pixel `factor` times in both directions."""
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2, factor: int | None = 1) -> Image.Image:
    """Paste images of one size and mode row by row on a grid, with `gap` pixels of grey between them.

    factor: each is enlarged by it. None: as is needed for a grid of at least GRID pixels on both sides, unless it
        would be wider or higher than WIDEST.
    """
    if not images:
        raise ValueError("a grid needs at least one image")
    if factor is None:
        sides = [min(columns, len(images)) * images[0].width, -(-len(images) // columns) * images[0].height]
        factor = max(1, min(-(-GRID // min(sides)), WIDEST // max(sides)))
    images = images if factor == 1 else [enlarge(image, factor) for image in images]
    (width, height), columns = images[0].size, min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new(images[0].mode, size, 128 if images[0].mode == "L" else (128,) * len(images[0].getbands()))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return grid
