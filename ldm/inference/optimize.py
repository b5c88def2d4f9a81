"""The fast form of a model on a CPU: the same networks over the same weights, large layers in oneDNN's own form.

torch packs the weight of a convolution into oneDNN's layout at every call, which at low resolutions takes as long as
the convolution, and computes linear layers in float32 by MKL, which uses less than half of some CPUs. Both are avoided
where a layer's weight is packed once, at its first call, by torch's private operations `torch.ops.mkldnn`; a probe says
whether they are there and compute the same. docs/results/speed.md has what it brings.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import cache
from threading import Lock
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion

PACKED_FROM = 2**18  # numbers in a weight; the call of a private operation costs smaller layers what packing saves
WORTH_PACKING = 2**24  # numbers in the large layers of a model, below which a script saves less than packing takes
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
}  # of what is packed: relative errors by rounding
GONE = (
    "the weights of this model were packed by ldm.optimize(consume=True), for inference alone and in their precision: "
    "use what it returned, or load the model again"
)


def optimize(model: LatentDiffusion, consume: bool = False) -> LatentDiffusion:
    """Return the fast form of a model on a CPU, for inference, whose images agree within 1/255 in float32.

    It is a model of its own over the same weights: a change of them in place (a merged LoRA) is of both, unless made by
    `.data`, which torch does not count; a hook that is added later is of one. Where gradients or another precision are
    asked for, its layers compute plainly. Its last note says what was done.

    Args:
        consume: give the weights of large layers to the fast form, which frees each when it is packed. Whatever touches
            those of `model`, or of the fast form once they are packed, is refused by a ValueError.

    Raises:
        ValueError: for a model on another device, one that is compiled, one in torch.autocast's precision, and one
            whose weights were consumed.
    """
    check_plain(model)
    modules = list(model.modules())
    hooks = [h for m in modules for kind in (m._forward_hooks, m._forward_pre_hooks) for h in kind.values()]
    shared = [*model.parameters(), *model.buffers(), *hooks, *model.changes, model.tokenizer]
    memo: dict[int, Any] = {id(part): part for part in shared}
    layers = [layer for layer in large_layers(model) if packs(layer.weight.dtype)]
    for layer in layers:
        memo[id(layer)] = (PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear).of(layer, consume)
    fast = deepcopy(model, memo)
    count = sum(layer.weight.numel() for layer in layers)
    does = f"{len(layers)} layers of {count / 1e6:.0f} M weights are packed for oneDNN"
    if layers and routing_pays():
        fast.__class__ = type(f"Routed{type(model).__name__}", (_Routed, type(model)), {"__module__": __name__})
        does += ", and it computes the other products in float32, too"
    if consume:
        for layer in layers:
            layer._parameters["weight"] = Gone.like(layer.weight)  # no module takes it as a parameter otherwise
    fast.notes = [*model.notes, f"fast form: {does}" if layers else "fast form: as it was, no layer gains by packing"]
    return fast


def check_plain(model: LatentDiffusion) -> None:
    """Raise ValueError for a model that has no fast form."""
    if (kind := model.device.type) != "cpu":
        raise ValueError(f"ldm.optimize is for a CPU, and this model is on {kind}: leave it out")
    if getattr(model.model, "autocast", False):  # which CompVis's wrapper lacks
        raise ValueError("ldm.optimize has no use for precision autocast: use full or bf16, or leave it out")
    if any(vars(module).get("_compiled_call_impl") is not None for module in model.modules()):
        raise ValueError("this model is compiled, which its fast form would not be: compile it or optimize it")
    if any(isinstance(part, Gone) for module in model.modules() for part in module._parameters.values()):
        raise ValueError(GONE)


def large_layers(model: LatentDiffusion) -> list[Any]:
    """Return the layers of the UNet that gain by packing.

    The first stage's do not, whose maps are large beside its weights, nor the text encoder's, which runs once. A layer
    that a hook prepares may get another weight at each call.
    """
    modules: list[Any] = list(model.model.modules())
    found = [m for m in modules if type(m) in (nn.Conv2d, nn.Linear) and m.weight.numel() >= PACKED_FROM]
    found = [m for m in found if not m._forward_pre_hooks and "forward" not in vars(m)]
    fit = [m for m in found if isinstance(m, nn.Linear) or (m.padding_mode == "zeros" and type(m.padding) is tuple)]
    return list(dict.fromkeys(fit))


def gains(model: LatentDiffusion) -> bool:
    """Return whether a script packs a model: its large layers are worth it, and the memory for them is free."""
    weights = [layer.weight for layer in large_layers(model)]
    if sum(map(Tensor.numel, weights)) < WORTH_PACKING or not any(packs(weight.dtype) for weight in weights):
        return False
    import psutil  # small models do without

    needed, free = sum(weight.nbytes for weight in weights), psutil.virtual_memory().available
    if 1.5 * needed > free:
        sizes = f"they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        print(f"note: the weights are not packed for this CPU, as by default: {sizes}", file=sys.stderr)
        return False
    return True


class Gone(Tensor):
    """In place of a weight that was packed and freed: it has its shape and dtype, and any other use is refused."""

    KNOWN = ("shape", "dtype", "device", "requires_grad", "is_cpu", "ndim", "nbytes", "layout", "is_sparse")

    @classmethod
    def like(cls, weight: Tensor) -> "Gone":
        """Return one of that shape and dtype, which takes no memory."""
        return Tensor._make_subclass(cls, torch.empty((), dtype=weight.dtype).expand(weight.shape), False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        getters = [getattr(Tensor, name).__get__ for name in cls.KNOWN]
        if func in (*getters, Tensor.numel, Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.__repr__):
            with torch._C.DisableTorchFunctionSubclass():
                return "Gone()" if func is Tensor.__repr__ else func(*args, **(kwargs or {}))
        raise ValueError(GONE)


class _Packed(nn.Module):
    """A layer with its weight in oneDNN's form too, packed at the first call, and again when the weight is another.

    It has the parameters of the plain layer, and computes as that does wherever the packed weight does not serve.
    """

    weight: Any
    bias: Any
    consume: bool  # whether the plain weight is freed when it is packed
    precision: torch.dtype  # in which it is packed, as `packs` says that it may be
    packed: Any = None
    made_of: Any = None  # what of the input's size, and of which weight
    source: Any = None  # that weight, kept lest another come to lie at its address; it shares the layer's memory

    @classmethod
    def of(cls, plain: nn.Module, consume: bool) -> Any:
        """Return a plain layer's packed form, with the same parameters, and copies of its hooks."""
        own: Any = cls.__new__(cls)
        vars(own).update({name: copy(v) if isinstance(v, dict) else v for name, v in vars(plain).items()})
        own.consume, own.precision = consume, own.weight.dtype
        return own

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: oneDNN's form cannot be copied, the copy packs its own."""
        return {name: value for name, value in vars(self).items() if name not in ("packed", "made_of", "source")}

    def pack(self, weight: Tensor, size: list[int]) -> Tensor:
        """Return a weight in the form for inputs of that size."""
        raise NotImplementedError

    def packed_for(self, x: Tensor, size: Any = None) -> Tensor | None:
        """Return the packed weight for an input; None where it does not serve.

        size: what of the input's size the form depends on; it does not serve other sizes well.
        """
        weight = self.weight
        parts = [part for part in (x, weight, self.bias) if part is not None]
        trains = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if trains or any(part.dtype != self.precision for part in parts) or x.device != weight.device or x.numel() == 0:
            return None
        freed = isinstance(weight, Gone)
        made_of = (size,) if freed else (size, weight.data_ptr(), _version(weight))
        if self.packed is None or made_of != self.made_of:
            with torch.no_grad():
                self.packed = self.pack(self.packed.to_dense() if freed else weight.detach(), list(x.shape))
            self.made_of, self.source = made_of, None if freed or self.consume else weight.detach()
            if self.consume and not freed:
                parameters: dict[str, Any] = self._parameters
                parameters["weight"], self.made_of = Gone.like(weight), (size,)
        return self.packed


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


def _version(weight: Tensor) -> int:
    """Return how often a weight was changed in place; inference mode does not count."""
    return 0 if weight.is_inference() else weight._version


@cache
def packs(dtype: torch.dtype) -> bool:
    """Return whether torch's private operations are there, and compute the same as the layers of that dtype."""
    if dtype not in TOLERANCES or not torch.backends.mkldnn.is_available():
        return False
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they are
        torch.manual_seed(0)
        x, conv, linear = torch.randn(2, 32, 8, 8).to(dtype), nn.Conv2d(32, 48, 3, padding=1), nn.Linear(32, 48)
    conv, linear, tokens = conv.to(dtype), linear.to(dtype), x.flatten(2).mT
    try:
        with torch.inference_mode():
            found = PackedConv2d.of(conv, False)(x), PackedLinear.of(linear, False)(tokens)
            exact = conv.double()(x.double()), linear.double()(tokens.double())
            return max(map(_error, found, exact)) < TOLERANCES[dtype]
    except (AttributeError, RuntimeError, TypeError):  # another torch: no such operation, or with other arguments
        return False


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error."""
    return float((found.double() - exact).norm() / exact.norm())


@cache
def routing_pays() -> bool:
    """Return whether oneDNN computes attention in float32 exactly, and at least a tenth faster than torch's default.

    The setting is called bf16 and on some CPUs means it. 20 ms.
    """
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 512, 40, generator=generator)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    product = q[0, 0].double() @ k[0, 0].T.double()

    def seconds() -> float:
        found = []
        for _ in range(4):
            start = perf_counter()
            F.scaled_dot_product_attention(q, k, v)
            found.append(perf_counter() - start)
        return min(found)

    with torch.inference_mode():
        before = seconds()
        with routed():
            errors = _error(F.scaled_dot_product_attention(q, k, v), exact), _error(q[0, 0] @ k[0, 0].T, product)
            return max(errors) < 1e-6 and seconds() < 0.9 * before


_lock = Lock()
_calls: list[str] = []  # of `routed`: the setting that was found, once for each call that is running


@contextmanager
def routed() -> Iterator[None]:
    """Let oneDNN compute float32 products, in all threads, until the last of these blocks that run at once ends."""
    backend: Any = torch.backends.mkldnn
    setting = backend.matmul
    with _lock:
        _calls.append(_calls[0] if _calls else setting.fp32_precision)
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            found = _calls.pop()
            if not _calls:
                setting.fp32_precision = found


class _Routed(LatentDiffusion):
    """What comes before the class of a model in its fast form where routing pays: its calls are `routed`."""

    def apply_model(self, *args: Any, **options: Any) -> Any:
        with routed():
            return super().apply_model(*args, **options)

    def condition(self, *args: Any, **options: Any) -> Any:
        with routed():
            return super().condition(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        with routed():
            return super().decode(*args, **options)

    def encode(self, *args: Any, **options: Any) -> Any:
        with routed():
            return super().encode(*args, **options)
