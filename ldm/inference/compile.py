"""Faster forms of the same arithmetic: the layout of tensors in memory, and torch.compile."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.compiler import compiler_failures


def channels_last(model: LatentDiffusion) -> ExitStack:
    """Lay out convolutions of UNet and first stage as (b, h, w, c), faster on CPUs and GPUs, until it is closed."""
    undo = ExitStack()
    for network in (model.model, model.first_stage_model):
        network.to(memory_format=torch.channels_last)
        undo.callback(network.to, memory_format=torch.contiguous_format)
    return undo


def compile_unet(model: LatentDiffusion, backend: str | Callable = "inductor") -> ExitStack:
    """Run the UNet through torch.compile, until the result is closed.

    It is compiled at the first call for each shape of its inputs, which takes about a minute and is announced on
    stderr. A failure of the compiler (no C++ compiler, no Triton, an unknown operation) is then a ValueError.
    """
    wrapper, unet = model.model, model.model.diffusion_model
    undo = ExitStack()
    undo.callback(wrapper.register_forward_pre_hook(partial(_warm_up, set()), with_kwargs=True).remove)
    unet.compile(backend=backend, dynamic=False)
    undo.callback(vars(unet).pop, "_compiled_call_impl")  # torch has no call that takes it back
    return undo


def _warm_up(compiled: set[tuple[torch.Size, ...]], wrapper: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Compile for these shapes of inputs, once; not in a copied or unpickled model, which is uncompiled."""
    shapes = tuple(part.shape for part in (*args, *kwargs.values()) if isinstance(part, Tensor))
    if shapes not in compiled and wrapper.diffusion_model._compiled_call_impl is not None:
        size = " x ".join(map(str, shapes[0]))
        print(f"compiling the UNet for an input of {size} ...", file=sys.stderr, flush=True)
        with compiler_failures("--compile"):
            wrapper.forward(*args, **kwargs)
        compiled.add(shapes)
