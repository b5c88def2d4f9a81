"""Find where NaN or infinity begins: the first module whose output is not finite, by name."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ldm.latent_diffusion import LatentDiffusion


class NotFinite(ValueError):
    """An image holds NaN or infinity."""


def check_images(model: LatentDiffusion) -> ExitStack:
    """Raise NotFinite whenever the model decodes an image with NaN or infinite pixels, until the stack is closed."""
    undo = ExitStack()
    undo.callback(model.first_stage_model.decoder.register_forward_hook(_check_pixels).remove)
    return undo


def generate_checked(model: LatentDiffusion, *args: Any, **settings: Any) -> list[Image.Image]:
    """Return `model.generate(*args, **settings)`, or name the first module whose output was not finite.

    Finite images cost one check of each batch's pixels. Otherwise the images are generated again, with a check of the
    output of every module, and a ValueError names the module and a remedy.
    """
    try:
        with check_images(model):
            return model.generate(*args, **settings)
    except NotFinite:
        pass
    with _check_modules(model):
        model.generate(*args, **settings)
    raise ValueError(
        "an image was not finite (NaN or infinite pixels), but was when generated again: the device may be at fault"
    )


def _check_pixels(decoder: nn.Module, args: tuple, pixels: Tensor) -> None:
    if not torch.isfinite(pixels).all():
        raise NotFinite(
            "an image is not finite (NaN or infinite pixels); the command txt2img names the module at fault"
        )


@contextmanager
def _check_modules(model: LatentDiffusion) -> Iterator[None]:
    """Raise ValueError as soon as an input or output of any module is not finite."""
    from ldm.models.compiler import uncompiled  # which is not needed while images are finite

    running: list[str] = []  # the modules that are being computed, the innermost last

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _finite([args, kwargs]):  # not the output of a module: it was computed between two of them
            caller = running[-1] if running else "the sampler or its guidance"
            raise _error(f"{caller}, before it calls {name}", model.get_submodule(running[-1]) if running else model)
        running.append(name)

    def leave(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()
        if not _finite(output):
            raise _error(name, module)

    with ExitStack() as hooks, uncompiled():
        for name, module in model.named_modules():
            if module is not model:
                hooks.enter_context(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(partial(leave, name), prepend=True))
        yield


def _finite(value: Any) -> bool:
    """Return whether all numbers in tensors, and in lists, tuples and dicts of them, are finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _error(where: str, module: nn.Module) -> ValueError:
    parameters = list(module.parameters())
    if not _finite(parameters):
        why = "its weights are not finite: the checkpoint is damaged, or its training diverged"
    elif any(parameter.dtype == torch.float16 for parameter in parameters):
        why = "float16 ends at 65504: use --precision bf16 or full"
    else:
        why = "try --attention math, --precision full or a lower --scale"
    return ValueError(f"the image is not finite (NaN or infinity), and that began in {where}; {why}")
