"""Optimizers for fine-tuning large models, by how much memory their state takes beside a weight's 4 bytes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

# name -> bytes of state for each weight that trains
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}


def make_optimizer(groups: list[dict[str, Any]], name: str, betas: Sequence[float], weight_decay: float) -> Optimizer:
    """The optimizer of that name over parameter groups, each with its own "lr".

    adamw: fused where torch has that. adamw8bit: its moments in 8 bits (Dettmers et al. 2021), by bitsandbytes.
    adafactor: the second moment as sums over rows and columns, no first one (Shazeer & Stern 2018); its learning rate
    is relative to the size of the weights, so it is larger.

    Raises ValueError for another name, a learning rate that is not a positive number, and without bitsandbytes.
    """
    for group in groups:
        if not 0 < group["lr"] < math.inf:
            raise ValueError(f"the learning rate {group['lr']} must be above 0")
    if name == "adamw":
        fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, betas=tuple(betas), weight_decay=weight_decay, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, weight_decay=weight_decay)
    if name != "adamw8bit":
        raise ValueError(f"optimizer {name!r} is unknown: use {', '.join(STATE_BYTES)}")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("8-bit Adam is in the package bitsandbytes, which is not installed here") from None
    return AdamW8bit(groups, betas=tuple(betas), weight_decay=weight_decay)
