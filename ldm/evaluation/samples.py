"""Images as they are measured: uint8, as real ones are, and without their padding, 28 x 28 or of another size."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.checks import few
from ldm.data.captions import NUMBER_WORDS, Caption
from ldm.images import image_grid, to_pil, to_uint8
from ldm.inference.nan_check import generate_checked
from ldm.init_image import stack_images
from ldm.models.classifier import INNER, inner
from ldm.util import progress_bar


def quantise(images: Tensor) -> Tensor:
    """Clip and round greyscale images (n, 1, h, w) in [-1, 1] to uint8 (n, 28, 28), as real images are.

    Otherwise the Fréchet distance would notice background noise that nobody sees.
    """
    return rearrange(to_uint8(inner(images)), "n 1 h w -> n h w")


def from_pil(images: Iterable, size: int = INNER) -> Tensor:
    """Convert PIL images of one size to uint8 (n, size, size)."""
    return inner(stack_images([image.convert("L") for image in images])[:, 0], size)


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 (n, h, w) to float32 (n, 1, h, w) in [-1, 1], as the networks take them."""
    return rearrange(images, "n h w -> n 1 h w").float() / 127.5 - 1


def pad(images: Tensor) -> Tensor:
    """Pad uint8 (n, 28, 28) with background to (n, 32, 32), as the digit sets give them to a model."""
    return F.pad(images, (2,) * 4)


def images_by_class(images: Tensor, labels: Tensor, columns: int = 12, classes: int = 10) -> Tensor:
    """Return the first `columns` images of each class, (classes, columns, h, w); black where a class has fewer."""
    rows = images.new_zeros(classes, columns, *images.shape[1:])
    for label in range(classes):
        chosen = images[labels == label][:columns]
        rows[label, : len(chosen)] = chosen
    return rows


def image_sheet(blocks: Sequence[Tensor], between: int = 12, magnify: int = 2) -> Image.Image:
    """Show blocks of uint8 images, (rows, columns, h, w) each, beside each other on grey, `between` pixels apart."""
    grids = [image_grid(to_pil(rearrange(block, "r c h w -> (r c) 1 h w")), block.shape[1]) for block in blocks]
    sheet = image_grid(grids, len(grids), between)
    return sheet.resize((magnify * sheet.width, magnify * sheet.height), Image.Resampling.NEAREST)


def prompts_for(model: Any, captions: Sequence[Caption], classes: bool = False) -> tuple[list[Any], list[Caption]]:
    """Return the model's condition for each caption, and the caption reduced to what that condition states.

    Args:
        model: a LatentDiffusion conditioned on text (all of the caption), on classes (its digit; the conditioner has
            `n_classes`), or unconditional.
        classes: a classifier guides to the digit, whatever the model is conditioned on.

    Raises:
        ValueError: the model's classes have names, and a digit is none of them.
    """
    if model.cond_stage_model is None and not classes:
        return [""] * len(captions), [Caption("")] * len(captions)
    digits = [caption.digit for caption in captions]
    stated = [Caption(str(digit), digit) for digit in digits]
    if model.cond_stage_model is None or hasattr(model.cond_stage_model, "n_classes"):
        names = getattr(model.cond_stage_model, "names", None)
        return digits if names is None else [_name_of(digit, names) for digit in digits], stated
    if classes:
        return [caption.text for caption in stated], stated
    return [caption.text for caption in captions], list(captions)


def _name_of(digit: int, names: Sequence[str]) -> str:
    """Return the name of a digit's class, 5 or five: classes of a folder are in the order of their names."""
    if name := next((name for name in (str(digit), NUMBER_WORDS[digit]) if name in names), None):
        return name
    raise ValueError(f"the model's classes are {few(names)}: none is the digit {digit} (or {NUMBER_WORDS[digit]})")


def sample_images(
    model: Any, prompts: Sequence[Any], seed: int, batch_size: int, size: int | None = INNER, **settings: Any
) -> Tensor:
    """Generate uint8 images (n, size, size), image i from the noise of seed + i, under a progress bar.

    Args:
        model: a LatentDiffusion.
        prompts: texts or classes, as the model takes them.
        size: side of the inner part that is measured; None keeps images as they are, (n, c, h, w).
        settings: of its `generate`.

    Raises:
        ValueError: an image is not finite; the message names the module where that began.
    """
    images = []
    with progress_bar(leave=True, total=len(prompts), desc="generating", unit="image", mininterval=1) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            made = generate_checked(model, batch, seed=seed + first, batch_size=batch_size, **settings)
            images.append(stack_images(made) if size is None else from_pil(made, size))
            bar.update(len(batch))
    return torch.cat(images)
