"""Faster forms of the same arithmetic: the layout of tensors in memory, and torch.compile."""

from collections.abc import Callable
from contextlib import ExitStack

import torch

from ldm.inference.ahead_of_time import compile_ahead
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.compiler import compile_calls


def channels_last(model: LatentDiffusion) -> ExitStack:
    """Lay out convolutions of UNet and first stage as (b, h, w, c), faster on CPUs and GPUs, until it is closed."""
    undo = ExitStack()
    for network in (model.model, model.first_stage_model):
        network.to(memory_format=torch.channels_last)
        undo.callback(network.to, memory_format=torch.contiguous_format)
    return undo


def compile_unet(model: LatentDiffusion, backend: str | Callable = "inductor") -> ExitStack:
    """Run the UNet through torch.compile, until the result is closed; a small one on a CPU from a file that is kept.

    It is compiled at the first call for each shape of its inputs, which takes a minute or two and is announced on
    stderr. A failure of the compiler (no C++ compiler, no Triton, an unknown operation) is then a ValueError.
    """
    unet = model.model.diffusion_model
    undo = compile_calls(unet, "--compile", backend, name="UNet")
    if backend == "inductor":
        compile_ahead(unet, "--compile", "UNet")
    return undo
