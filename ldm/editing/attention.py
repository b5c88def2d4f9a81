"""Hooks on the attention of a UNet: they see the conditional half of each of its calls, and may replace the output.

Whatever kernel computes (`ldm.models.kernels.set_attention`), a hook that needs the weights of a layer computes that
layer's attention once more, written out: fused kernels do not show them. Nothing in the model changes, and other
threads are not affected.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.attention_layers import Layer, attention_layers
from ldm.models.compiler import uncompiled


class Call(NamedTuple):
    """A call of the UNet: its timestep, the share of the time that has passed before it, and the size of its input."""

    t: float
    passed: float
    height: int
    width: int

    def sigma(self, model: Any) -> float:
        """Return the noise level."""
        if model.prediction != "flow":
            return model.schedule.sigma_at(self.t)
        return self.t / max(model.schedule.T - self.t, 1e-6)  # t = T sigma / (1 + sigma)

    def size(self, n: int) -> tuple[int, int]:
        """Return the height and width of a layer's n positions."""
        factor = math.sqrt(self.height * self.width / n)
        return round(self.height / factor), round(self.width / factor)


# (layer, x (b, n, d), context (b, m, d), output (b, n, d), call) -> another output, or None
Attend = Callable[[Layer, Tensor, Tensor, Tensor, Call], Tensor | None]


@contextmanager
def hooked(
    model: Any,
    images: int,
    tokens: int,
    attend: Attend,
    begin: Callable[[Tensor, Call], Tensor] | None = None,
    finish: Callable[[Tensor, Tensor, Call], Tensor] | None = None,
) -> Iterator[None]:
    """Call `attend` after each attention layer, in this thread, until the block ends.

    Args:
        model: a LatentDiffusion, ours or CompVis's.
        images: b, of a batch. The UNet is called on so many, or on twice as many, of which the last are conditional.
        tokens: of a prompt's conditioning.
        begin: (the vectors of whole texts, if the UNet takes them, (b or 2b, d), call) -> others.
        finish: (the UNet's input (b or 2b, c, h, w), its output, call) -> another output.
    """
    unet, thread, steps, calls = model.model.diffusion_model, get_ident(), model.schedule.T, []
    if not (layers := attention_layers(model)):
        raise ValueError("attention to words needs a UNet with cross-attention, and this model's has none")

    def enter(unet: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if get_ident() != thread:
            return None
        x, t = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("x", "timesteps")))
        if len(x) not in (images, 2 * images):
            raise ValueError(f"the UNet was called on {len(x)} images, not on {images}: generate these in one batch")
        context = args[2] if len(args) > 2 else kwargs.get("context")
        if calls and float(t[0]) < calls[0].t and len(x) == images and _is_guided(x, context):
            raise ValueError(f"the UNet was called on half of {images} images, guided: generate these in one batch")
        calls[:] = [Call(float(t[0]), max(0.0, (steps - 1 - float(t[0])) / steps), *x.shape[-2:])]
        if begin is None or (pooled := kwargs.get("y")) is None:
            return None
        return args, kwargs | {"y": begin(pooled, calls[0])}

    def leave(unet: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        if get_ident() != thread or finish is None:
            return output
        return finish(args[0] if args else kwargs["x"], output, calls[0])

    def replace(layer: Layer, module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if get_ident() != thread or not calls:
            return output
        x, context = args[0], args[1] if len(args) > 1 else kwargs.get("context")
        context = x if context is None else context
        if layer.cross and context.shape[1] != tokens:
            raise ValueError(
                f"the UNet attends to {context.shape[1]} vectors, and the prompt has {tokens} tokens: "
                "shorten the negative prompt, if it is the longer one"
            )
        found = attend(layer, x[-images:], context[-images:], output[-images:], calls[0])
        return output if found is None else torch.cat([output[:-images], found.to(output.dtype)])

    with ExitStack() as undo, uncompiled():
        undo.callback(unet.register_forward_pre_hook(enter, with_kwargs=True).remove)
        undo.callback(unet.register_forward_hook(leave, with_kwargs=True).remove)
        for layer in layers:
            undo.callback(layer.module.register_forward_hook(partial(replace, layer), with_kwargs=True).remove)
        yield


def _is_guided(x: Tensor, context: Tensor | None) -> bool:
    """Return whether a batch has the same images twice, of other contexts, as images of two prompts are not."""
    if context is None or len(x) % 2:
        return False
    return torch.equal(*x.chunk(2)) and not torch.equal(*context.chunk(2))
