"""Conversions between tensors of pixels and PIL images, and grids of images."""

from collections.abc import Sequence

from PIL import Image

from ldm.arrays import Tensor, float32_or_wider, library, to_numpy


def to_uint8(pixels: Tensor) -> Tensor:
    """Clip pixels in [-1, 1] and round them to uint8, of the same shape."""
    own = library(pixels)
    return own.asarray(((float32_or_wider(pixels).clip(-1, 1) + 1) * 127.5).round(), dtype=own.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (b, c, h, w) in [-1, 1], or uint8, with c = 1 or 3, to b images in mode "L" or "RGB"."""
    levels = to_numpy(pixels if str(pixels.dtype).endswith("uint8") else to_uint8(pixels))
    arrays = levels.transpose(0, 2, 3, 1)  # (b, h, w, c)
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
