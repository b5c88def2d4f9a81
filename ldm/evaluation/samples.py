"""Pictures as they are measured: uint8, as real ones are, and the inner 28 x 28 (or what size it is) only."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ldm.images import to_uint8
from ldm.models.classifier import INNER, inner

GREY = 64  # ground of a sheet: neither ink nor background


def quantise(images: Tensor) -> Tensor:
    """Grey pictures (n, 1, h, w) in [-1, 1], or beyond by a little, -> uint8 (n, 28, 28).

    Fréchet distances notice background noise long before people do, so generated pictures must be clipped and rounded
    like real ones.
    """
    return rearrange(to_uint8(inner(images)), "n 1 h w -> n h w")


def from_pil(images: Iterable, size: int = INNER) -> Tensor:
    """PIL images of one size -> uint8 (n, size, size)."""
    arrays = [np.array(image.convert("L")) for image in images]
    return inner(torch.from_numpy(np.stack(arrays)), size)


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 (n, h, w) -> float32 (n, 1, h, w) in [-1, 1], as the networks take them."""
    return rearrange(pictures, "n h w -> n 1 h w").float() / 127.5 - 1


def pad(pictures: Tensor, border: int = 2) -> Tensor:
    """uint8 (n, 28, 28) -> uint8 (n, 32, 32), as the digit sets give them to a model: padded with background."""
    return F.pad(pictures, (border,) * 4)


def by_class(pictures: Tensor, labels: Tensor, columns: int, classes: int = 10) -> Tensor:
    """The first `columns` pictures of each class, (classes, columns, h, w); black where a class has fewer."""
    sheet = pictures.new_zeros(classes, columns, *pictures.shape[1:])
    for label in range(classes):
        chosen = pictures[labels == label][:columns]
        sheet[label, : len(chosen)] = chosen
    return sheet


def side_by_side(blocks: Sequence[Tensor], gap: int = 2, between: int = 12, magnify: int = 2) -> Image.Image:
    """Blocks of pictures, uint8 (rows, columns, h, w) each, beside each other on grey.

    Args:
        gap, between: pixels between pictures and between blocks, before magnifying.
        magnify: each pixel becomes a square of so many.
    """
    sheets = []
    for block in blocks:
        sheet = rearrange(F.pad(block, (gap, 0, gap, 0), value=GREY), "r c h w -> (r h) (c w)")
        sheets.append(F.pad(sheet, (0, between), value=GREY))
    whole = F.pad(torch.cat(sheets, dim=1)[:, : gap - between], (0, 0, 0, gap), value=GREY)
    return Image.fromarray(repeat(whole, "h w -> (h a) (w b)", a=magnify, b=magnify).numpy())
