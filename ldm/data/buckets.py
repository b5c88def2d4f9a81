"""Aspect-ratio buckets: shapes of about one area, so that images need not be cropped to squares."""

import math
from collections.abc import Sequence

Shape = tuple[int, int]  # width, height in pixels


def bucket_shapes(size: int, multiple: int) -> list[Shape]:
    """Return shapes of at most size^2 pixels, sides from size / 2 to 2 size, multiples of `multiple`, square first."""
    shapes = [(size, size)]
    for short in range(size - multiple, (size - 1) // 2, -multiple):
        long = min(size * size // short, 2 * size) // multiple * multiple
        shapes += [(long, short), (short, long)]
    if len(shapes) == 1:
        raise ValueError(
            f"the square is the only bucket: sides are multiples of {multiple} here, so use a resolution of at "
            f"least {2 * multiple}, not {size}"
        )
    return shapes


def nearest(shapes: Sequence[Sequence[int]], width: int, height: int) -> Shape:
    """Return the shape whose aspect ratio is nearest to width / height, as a factor."""
    wide, high = min(shapes, key=lambda shape: abs(math.log(shape[0] * height / (shape[1] * width))))
    return wide, high
