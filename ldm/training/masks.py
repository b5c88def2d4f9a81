"""Masks of what an image is to be made anew, for models that are trained to inpaint."""

import torch
from torch import Tensor

from ldm.training.share import BatchShare

RECTANGLES = 4  # of a random mask, at most


def random_masks(count: int, height: int, width: int, share: BatchShare) -> Tensor:
    """Return masks (b, 1, height, width), 1 where an image is to be made anew: up to RECTANGLES rectangles, or all.

    A rectangle's sides are a tenth to six tenths of the image's. In a tenth of the masks all is made anew.
    """
    u = share.rand(count, RECTANGLES, 5)
    inside = []
    for axis, length in enumerate((height, width)):
        side = 0.1 + 0.5 * u[..., axis]  # (b, rectangles), in parts of the image
        start = u[..., 2 + axis] * (1 - side)
        at = ((torch.arange(length) + 0.5) / length).expand(*side.shape, length)
        inside.append((start[..., None] <= at) & (at < (start + side)[..., None]))  # (b, rectangles, length)
    used = torch.arange(RECTANGLES) <= u[:, :1, 4] * RECTANGLES  # (b, rectangles)
    masks = inside[0][..., None] & inside[1][..., None, :] & used[..., None, None]
    return (masks.any(1, keepdim=True) | (u[:, -1:, 4, None, None] < 0.1)).float()


def middle_masks(count: int, height: int, width: int) -> Tensor:
    """Return masks as `random_masks` does, whose middle, half as high and wide as the image, is made anew."""
    mask = torch.zeros(count, 1, height, width)
    mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 1
    return mask
