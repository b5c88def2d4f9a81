"""A picture to start from: fitted to sizes that the model can make, and cut back and pasted back in the end."""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.image_files import over, upright
from ldm.images import to_uint8

Pictures = Image.Image | Sequence[Image.Image]


class Source:
    """Pictures to change, one for each of `count` results, and which of their pixels are to change.

    Args:
        image: one picture for all, or `count` of one size. The model sees them grey or RGB as its `channels` say,
            turned as their EXIF data says, what is transparent over white.
        mask: white where something new is to be drawn, black (or transparent) where the picture is to stay, of the
            picture's size; one for all or `count`; None changes the picture as a whole. What is at least half white is
            drawn; its greys then blend what was drawn with the picture.
        multiple: the model makes pictures whose height and width are multiples of it. Others are padded at the right
            and the bottom by repeating the edge, and the results are cut back.

    `source[i:j]` is that part of it. Raises ValueError for pictures or masks of other counts or sizes, and for pictures
    with a side shorter than `multiple`.
    """

    def __init__(self, image: Pictures, mask: Pictures | None, count: int, channels: int, multiple: int) -> None:
        images = _upright(image, count, "pictures")
        seen = "L" if channels == 1 else "RGB"
        # One picture for all stays one, so that it is encoded once.
        self.seen = _stack([over(one, "white").convert(seen) for one in images])  # (1 or count, channels, h, w)
        self.height, self.width = self.seen.shape[-2:]
        if min(self.height, self.width) < multiple:
            raise ValueError(
                f"the picture is {self.width} x {self.height} pixels, too small for this model: "
                f"it draws at least {multiple} x {multiple}"
            )
        self.padding = (0, -self.width % multiple, 0, -self.height % multiple)
        self.kept = self.levels = None
        if mask is not None:
            masks = _upright(mask, count, "masks")
            self.levels = _stack([over(one, "black").convert("L") for one in masks])  # (1 or count, 1, h, w)
            height, width = self.levels.shape[-2:]
            if (height, width) != (self.height, self.width):
                raise ValueError(
                    f"the mask is {width} x {height} pixels and the picture {self.width} x {self.height}: "
                    "they must have one size"
                )
            widest = max((one.mode for one in images), key=("L", "RGB", "RGBA").index)
            self.kept = _stack([one.convert(seen if widest == "L" else widest) for one in images])

    def __getitem__(self, batch: slice) -> "Source":
        part = copy(self)
        for name in ("seen", "kept", "levels"):
            pictures = getattr(self, name)
            if pictures is not None and len(pictures) > 1:
                setattr(part, name, pictures[batch])
        return part

    @property
    def pixels(self) -> Tensor:
        """What the model sees: (1 or b, channels, h, w) in [-1, 1], padded."""
        return F.pad(self.seen.float() / 127.5 - 1, self.padding, mode="replicate")

    @property
    def mask(self) -> Tensor | None:
        """(1 or b, 1, h, w), padded: 1 where something new is to be drawn, 0 elsewhere; or None."""
        return None if self.levels is None else F.pad((self.levels >= 128).float(), self.padding, mode="replicate")

    def finish(self, drawn: Tensor) -> Tensor:
        """What was drawn, pixels (b, channels, h, w) in [-1, 1], at the picture's own size: uint8 (b, c, h, w).

        Under a mask it is blended with the picture: what is black there is the picture's to the byte. It then has the
        picture's colours and transparency too (c is 3 or 4), and what was drawn is opaque.
        """
        drawn = to_uint8(drawn)[..., : self.height, : self.width].cpu()
        if self.levels is None:
            return drawn
        channels = self.kept.shape[1]
        if drawn.shape[1] < min(channels, 3):
            drawn = drawn.expand(-1, 3, -1, -1)  # grey in a picture of colours
        if channels == 4:
            drawn = torch.cat([drawn, torch.full_like(drawn[:, :1], 255)], dim=1)
        return torch.lerp(self.kept.float(), drawn.float(), self.levels / 255).round().to(torch.uint8)


def steps_taken(strength: float, steps: int) -> int:
    """How many of the steps a strength takes: strength x steps, rounded down as in CompVis's img2img, but 1 if above 0.

    Counted as decimals are: 0.29 of 100 steps are 29, though 0.29 * 100 is 28.999999999999996.
    Raises ValueError for a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}")
    return max(int(round(strength * steps, 6)), 1 if strength > 0 else 0)


def _upright(pictures: Pictures, count: int, what: str) -> list[Image.Image]:
    """The pictures in mode "L", "RGB" or "RGBA". ValueError unless they are one or `count`, and of one size."""
    pictures = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ValueError(f"{what} are PIL images, as PIL.Image.open reads them, got {type(pictures[0]).__name__}")
    pictures = [upright(picture) for picture in pictures]
    sizes = sorted({picture.size for picture in pictures})
    if len(pictures) not in (1, count) or len(sizes) != 1:
        raise ValueError(
            f"{count} results need one or {count} {what} of one size, got {len(pictures)} of sizes {sizes}"
        )
    return pictures


def _stack(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size and mode -> uint8 (b, c, h, w)."""
    arrays = np.stack([np.asarray(picture) for picture in pictures])  # (b, h, w) or (b, h, w, c)
    return torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2)  # (b, c, h, w)
