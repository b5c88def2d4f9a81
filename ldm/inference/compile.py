"""Faster forms of the same arithmetic: the layout of tensors in memory, and torch.compile."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion


def channels_last(model: LatentDiffusion) -> None:
    """Lay out the convolutions of UNet and first stage as (b, h, w, c), which their kernels on CPUs and GPUs prefer."""
    for network in (model.model, model.first_stage_model):
        network.to(memory_format=torch.channels_last)


def compile_unet(model: LatentDiffusion, backend: str | Callable = "inductor") -> None:
    """From now on the UNet runs through torch.compile, once compiled for each shape of its input.

    Each compilation takes a minute or so, and says on stderr that it does. What goes wrong in it (no C++ compiler, no
    Triton, an operation it does not know) is a ValueError in one sentence.
    backend: torch.compile's; "eager" compiles nothing.
    """
    unet = model.model.diffusion_model
    unet.forward = _Compiled(unet.forward, backend)


class _Compiled:
    """`forward` through torch.compile, with its first call for each shape announced and its failures put in words."""

    def __init__(self, forward: Callable[..., Tensor], backend: str | Callable) -> None:
        self.forward = torch.compile(forward, backend=backend, dynamic=False)
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes = tuple(part.shape for part in (x, *args, *kwargs.values()) if isinstance(part, Tensor))
        if shapes in self.shapes:
            return self.forward(x, *args, **kwargs)
        print(f"compiling the UNet for an input of {' x '.join(map(str, x.shape))} ...", file=sys.stderr, flush=True)
        try:
            out = self.forward(x, *args, **kwargs)
        except Exception as error:
            if not _is_of_compiler(error):
                raise
            lines = [line.strip() for line in str(error).splitlines()]
            reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
            raise ValueError(f"torch.compile failed ({reason}): repair that, or leave --compile out") from error
        self.shapes.add(shapes)
        return out


def _is_of_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) or isinstance(
        error, subprocess.SubprocessError | FileNotFoundError
    )
