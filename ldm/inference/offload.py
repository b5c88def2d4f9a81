"""Keep text encoder and first stage off the accelerator: they are used once a batch, the UNet at every step."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ldm.latent_diffusion import LatentDiffusion

WAYS = ("cpu", "swap")


def offload(
    model: LatentDiffusion, way: str, device: str | torch.device, home: str | torch.device = "cpu"
) -> ExitStack:
    """Move the UNet to `device`, and the text encoder and the first stage to `home`, until the result is closed.

    `model.condition`, `encode` and `decode` take tensors from any device and return theirs on `device`. float16 weights
    become float32 where they compute on a CPU (see `precision`).

    Args:
        way: "cpu": the two compute at home and use no memory on the device. "swap": they stay at home, and copies of
            their weights are on the device while they compute; weights that are mapped from a file stay mapped.
    """
    if way not in WAYS:
        raise ValueError(f"offload {way!r} is unknown: it is one of {', '.join(WAYS)}")
    device, home = torch.device(device), torch.device(home)
    place = home if way == "cpu" else device  # where the two compute
    undo = ExitStack()
    _move(model.model, device, None, undo)
    text = model.cond_stage_model
    for network in (text, model.first_stage_model):
        if network is not None:
            half = place.type == "cpu" and any(p.dtype == torch.float16 for p in network.parameters())
            _move(network, home, torch.float32 if half else None, undo)
    # A first stage is not called as such: `encode` and `decode` call its parts.
    for network in (*model.first_stage_model.children(), *([] if text is None else [text])):
        Visit(place).hook(network, undo)
    return undo


def _move(network: nn.Module, device: torch.device, dtype: torch.dtype | None, undo: ExitStack) -> None:
    """Move the network, and let `undo` move it back."""
    if (first := next(network.parameters(), None)) is not None:
        undo.callback(network.to, first.device, None if dtype is None else first.dtype)
        network.to(device, dtype)


class Visit:
    """Hooks with which a network, and all in it, computes on `place`: copies of its weights are there while it does."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.at_home: list[tuple[nn.Module, str, Tensor]] = []  # what has a copy on `place` now

    def hook(self, network: nn.Module, undo: ExitStack) -> None:
        undo.callback(self.leave)  # after an interrupt, at which torch calls no hooks
        undo.callback(network.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
        undo.callback(network.register_forward_hook(self.leave, always_call=True).remove)

    def visitors(self, network: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
        """Return the tensors that are copied, with their modules and names."""
        found = []
        for module in network.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found += [(module, name, tensor) for name, tensor in own if tensor.device != self.place]
        return found

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.place)

    def enter(self, network: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for module, name, tensor in self.visitors(network):
            self.at_home.append((module, name, tensor))
            copy = self.copy(tensor.detach())
            setattr(module, name, nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)
        return self.inputs(args), self.inputs(kwargs)

    def inputs(self, given: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.place), given)

    def leave(self, *_: Any) -> None:
        while self.at_home:
            setattr(*self.at_home.pop())
