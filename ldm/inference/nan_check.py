"""Where an image stopped being finite: the first module whose output holds NaN or infinity, by its name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion


class NotFinite(ArithmeticError):
    """An image holds NaN or infinity."""


def watch(model: LatentDiffusion) -> None:
    """From now on `model.generate` raises ValueError for an image with NaN or infinite pixels, in place of drawing it,
    in one sentence that names the first module whose output was not finite.

    While all is well, that costs one look at the pixels of each batch; then the drawing is repeated, each module's
    output looked at.
    """
    model.generate = partial(_watched, model)


def _watched(model: LatentDiffusion, *args: Any, **kwargs: Any) -> list[Image.Image]:
    generate = type(model).generate
    look = model.first_stage_model.decoder.register_forward_hook(_look)
    try:
        return generate(model, *args, **kwargs)
    except NotFinite:
        pass
    finally:
        look.remove()
    with _searching(model):
        generate(model, *args, **kwargs)
    raise ValueError(
        "an image was not finite (NaN or infinite pixels), but when drawn again it was: the device may be at fault"
    )


def _look(decoder: nn.Module, args: tuple, pixels: Tensor) -> None:
    if not torch.isfinite(pixels).all():
        raise NotFinite


@contextmanager
def _searching(model: LatentDiffusion) -> Iterator[None]:
    """Raises ValueError as soon as anything that a module gives or is given is not finite."""
    running: list[str] = []  # the modules that are being computed, the innermost last
    hooks = []

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _finite([args, kwargs]):  # no module gave that: it was made between two of them
            caller = running[-1] if running else "the sampler or its guidance"
            raise _error(f"{caller}, before it calls {name}", model.get_submodule(running[-1]) if running else model)
        running.append(name)

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()
        if not _finite(output):
            raise _error(name, module)

    for name, module in model.named_modules():
        if module is not model:
            hooks.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    compiled = "torch._dynamo" in sys.modules  # compiled code runs no hooks
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _finite(value: Any) -> bool:
    """Whether all numbers in tensors, and in lists, tuples and dicts of them, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list | tuple) or all(map(_finite, value))


def _error(where: str, module: nn.Module) -> ValueError:
    parameters = list(module.parameters())
    if not _finite(parameters):
        why = "its weights are not finite: the checkpoint is damaged, or its training diverged"
    elif any(parameter.dtype == torch.float16 for parameter in parameters):
        why = "float16 ends at 65504: use --precision bf16 or full"
    else:
        why = "try --attention math, --precision full or a lower --scale"
    return ValueError(f"the image is not finite (NaN or infinity), and that began in {where}; {why}")
