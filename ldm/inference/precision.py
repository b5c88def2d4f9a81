"""The number formats that a model computes in.

            UNet, text encoder                       first stage
full        float32                                  float32
bf16        bfloat16                                 float32
fp16        float16                                  float32
autocast    float32 weights, products in bfloat16    float32
            on a CPU, in float16 on a GPU

The first stage stays in float32: it runs once, not at every step, and it makes the pixels. With the digits model
bfloat16 there moves them by up to 3 levels of 255 and four times as much on average as bfloat16 in the UNet does over
20 steps, and in float16 some published first stages overflow. Samplers and guidance keep float32 in any case.

float16 is refused on a CPU, whose libraries do without it: a convolution of Stable Diffusion's UNet takes 140 times as
long as in float32 (AMD Zen 5, torch 2.15), where bfloat16 takes half of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ldm.latent_diffusion import LatentDiffusion

DTYPES = {"full": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}


def precision_of(model: LatentDiffusion) -> str:
    """The name of the precision that the model is in."""
    if _is_autocast(model.model):
        return "autocast"
    dtype = next(model.model.parameters()).dtype
    return next((name for name, own in DTYPES.items() if own == dtype), "full")


def set_precision(model: LatentDiffusion, name: str, device: str | torch.device | None = None) -> None:
    """Put the model into a precision: full, bf16, fp16 or autocast, as the table above says.

    Weights are cast tensor by tensor, so that there are never two copies of all. device: the UNet is moved there on the
    way; None leaves it where it is.

    Raises ValueError for an unknown name, float16 on a CPU, and a model whose weights were already rounded to another
    half precision.
    """
    if name not in DTYPES:
        raise ValueError(f"precision {name!r} is unknown: it is one of {', '.join(DTYPES)}")
    device = model.device if device is None else torch.device(device)
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 on a CPU takes a hundred times as long as full: use bf16, or full")
    own = precision_of(model)
    if own != name and own in ("bf16", "fp16"):
        raise ValueError(f"the model's weights are rounded to {own} already: load it again for precision {name}")
    model.model.to(device, DTYPES[name])
    networks = [model.model] if model.cond_stage_model is None else [model.model, model.cond_stage_model]
    for network in networks:
        network.to(DTYPES[name])
        if name == "autocast":
            network.forward = partial(_autocast, type(network).forward, network)
        elif _is_autocast(network):
            del network.forward


def _autocast(forward: Callable[..., Any], network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """forward(network, ...) under torch's automatic casting."""
    devices = (parameter.device.type for parameter in network.parameters())
    with torch.autocast(next(devices, "cpu")):  # what has no parameters computes nothing that is cast
        return forward(network, *args, **kwargs)


def _is_autocast(network: nn.Module) -> bool:
    own = vars(network).get("forward")
    return isinstance(own, partial) and own.func is _autocast
