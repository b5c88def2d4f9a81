"""Optimizers for fine-tuning large models, whose state takes less memory than AdamW's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


def make_optimizer(groups: list[dict[str, Any]], name: str, betas: Sequence[float], weight_decay: float) -> Optimizer:
    """Return the optimizer of that name over parameter groups, each with its own "lr".

    adamw keeps 8 bytes of state for each weight. adamw8bit keeps 2, by bitsandbytes (Dettmers et al. 2021). adafactor
    keeps sums over rows and columns (Shazeer & Stern 2018); its learning rate is relative to the size of the weights.
    """
    if name == "adamw":
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, betas=tuple(betas), weight_decay=weight_decay, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=weight_decay)
    if name != "adamw8bit":
        raise ValueError(f"optimizer {name!r} is unknown: use {', '.join(OPTIMIZERS)}")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("8-bit Adam is in the package bitsandbytes, which is not installed here") from None
    return AdamW8bit(groups, betas=tuple(betas), weight_decay=weight_decay)
