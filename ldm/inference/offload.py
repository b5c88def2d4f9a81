"""Keeping text encoder and first stage off the accelerator: they are used once a batch, the UNet at every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.distributions import DiagonalGaussianDistribution

WAYS = ("cpu", "swap")


def offload(model: LatentDiffusion, way: str, device: str | torch.device, home: str | torch.device = "cpu") -> None:
    """Move the UNet to `device`, and the text encoder and the first stage to `home`.

    way: "cpu": they compute at home, which costs no memory on the device. "swap": they wait at home, and their weights
    are on the device while `model.condition`, or `encode` or `decode` of the first stage, runs. Only copies go there:
    nothing comes back, and weights that are mapped from a file stay so.

    Either way these three take tensors from anywhere and give theirs on `device`. float16 weights are widened to
    float32 where they compute on a CPU (see `precision`).
    Raises ValueError for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"offload {way!r} is unknown: it is one of {', '.join(WAYS)}")
    device, home = torch.device(device), torch.device(home)
    place = home if way == "cpu" else device  # where they compute
    model.model.to(device)
    if model.cond_stage_model is not None:
        _prepare(model.cond_stage_model, home, place)
        model.condition = partial(_elsewhere, model.condition, model.cond_stage_model, place, device)
    first_stage = model.first_stage_model
    _prepare(first_stage, home, place)
    first_stage.encode = partial(_elsewhere, first_stage.encode, first_stage, place, device)
    first_stage.decode = partial(_elsewhere, first_stage.decode, first_stage, place, device)


def _prepare(network: nn.Module, home: torch.device, place: torch.device) -> None:
    narrow = place.type == "cpu" and any(parameter.dtype == torch.float16 for parameter in network.parameters())
    network.to(home, torch.float32 if narrow else None)


def _elsewhere(
    function: Callable[..., Any],
    network: nn.Module,
    place: torch.device,
    device: torch.device,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """function(...) with its tensors and the network's weights on `place`, the result moved to `device`."""
    args, kwargs = _to(args, place), _to(kwargs, place)
    with _weights_on(network, place):
        result = function(*args, **kwargs)
    return _to(result, device)


@contextmanager
def _weights_on(network: nn.Module, place: torch.device) -> Iterator[None]:
    """Copies of all parameters and buffers that are elsewhere, on `place`; then the originals again."""
    kept = []
    try:
        for module in network.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.device != place:
                    kept.append((module, name, tensor))
                    copy = tensor.detach().to(place)
                    setattr(module, name, nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)
        yield
    finally:
        for module, name, tensor in kept:
            setattr(module, name, tensor)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors, and those in mappings, lists, tuples and distributions, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(part, device) for part in value)
    if isinstance(value, DiagonalGaussianDistribution):
        parameters = torch.cat([value.mean, value.logvar], dim=1).to(device)
        return DiagonalGaussianDistribution(parameters, value.deterministic)
    return value
