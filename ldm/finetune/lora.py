"""LoRA: chosen layers of a network are changed by matrices of low rank, learned beside them (Hu et al. 2021,
https://arxiv.org/abs/2106.09685, section 4.1):

    W' = W + strength * alpha / rank * up @ down        up (out, rank), down (rank, in)

For a k x k convolution, down is one of k x k to `rank` channels and up one of 1 x 1 (LoCon; Yeh et al. 2023,
https://arxiv.org/abs/2309.14859). The network keeps its modules, their classes and the names of its parameters: an
adapter hooks onto the layer that it changes, or is merged into its weights.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from ldm.changes import Change
from ldm.checkpoint.tensors import check_finite
from ldm.conditioning.text import TextEncoder
from ldm.models.clip import StackedAttention

# Groups of layers by name; `attach` takes regular expressions too. diffusers' scripts train the first two, sd-scripts
# feed-forward layers and projections too, and convolutions optionally.
TARGETS = {
    "attention": r"\battn[12]\.to_(q|k|v|out\.0)$",
    "text": r"\b(self_)?attn\.(q|k|v|out)_proj$",
    "feed_forward": r"\bff\.net\.(0\.proj|2)$",
    "text_feed_forward": r"\bmlp\.(fc1|fc2|c_fc|c_proj)$",
    "projection": r"\bproj_(in|out)$",
    "convolution": r"\b(in_layers\.2|out_layers\.3|skip_connection|op|conv)$",
}
MAX_RANK = 2**13  # more than the width of any layer that is adapted
DEFAULT_TARGETS = ("attention", "text")


class Place(NamedTuple):
    """A layer that can be adapted, its weight's name, and which third of the weight where q, k and v are stacked."""

    layer: Any  # nn.Linear, nn.Conv2d or StackedAttention
    parameter: str
    part: int | None = None

    def part_of(self, weight: Tensor) -> Tensor:
        """Return the part of the layer's weight that an adapter at this place changes, as a view."""
        return weight if self.part is None else weight.chunk(3)[self.part]

    @property
    def weight(self) -> Tensor:
        """The weight that an adapter at this place changes: (out, in), or (out, in, k, k) of a convolution."""
        return self.part_of(self.layer.weight if self.part is None else self.layer.in_proj_weight)


class Adapter(nn.Module):
    """The change of one layer: scale * up(down(x)), with scale = strength * alpha / rank.

    Args:
        down: (rank, in), or (rank, in, k, k) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        strength: may be set at any time.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, strength: float = 1.0) -> None:
        super().__init__()
        if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != len(down) or math.prod(up.shape[2:]) != 1:
            raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are not two matrices of one rank")
        if len(down) == 0 or not math.isfinite(alpha):
            raise ValueError(f"rank {len(down)} must be at least 1, and alpha {alpha} finite")
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.alpha, self.strength = alpha, strength
        self._remove: Callable[[], None] | None = None  # takes it off its layer
        self.merged: float | None = None  # the strength at which it is in the layer's weights

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing at any strength."""
        return self.alpha == 0 or not (self.down.any() and self.up.any())

    @property
    def applied(self) -> float | None:
        """The strength at which it changes its layer now, merged or not; None if it does not."""
        return self.strength if self._remove is not None else self.merged

    def forward(self, x: Tensor, layer: Any) -> Tensor:
        """Return what is added to the layer's output for its input x, in the adapter's dtype, or autocast's."""
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.dtype)
        if self.down.ndim == 2:
            return F.linear(self.scale * F.linear(x, self.down), self.up)  # (..., rank), (..., out)
        h = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)  # (b, rank, h, w)
        return F.conv2d(self.scale * h, self.up)  # (b, out, h, w)

    def delta(self) -> Tensor:
        """Return scale * up @ down in float32: (out, in), or (out, in, k, k)."""
        up = self.up.detach().float().flatten(1)  # (out, rank)
        return self.scale * einsum(up, self.down.detach().float(), "o r, r ... -> o ...")

    def connect(self, place: Place) -> None:
        """Add the change to the layer's output from now on."""
        assert self._remove is None, "an adapter is at one layer"
        self.to(place.weight.device)
        module = place.layer if place.part is None else place.layer.projection
        self._remove = module.register_forward_hook(partial(self._hook, part=place.part)).remove

    def disconnect(self) -> None:
        """Remove the change from the layer, if it is at one."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    def _hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Any, part: int | None) -> Any:
        own = output if part is None else output[part]
        own = own + self(inputs[0], layer).to(own.dtype)
        return own if part is None else (*output[:part], own, *output[part + 1 :])


def places(network: nn.Module) -> dict[str, Place]:
    """Return all layers of a network that can be adapted, by name: its linear layers and 2D convolutions.

    The three parts of OpenCLIP's `attn.in_proj_weight` are named `attn.q_proj`, `attn.k_proj`, `attn.v_proj`. A
    LatentDiffusion's first stage is left out, as LoRA files have no names for it, and so are the text encoder's blocks
    after the one whose output it returns.
    """
    found = {}
    encoders = [module for module in network.modules() if isinstance(module, TextEncoder) and not module.pooled]
    unread = {layer for own in encoders for block in own.tower.blocks()[own.state :] for layer in block.modules()}
    for name, module in network.named_modules():
        if module in unread or name.startswith("first_stage_model."):
            continue
        dot = f"{name}." if name else ""
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = Place(module, f"{dot}weight")
        elif isinstance(module, StackedAttention):
            for i, part in enumerate("qkv"):
                found[f"{dot}{part}_proj"] = Place(module, f"{dot}in_proj_weight", i)
    return found


def select(names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the names that match a target: a group of `TARGETS`, or a regular expression searched in the name."""
    chosen = set()
    for target in targets:
        try:
            fitting = {name for name in names if re.search(TARGETS.get(target, target), name)}
        except re.error as error:
            raise ValueError(f"target {target!r} is not a regular expression: {error}") from None
        if not fitting and target not in TARGETS:  # a group may be empty, as "text" is in a UNet
            raise ValueError(
                f"target {target!r} fits no layer: it is one of {', '.join(TARGETS)}, or a regular expression for "
                f"names such as {', '.join(list(names)[:3])}"
            )
        chosen |= fitting
    if not chosen:
        raise ValueError(f"the network has no layers to adapt among {', '.join(targets)}")
    return [name for name in names if name in chosen]


def attach(
    network: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = DEFAULT_TARGETS, seed: int = 0
) -> dict[str, Adapter]:
    """Add trainable adapters to the chosen layers of a network, and return them by the layers' names.

    They are not part of the network's parameters, of its `state_dict` or of what its `to` moves, and nothing of the
    network is frozen. At first they change nothing (Hu et al. 2021, section 4.1: down is normal, here with standard
    deviation 1 / rank, and up is zero). They are float32 on the layers' device. A LatentDiffusion records them.

    Args:
        network: a LatentDiffusion, if the adapters are to be saved by `lora_files.save_lora`; or any other.
        rank, alpha: the inner size of an adapter; its change is multiplied by alpha / rank. None is `rank`.
        targets: see `select`.
        seed: of the initial weights.
    """
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} must be at least 1 and at most {MAX_RANK}")
    found = places(network)
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name in select(list(found), targets):
        shape = found[name].weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) / rank
        up = torch.zeros(shape[0], rank, *[1] * len(shape[2:]))
        adapters[name] = Adapter(down, up, rank if alpha is None else alpha)
    connect(network, adapters)
    changes = getattr(network, "changes", None)
    if changes is not None:  # a LatentDiffusion; of a part alone, the model is not known
        changes.append(AttachedLora(adapters))
    return adapters


class AttachedLora(NamedTuple):
    """An entry of `model.changes`: adapters without a file, which may be trained."""

    adapters: Mapping[str, Adapter]

    def current(self) -> Change | None:
        """Return the change with the hash of the adapters as they are now; None while they change nothing."""
        digest = hashlib.sha256()
        used = {name: own for name, own in self.adapters.items() if own.applied and not own.is_zero}
        for name, own in sorted(used.items()):
            digest.update(f"{name} {own.applied} {own.alpha}".encode())
            for matrix in (own.down, own.up):
                digest.update(matrix.detach().float().cpu().numpy().tobytes())
        return Change("lora", "attached", digest.hexdigest()[:10]) if used else None


def connect(network: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Add adapters to the layers of these names; changes of adapters that are already there add up."""
    found = places(network)
    for name, adapter in adapters.items():
        adapter.connect(found[name])


def detach(adapters: Mapping[str, Adapter]) -> None:
    """Remove adapters from their layers; the network is as it was without them, bit for bit."""
    for adapter in adapters.values():
        adapter.disconnect()


class Replaced(dict[str, Tensor]):
    """The former weights that a `merge` replaced, by parameter, and the adapters that it merged.

    Of a sample of the weights that these change, `changed` is how many there are, and `differ` how many are others
    after rounding.
    """

    def __init__(self, weights: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> None:
        super().__init__(weights)
        self.adapters = list(adapters)
        self.changed = self.differ = 0

    def __or__(self, other: "Replaced") -> "Replaced":
        return Replaced(super().__or__(other), self.adapters + other.adapters)


@torch.no_grad()
def merge(network: nn.Module, adapters: Mapping[str, Adapter], dtype: torch.dtype | None = None) -> Replaced:
    """Add adapters to the weights, at their strengths, and remove them from their layers; `restore` undoes it.

    Each weight is computed in float32 (or its own dtype, if wider) and rounded to its dtype once. ValueError, with the
    network as it was without the adapters, where one becomes infinite.

    dtype: that the weights are rounded to in the end, for the count of those that differ.
    """
    detach(adapters)
    found, kept = places(network), Replaced({}, list(adapters.values()))
    for name, adapter in adapters.items():
        place, adapter.merged = found[name], adapter.strength
        parameter = network.get_parameter(place.parameter)
        if place.parameter not in kept:
            kept[place.parameter] = parameter.data
            parameter.data = parameter.data.clone()
        part = place.part_of(parameter.data)
        delta = adapter.delta().to(part.device)
        changed = part.to(torch.promote_types(part.dtype, torch.float32)) + delta
        try:
            check_finite(f"LoRA at strength {adapter.strength:g}: the merged model", {name: changed}, part.dtype)
        except ValueError:
            restore(network, kept)
            raise
        some, last = slice(None, None, max(1, part.numel() >> 14)), part.dtype if dtype is None else dtype
        before, after = (weight.flatten()[some].to(part.dtype).to(last) for weight in (part, changed))
        kept.changed += int(delta.flatten()[some].count_nonzero())
        kept.differ += int((before != after).count_nonzero())
        part.copy_(changed)
    return kept


def restore(network: nn.Module, kept: Replaced) -> None:
    """Undo `merge`, bit for bit; after several, the last one first (or all at once with `last | ... | first`)."""
    for name, original in kept.items():
        parameter = network.get_parameter(name)
        parameter.data = original.to(parameter.device, parameter.dtype)
    for adapter in kept.adapters:
        adapter.merged = None


class Resized(NamedTuple):
    """An adapter of a smaller rank, and the squared norms of its change and of the original's."""

    adapter: Adapter
    kept: float
    total: float


@torch.no_grad()
def resized(adapter: Adapter, rank: int) -> Resized:
    """Return the nearest adapter of that rank, by singular values (Eckart & Young 1936), with the same alpha / rank.

    An adapter of at most that rank is returned as it is.
    """
    up, down = (matrix.double().flatten(1) for matrix in (adapter.up, adapter.down))  # (out, r), (r, in * k * k)
    # up @ down = q_up (r_up @ r_down^T) q_down^T: the decomposition of a small matrix
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    energy = (adapter.scale * s).square()
    if rank >= adapter.rank:
        return Resized(adapter, energy.sum().item(), energy.sum().item())
    root = s[:rank].sqrt()  # half of each singular value goes to up, half to down
    new_up = ((q_up @ u[:, :rank]) * root).reshape(-1, len(root), *adapter.up.shape[2:])
    new_down = (root[:, None] * (vh[:rank] @ q_down.T)).reshape(-1, *adapter.down.shape[1:])
    dtype = adapter.down.dtype
    smaller = Adapter(new_down.to(dtype), new_up.to(dtype), adapter.alpha * len(root) / adapter.rank, adapter.strength)
    return Resized(smaller, energy[:rank].sum().item(), energy.sum().item())
