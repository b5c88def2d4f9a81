"""Other optimizers than AdamW: those whose state takes less memory, and classes that a configuration names."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Adafactor, Optimizer

from ldm.checks import shorten
from ldm.training.ema import EMA
from ldm.util import call_with, get_obj_from_str

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


def make_other(optimizer: str | Mapping[str, Any], groups: list[Any], own: dict[str, Any]) -> Any:
    """Return an optimizer over groups of weights, as `make_optimizer` does; own: its betas and weight decay."""
    if optimizer == "adafactor":
        return Adafactor(groups, weight_decay=own["weight_decay"])
    if optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("8-bit Adam is in the package bitsandbytes, which is not installed here") from None
        name, kind, params = "adamw8bit", AdamW8bit, own
    else:
        name, kind, params = _of_class(optimizer, own)
    _try_step(name, kind, params, groups)
    return call_with(f"optimizer {name}", kind, {**params, "params": groups})


def _of_class(optimizer: Any, own: Mapping[str, Any]) -> tuple[str, type, dict[str, Any]]:
    """Return name, class and arguments of an optimizer that a configuration names by its target."""
    if not isinstance(optimizer, Mapping) or not {"target"} <= optimizer.keys() <= {"target", "params"}:
        raise ValueError(f"optimizer {optimizer!r} is unknown: use {', '.join(OPTIMIZERS)}, or a target with params")
    given_params = optimizer.get("params") or {}
    if not isinstance(given_params, Mapping) or given_params.keys() & {"lr", "params"}:
        raise ValueError(
            f"optimizer {optimizer['target']!r}: params {shorten(repr(given_params))} must be a mapping without lr and "
            "params: the stage's learning_rate says lr, and which weights train follows from the stage"
        )
    kind = get_obj_from_str(optimizer["target"])
    if not issubclass(kind, Optimizer):
        raise ValueError(f"optimizer {optimizer['target']!r} is not a class of optimizers (torch.optim.Optimizer)")
    chosen = {k: v for k, v in own.items() if k in inspect.signature(kind).parameters}
    return optimizer["target"], kind, {**chosen, **given_params}


def _try_step(name: str, kind: type, params: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Take a step of such an optimizer on small weights; ValueError if it cannot, before anything trains.

    Some fail only there: those that need a closure or sparse gradients, and options that are not for the device.
    """
    small = []
    for group in groups:
        like = {p.ndim: p for p in group["params"]}.values()  # as Muon, which is for matrices, sees them
        small.append({**group, "params": [nn.Parameter(p.new_ones([2] * p.ndim)) for p in like]})
    tried = call_with(f"optimizer {name}", kind, {**params, "params": small})
    for weight in (p for group in small for p in group["params"]):
        weight.grad = torch.ones_like(weight)
    try:
        getattr(tried, "train", lambda: None)()  # the mode of those that average
        tried.step()
    except Exception as error:
        text = " ".join(str(error).split())[:300] or "no reason is given"
        raise ValueError(f"optimizer {name} cannot train here: {type(error).__name__}: {text}") from error


class ScheduleFree(EMA):
    """The averages that schedule-free optimizers keep and give the weights in eval mode (Defazio et al. 2024)."""

    def __init__(self, optimizers: Sequence[Any]) -> None:
        super().__init__(nn.Module(), 0.0)
        self.optimizers = optimizers
        self.weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._switch("train")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            getattr(optimizer, mode)()

    @contextmanager
    def applied(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.weights]
        self._switch("eval")
        try:
            yield
        finally:
            self._switch("train")  # to the training weights up to rounding
            with torch.no_grad():
                torch._foreach_copy_(self.weights, kept)
