"""The reference numbers in tests/golden/: their inputs and outputs, and the rule that stands in for their weights."""

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> tuple[dict, int, dict[str, Tensor]]:
    """(constructor arguments, fill seed, {"in/...": tensor, "out/...": tensor}) of tests/golden/NAME.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return json.loads(header["params"]), int(header["fill_seed"]), tensors


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> nn.Module:
    """Sets every parameter by the goldens' rule, a hash of its place among the sorted names; sets eval mode."""
    for i, (name, parameter) in enumerate(sorted(module.named_parameters())):
        k = np.arange(parameter.numel(), dtype=np.uint32) + np.uint32((seed * 10007 + i) * 1000003 % 2**32)
        k ^= k >> np.uint32(16)
        k *= np.uint32(0x7FEB352D)
        k ^= k >> np.uint32(15)
        k *= np.uint32(0x846CA68B)
        k ^= k >> np.uint32(16)
        u = k / 2.0**31 - 1.0
        if parameter.ndim > 1:
            value = u * np.sqrt(3.0 / parameter[0].numel())
        else:
            value = 1.0 + 0.1 * u if name.endswith("weight") else 0.1 * u
        parameter.copy_(torch.from_numpy(value.astype(np.float32)).reshape(parameter.shape))
    return module.eval()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_params(**changes) -> dict:
    """Arguments of a tiny UNet of two levels, 32 and 64 channels wide, with attention at both."""
    params = {"image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1}
    return params | {"attention_resolutions": [1, 2], "channel_mult": [1, 2]} | changes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def untrained(*modules: nn.Module) -> list[str]:
    """The names of the parameters that a backward pass gave no gradient, or zeros alone."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()]


@cache
def _state_dicts() -> dict[str, dict[str, list[int]]]:
    return json.loads(gzip.decompress((GOLDEN / "state_dict_keys.json.gz").read_bytes()))


def published_shapes(model: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """{name without the prefix: shape} of the tensors of a published checkpoint whose names begin with the prefix."""
    entries = _state_dicts()[model].items()
    return {name.removeprefix(prefix): tuple(shape) for name, shape in entries if name.startswith(prefix)}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything in the module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
