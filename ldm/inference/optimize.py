"""The fast form of a model on a CPU: the same networks over the same weights, large layers in oneDNN's own form.

torch packs the weight of a convolution into oneDNN's layout at every call, which at low resolutions takes as long as
the convolution, and computes linear layers in float32 by MKL, which uses less than half of some CPUs. Both are avoided
where a layer's weight is packed once, at its first call, by torch's private operations `torch.ops.mkldnn`; a probe says
whether they are there and compute the same. docs/results/speed.md has what it brings.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from functools import cache
from threading import Lock
from timeit import repeat
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.latent_diffusion import DiffusionWrapper, LatentDiffusion
from ldm.settings import of_model

PACKED_FROM = 2**18  # numbers in a weight; the call of a private operation costs smaller layers what packing saves
WORTH_PACKING = 2**24  # numbers in the large layers of a model, below which a script saves less than packing takes
PAYS_AFTER = (
    8  # evaluations of the UNet; packing takes as long as 4 (Zen 5) to 9 (Zen 4) of them save, at 32 x 32 latents
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of what is packed: relative errors by rounding


def optimize(model: LatentDiffusion, consume: bool = False) -> LatentDiffusion:
    """Return the fast form of a model on a CPU, for inference, whose images agree within 1/255 in float32.

    It is a model of its own over the same weights: a change of them in place (a merged LoRA) is of both, unless made by
    `.data`, which torch does not count; a hook that is added later is of one. Where gradients or another precision are
    asked for, its layers compute plainly. Its last note says what was done.

    Args:
        consume: let it take the networks of `model`, every use of which is a ValueError from then on, and free the
            weight of each large layer when it is packed. It is unpacked where it is asked for: by saving, copying, a
            merged LoRA, another precision.

    Raises:
        ValueError: for a model on another device, one that is compiled, one in torch.autocast's precision, and one
            whose networks were taken.
    """
    check_plain(model)
    if consume:
        fast = copy(model)
        vars(model).clear()
        model.__class__ = Consumed
    else:
        modules = list(model.modules())
        hooks = [h for m in modules for kind in (m._forward_hooks, m._forward_pre_hooks) for h in kind.values()]
        shared = [*model.parameters(), *model.buffers(), *hooks, *model.changes, model.tokenizer]
        fast = deepcopy(model, {id(part): part for part in shared})
    layers = [layer for layer in large_layers(fast) if packs(layer.weight.dtype)]
    for layer in layers:
        to_packed(layer, consume)
    count = sum(layer.weight.numel() for layer in layers)
    does = f"{len(layers)} layers of {count / 1e6:.0f} M weights are packed for oneDNN"
    if layers and type(fast.model) is DiffusionWrapper:  # not CompVis's
        fast.model.__class__ = FastWrapper
        does += ", which computes the UNet's other products in float32, too" if routing_pays() else ""
    fast.notes = [*fast.notes, f"fast form: {does}" if layers else "fast form: as it was, no layer gains by packing"]
    return fast


def check_plain(model: LatentDiffusion) -> None:
    """Raise ValueError for a model that has no fast form."""
    if (kind := model.device.type) != "cpu":
        raise ValueError(f"ldm.optimize is for a CPU, and this model is on {kind}: leave it out")
    if getattr(model.model, "autocast", False):  # which CompVis's wrapper lacks
        raise ValueError("ldm.optimize has no use for precision autocast: use full or bf16, or leave it out")
    if any(vars(module).get("_compiled_call_impl") is not None for module in model.modules()):
        raise ValueError("this model is compiled, which its fast form would not be: compile it or optimize it")


def large_layers(model: LatentDiffusion) -> list[Any]:
    """Return the layers of the UNet that gain by packing.

    The first stage's do not, whose maps are large beside its weights, nor the text encoder's, which runs once. A layer
    that a hook prepares may get another weight at each call.
    """
    modules: list[Any] = list(model.model.modules())
    found = [m for m in modules if type(m) in (nn.Conv2d, nn.Linear) and m.weight.numel() >= PACKED_FROM]
    found = [m for m in found if not m._forward_pre_hooks and "forward" not in vars(m)]
    return [m for m in found if isinstance(m, nn.Linear) or (m.padding_mode == "zeros" and type(m.padding) is tuple)]


def gains(model: LatentDiffusion, batches: int | None = None, steps: int | None = None) -> bool:
    """Return whether a script packs a model: its large layers are worth it, and the memory for them is free.

    batches, steps: of the run; None where there are many, and for the model's own.
    """
    weights = [layer.weight for layer in large_layers(model)]
    if sum(map(Tensor.numel, weights)) < WORTH_PACKING or not any(packs(weight.dtype) for weight in weights):
        return False
    if batches is not None and batches * (of_model(model.defaults)["steps"] if steps is None else steps) < PAYS_AFTER:
        return False
    import psutil  # small models do without

    needed, free = sum(weight.nbytes for weight in weights), psutil.virtual_memory().available
    if 1.5 * needed > free:
        sizes = f"they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        print(f"note: the weights are not packed for this CPU, as by default: {sizes}", file=sys.stderr)
        return False
    return True


class Consumed:
    """A model whose networks `optimize(consume=True)` took: every use is refused."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            "this model gave its networks to ldm.optimize(consume=True): use what it returned, or load the model again"
        )


class Held(NamedTuple):
    """A weight in oneDNN's form for inputs of a size; what it was made of, and that, lest its address be used again."""

    packed: Tensor
    size: Any
    made_of: tuple[int, int] | None = None
    source: Tensor | None = None


class _Packed(nn.Module):
    """A layer with its weight in oneDNN's form, packed at the first call, and again when the weight is another.

    It has the parameters of the plain layer, and computes as that does wherever the packed weight does not serve.
    """

    frees: bool  # whether the plain weight is freed, and None among the parameters, while it is packed
    precision: torch.dtype  # in which it is packed, as `packs` says that it may be
    held: Any = None  # Held, once packed

    def pack(self, weight: Tensor, size: list[int]) -> Tensor:
        """Return a weight in the form for inputs of that size."""
        raise NotImplementedError

    def packed_for(self, x: Tensor, size: Any = None) -> Tensor | None:
        """Return the packed weight for an input; None where it does not serve.

        size: what of the input's size the form depends on; it does not serve other sizes well.
        """
        weight, bias, held = self._parameters["weight"], self._parameters["bias"], self.held
        parts = [part for part in (x, held.packed if weight is None else weight, bias) if part is not None]
        trains = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if trains or any(not p.is_cpu or p.dtype != self.precision for p in parts) or x.numel() == 0:
            return None
        made_of = None if weight is None else (weight.data_ptr(), _version(weight))
        if held is None or held.size != size or (weight is not None and held.made_of != made_of):
            source = held.packed.to_dense() if weight is None else weight.detach()
            with torch.no_grad():
                packed = self.pack(source, list(x.shape))
            self.held = held = Held(packed, size) if self.frees else Held(packed, size, made_of, source)
            if self.frees:
                self._parameters["weight"] = None
        return held.packed

    def unpack(self) -> None:
        """Hold the plain weight again where it was freed, until the next call."""
        if self._parameters["weight"] is None:
            with torch.inference_mode(False):  # gradients may pass through it
                self._parameters["weight"] = nn.Parameter(self.held.packed.to_dense(), requires_grad=False)
            self.held = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: oneDNN's form cannot be copied, the copy packs its own."""
        self.unpack()
        return {name: value for name, value in vars(self).items() if name != "held"}

    def _apply(self, *args: Any, **options: Any) -> Any:  # what moves a layer, or converts it
        self.unpack()
        return super()._apply(*args, **options)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution whose weight is packed for the size, but not the number, of its images."""

    def pack(self, weight: Tensor, size: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, size
        )

    def forward(self, input: Tensor) -> Tensor:
        packed = self.packed_for(input, input.shape[2:]) if input.ndim == 4 else None
        if packed is None:
            return super().forward(input)
        where = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise.default(input, packed, self.bias, *where, "none", [], "")


class PackedLinear(_Packed, nn.Linear):
    """A linear layer whose weight is packed."""

    def pack(self, weight: Tensor, size: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, input: Tensor) -> Tensor:
        packed = self.packed_for(input)
        if packed is None:
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise.default(input, packed, self.bias, "none", [], "")


def to_packed(layer: Any, frees: bool) -> None:
    """Let a layer compute with its weight packed."""
    layer.__class__ = PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
    layer.frees, layer.precision = frees, layer.weight.dtype


def _version(weight: Tensor) -> int:
    """Return how often a weight was changed in place; inference mode does not count."""
    return 0 if weight.is_inference() else weight._version


@cache
@torch.inference_mode()
def packs(dtype: torch.dtype) -> bool:
    """Return whether torch's private operations are there, and compute the same as the layers of that dtype."""
    if dtype not in TOLERANCES or not torch.backends.mkldnn.is_available():
        return False
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they are
        torch.manual_seed(0)
        x, layers = torch.randn(2, 32, 8, 8), [nn.Conv2d(32, 48, 3, padding=1), nn.Linear(8, 48)]
    try:
        for layer in layers:
            expected = layer(x)
            to_packed(layer.to(dtype), False)
            if not _error(layer(x.to(dtype)), expected) < TOLERANCES[dtype]:
                return False
        return True
    except (AttributeError, RuntimeError, TypeError):  # another torch: no such operation, or with other arguments
        return False


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error."""
    return float((found.double() - exact).norm() / exact.norm())


@cache
@torch.inference_mode()
def routing_pays() -> bool:
    """Return whether oneDNN computes attention in float32 exactly, and at least a tenth faster than torch's default.

    The setting is called bf16 and on some CPUs means it. 20 ms.
    """
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return False
    small = torch.randn(3, 1, 4, 512, 40, generator=torch.Generator().manual_seed(0))
    kinds = (F.scaled_dot_product_attention, lambda q, k, v: q @ k.mT)
    exact = [product(*small.double()) for product in kinds]
    plain = min(repeat(lambda: kinds[0](*small), number=1, repeat=4))
    with routed():
        errors = [_error(product(*small), own) for product, own in zip(kinds, exact, strict=True)]
        return max(errors) < 1e-6 and min(repeat(lambda: kinds[0](*small), number=1, repeat=4)) < 0.9 * plain


_lock = Lock()
_calls: list[str] = []  # of `routed`: the setting that was found, once for each call that is running


@contextmanager
def routed() -> Iterator[None]:
    """Let oneDNN compute float32 products, in all threads, until the last of these blocks that run at once ends."""
    backend: Any = torch.backends.mkldnn
    with _lock:
        _calls.append(_calls[0] if _calls else backend.matmul.fp32_precision)
        backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            found = _calls.pop()
            if not _calls:
                backend.matmul.fp32_precision = found


class FastWrapper(DiffusionWrapper):
    """What calls the UNet of a fast form: with maps as (b, h, w, c), which oneDNN prefers; routed where that pays."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        with routed() if routing_pays() else nullcontext():
            return super().forward(x.contiguous(memory_format=torch.channels_last), *args, **options).contiguous()
