"""Half-precision weights that stay as they are, mapped from a file, while a CPU computes in another precision.

Each layer copies its own into the precision while it computes: the same images, in about the memory of the file.
"""

from contextlib import ExitStack
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.inference.offload import Visit
from ldm.latent_diffusion import LatentDiffusion

HALVES = (torch.float16, torch.bfloat16)
LARGE = 2**18  # numbers in a weight that waits


def widen(model: LatentDiffusion, network: nn.Module, dtype: torch.dtype, undo: ExitStack, traced: bool) -> None:
    """Let a part of the model compute in a dtype, the UNet in that of its first weight, until `undo` is closed.

    traced: the UNet will be compiled, and compiled code runs no hooks: its weights become parametrizations (`Cast`).
    """
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() and not _is_large(tensor):
            tensor.data = tensor.data.to(dtype)
    if network is model.model:  # each layer by itself; the others' parts at once, as they compute once a batch
        first = next(network.parameters())  # says what a network computes in (`UNetModel.dtype`)
        first.data = first.data.to(dtype)
        casts = [module for module in network.modules() if isinstance(module, Cast)]
        for cast in casts:  # of an earlier precision
            undo.callback(setattr, cast, "dtype", cast.dtype)
            cast.dtype = dtype
        layers = [] if casts else [m for m in network.modules() if any(map(_is_large, m._parameters.values()))]
        for layer, name in [(m, k) for m in layers for k, t in m._parameters.items() if traced and _is_large(t)]:
            parametrize.register_parametrization(layer, name, Cast(dtype), unsafe=True)
            undo.callback(parametrize.remove_parametrizations, layer, name, leave_parametrized=False)
        layers = [] if traced else layers
    else:  # a first stage is not called as such: `encode` and `decode` call its parts
        layers = network.children() if network is model.first_stage_model else [network]
    for layer in layers:
        Widened(dtype if network is model.first_stage_model else model.model).hook(layer, undo)


class Cast(nn.Module):
    """A weight in another dtype, computed whenever a layer reads it: what compiles as a part of that layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


class Widened(Visit):
    """Hooks with which a network computes in a dtype of which its large half-precision weights are not.

    Args:
        dtype: or the network that has it, which may change.
    """

    def __init__(self, dtype: torch.dtype | nn.Module) -> None:
        super().__init__(torch.device("cpu"))
        self.asked = dtype

    @property
    def dtype(self) -> torch.dtype:
        return next(self.asked.parameters()).dtype if isinstance(self.asked, nn.Module) else self.asked

    def visitors(self, network: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
        dtype = self.dtype
        own = ((module, name, t) for module in network.modules() for name, t in module._parameters.items())
        return [(module, name, t) for module, name, t in own if _is_large(t) and t.dtype != dtype]

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def inputs(self, given: Any) -> Any:
        return given


def _is_large(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.dtype in HALVES and tensor.numel() >= LARGE
