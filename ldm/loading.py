"""A path -> a LatentDiffusion, and back; the file's configuration rebuilds the model, its tokenizer included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.file import load_file, save_file
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import instantiate_network, pick_device

SHIPPED = Path(__file__).parent / "pretrained" / "digits.safetensors"
TARGET = "ldm.latent_diffusion.LatentDiffusion"


def load(path: str | Path | None = None, device: str = "auto", dtype: torch.dtype = torch.float32) -> LatentDiffusion:
    """The model of a checkpoint, ready to draw; without a path, the digits model that ships with the package.

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged, foreign, or does not fit its own
    configuration.
    """
    path = SHIPPED if path is None else Path(path)
    config, state = load_file(path)
    if config.get("target") != TARGET:
        raise ValueError(f"checkpoint {str(path)!r} holds a {config.get('target')}, not a whole model ({TARGET})")
    model = _build(path, config, state, pick_device(device), dtype)
    model.path = path
    return model


def load_network(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Any network saved with its configuration: a first stage, a text encoder, a classifier. Errors as `load`."""
    return _build(path, *load_file(path), pick_device(device), dtype)


class Unfilled(TorchFunctionMode):
    """Leaves initialisers out: meta tensors hold nothing, and filling them imports torch._dynamo for a second."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _build(path: str | Path, config: dict, state: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build `config` without initialising weights and give it `state`, cast tensor by tensor; frozen, eval mode."""
    if "target" not in config:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration (it names no target)")
    try:
        with torch.device("meta"), Unfilled():
            module = instantiate_network(config)
    except Exception as error:  # a damaged configuration may break a constructor in any way
        raise ValueError(f"checkpoint {str(path)!r} has a configuration that builds nothing: {error}") from error
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        raise ValueError(f"checkpoint {str(path)!r} does not fit its configuration: {_differences(expected, found)}")
    for name, tensor in state.items():
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def save(model: LatentDiffusion, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as one checkpoint, atomically; `dtype` (torch.float16, say) makes it smaller."""
    save_file(path, model.state_dict(), {"target": TARGET, "params": model.config}, dtype)


def _differences(expected: dict, found: dict) -> str:
    """What is missing, unexpected or of another shape, a few names of each."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n]),
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    )
