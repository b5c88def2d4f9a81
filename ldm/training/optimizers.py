"""The optimizer of all stages, AdamW or another, and the average of what it trains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from ldm.training.ema import EMA


def make_optimizer(
    parameters: Iterable[nn.Parameter | dict[str, Any]],
    lr: float = 0.0,
    optimizer: str | Mapping[str, Any] = "adamw",
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> Optimizer:
    """Return an optimizer over the parameters that train.

    adamw keeps 8 bytes of state for each weight. adamw8bit keeps 2, by bitsandbytes (Dettmers et al. 2021). adafactor
    keeps sums over rows and columns (Shazeer & Stern 2018); its learning rate is relative to the size of the weights.

    Args:
        parameters: of networks, or groups of them that train, each with its own "lr".
        optimizer: one of these names, or {"target", "params"} of an optimizer's class, such as ldm.training.muon.Muon,
            torch.optim.RAdam, schedulefree.AdamWScheduleFree or prodigyopt.Prodigy.
        betas, weight_decay: also of such a class, if it takes them and `params` does not have them.
    """
    given: list[Any] = list(parameters)
    groups = given if isinstance(given[0], dict) else [{"params": [p for p in given if p.requires_grad], "lr": lr}]
    own: dict[str, Any] = {"betas": tuple(betas), "weight_decay": weight_decay}
    if optimizer == "adamw":  # one fused kernel per step where torch has one
        return AdamW(groups, **own, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))
    from ldm.training.other_optimizers import make_other  # only where a configuration names one

    return make_other(optimizer, groups, own)


@torch.no_grad()
def clip_gradients(accelerator: Any, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of at most `most`, and return the norm that they had.

    On a CPU, gradients within it are left alone; torch multiplies them by 1, so that a GPU need not wait for the norm.
    """
    if accelerator.device.type != "cpu" or accelerator.distributed_type == "FSDP" or accelerator.scaler is not None:
        return accelerator.clip_grad_norm_(parameters, most)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not norm + 1e-6 <= most:  # torch's margin
        clip_grads_with_norm_(parameters, most, norm)
    return norm


def average_of(module: nn.Module, optimizers: Sequence[Any], decay: float, device: str) -> EMA:
    """Return the average of a module's weights: an EMA, or what the optimizers keep. device: auto is the weights'."""
    averaging = [optimizer for optimizer in optimizers if hasattr(optimizer, "eval")]
    if not averaging:
        return EMA(module, decay, None if device == "auto" else device)
    if decay > 0:
        raise ValueError(f"{type(averaging[0]).__name__} averages the weights itself: set loop.ema=0")
    from ldm.training.other_optimizers import ScheduleFree  # only for such optimizers

    return ScheduleFree(averaging)
