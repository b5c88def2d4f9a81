"""From a PIL image of any size to a tensor of one shape: resized, cropped and mirrored."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ldm.checks import Range
from ldm.data.buckets import Shape, nearest

Crop = Literal["center", "random"]
Resize = Literal["shorter", "exact", "none"]
Side = Annotated[int, Range(1, 2**13)]  # pixels; twice that is what Pillow opens at all
Buckets = Sequence[tuple[Side, Side]]
MOST_BUCKETS = 2**10  # each image is compared with each


@dataclass(frozen=True)
class Transform:
    """Makes every image float32 (channels, height, width) in [-1, 1], of the shape that `shape` says.

    Its options are those of `ldm.data.image_set.ImageSet`, which checks their types.
    """

    size: int
    crop: Crop = "center"
    flip: bool = False
    seed: int = 0
    buckets: Buckets | None = None
    resize: Resize = "shorter"

    def __post_init__(self) -> None:
        if self.buckets is not None and not 0 < len(self.buckets) <= MOST_BUCKETS:
            raise ValueError(f"buckets is a list of 1 to {MOST_BUCKETS:,} shapes, not of {len(self.buckets):,}")
        if self.resize == "exact" and self.crop == "random":
            raise ValueError("crop 'random' is for resize 'shorter' or 'none': 'exact' cuts nothing off")

    def shape(self, width: int, height: int) -> Shape:
        """Return the (width, height) that an image of that size gets."""
        return (self.size, self.size) if self.buckets is None else nearest(self.buckets, width, height)

    def fault(self, width: int, height: int) -> str:
        """Return what is wrong with an image of that size; "" if nothing is."""
        wide, high = self.shape(width, height)
        small = self.resize == "none" and (width < wide or height < high)
        return f"is {width} x {height} pixels, too small for {wide} x {high} with resize 'none'" if small else ""

    def least(self, shape: Shape) -> int | None:
        """Return the sides that suffice of a JPEG that becomes `shape`: twice its own, as for Pillow's thumbnails."""
        return None if self.resize == "none" else 2 * max(shape)

    def __call__(self, image: Image.Image, epoch: int, index: int | str, shape: Shape | None = None) -> Tensor:
        """Transform an image, to the `shape` that was said before if given; `index` identifies it in its data set."""
        return to_tensor(self._cut(image, epoch, index, shape or self.shape(*image.size), Image.Resampling.LANCZOS))

    def mask(self, mask: Image.Image, epoch: int, index: int | str, shape: Shape) -> Tensor:
        """Transform the grey mask of an image as the image, by areas: float32 (1, height, width) in [0, 1]."""
        return to_tensor(self._cut(mask, epoch, index, shape, Image.Resampling.BOX)).add_(1).div_(2)

    def sizes(self, width: int, height: int, epoch: int, index: int | str, shape: Shape) -> Tensor:
        """Return what Stable Diffusion XL takes of an image of that size: int64 (6,), as in `ldm.conditioning.sizes`.

        They are heights before widths: of the image, of the place of the crop in the scaled image, and of `shape`.
        """
        left = top = 0
        if self.resize != "exact":
            place, largest = self._random(epoch, index)[0], self.resize == "shorter"
            corners = crop_box((width, height), shape, place, largest)
            left, top = (round(corners[i] * shape[i] / (corners[i + 2] - corners[i])) for i in (0, 1))
        return torch.tensor([height, width, top, left, *shape[::-1]])

    def _random(self, epoch: int, index: int | str) -> tuple[tuple[float, float], bool]:
        """Return where an image is cropped, as a share of the way from left and top, and whether it is mirrored."""
        uniform = random.Random(f"{self.seed} {epoch} {index}").random
        place = (uniform(), uniform()) if self.crop == "random" else (0.5, 0.5)
        return place, self.flip and uniform() < 0.5

    def _cut(
        self, image: Image.Image, epoch: int, index: int | str, shape: Shape, filtering: Image.Resampling
    ) -> Image.Image:
        place, mirrored = self._random(epoch, index)
        if self.resize == "exact":
            image = image.resize(shape, filtering)
        else:
            image = crop_to(image, shape, place, self.resize == "shorter", filtering)
        return ImageOps.mirror(image) if mirrored else image


def crop_to(
    image: Image.Image, shape: Shape, place: tuple[float, float], largest: bool, filtering: Image.Resampling
) -> Image.Image:
    """Crop to the aspect ratio of `shape` at `place`, (x, y) from 0 (left, top) to 1 (right, bottom), and resize to it.

    The part is as large as can be, or, without `largest`, of that shape.
    Cropping comes first, or a strip of 2 x 9,000 pixels would be enlarged to gigabytes; and at integer pixels, so that
    an image of the right size is not resampled.
    """
    left, top, right, bottom = box = crop_box(image.size, shape, place, largest)
    if (right - left, bottom - top) == tuple(shape):
        return image.crop(box)
    return image.resize(shape, filtering, box=box)


def crop_box(size: Shape, shape: Shape, place: tuple[float, float], largest: bool) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the part of an image of that size that `crop_to` keeps."""
    scale = min(side / wanted for side, wanted in zip(size, shape, strict=True)) if largest else 1
    part = [max(1, round(scale * wanted)) for wanted in shape]
    left, top = (round(at * (side - kept)) for at, side, kept in zip(place, size, part, strict=True))
    return left, top, left + part[0], top + part[1]


def to_tensor(image: Image.Image) -> Tensor:
    """Return an 8-bit image as float32 (c, h, w) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))
    planes = rearrange(pixels, "h w -> 1 h w" if pixels.ndim == 2 else "h w c -> c h w")
    return planes.contiguous().float().div_(127.5).sub_(1)  # bytes are quicker to reorder than floats
