"""The images of many prompts, as they are measured."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.captions import Caption
from ldm.evaluation.samples import from_pil
from ldm.models.classifier import INNER


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
