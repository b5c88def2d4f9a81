"""The pictures of many prompts, as they are measured."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation.pictures import from_pil
from ldm.models.classifier import INNER


def draw(model: Any, prompts: Sequence[str], seed: int, batch_size: int, size: int = INNER, **settings: Any) -> Tensor:
    """uint8 (n, size, size), picture i with the noise of seed + i, under a progress bar with the rate.

    Args:
        model: a LatentDiffusion.
        size: of the inner part that is measured.
        settings: of its `generate`.
    """
    pictures = []
    with tqdm(total=len(prompts), desc="drawing", unit="picture", mininterval=1) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            pictures.append(from_pil(model.generate(batch, seed=seed + first, batch_size=batch_size, **settings), size))
            bar.update(len(batch))
    return torch.cat(pictures)
