"""Pictures as they are measured: uint8, as real ones are, and the inner 28 x 28 (or what size it is) only."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.captions import Caption
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


def ask(model: Any, captions: Sequence[Caption]) -> tuple[list[Any], list[Caption]]:
    """(what the model is given for each caption, what of the caption that asserts): all, its digit alone, or nothing.

    Args:
        model: a LatentDiffusion of texts, of classes (its conditioner has `n_classes`), or of images alone.
    """
    if model.cond_stage_model is None:
        return [""] * len(captions), [Caption("")] * len(captions)
    if hasattr(model.cond_stage_model, "n_classes"):
        digits = [caption.digit for caption in captions]
        return digits, [Caption(str(digit), digit) for digit in digits]
    return [caption.text for caption in captions], list(captions)


def draw(model: Any, prompts: Sequence[Any], seed: int, batch_size: int, size: int = INNER, **settings: Any) -> Tensor:
    """uint8 (n, size, size), image i with the noise of seed + i, under a progress bar with the rate.

    Args:
        model: a LatentDiffusion.
        prompts: texts or classes, as the model takes them.
        size: of the inner part that is measured.
        settings: of its `generate`.
    """
    images = []
    with tqdm(total=len(prompts), desc="drawing", unit="image", mininterval=1) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            images.append(from_pil(model.generate(batch, seed=seed + first, batch_size=batch_size, **settings), size))
            bar.update(len(batch))
    return torch.cat(images)
