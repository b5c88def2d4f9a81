"""What changes how a model computes: nothing is replaced on its modules, and undone, all is as before."""

import copy
import functools
import types

import pytest
import torch
from test_nan_check import OneConvolution
from torch import Tensor, nn

from ldm.inference.compile import channels_last, compile_unet
from ldm.inference.nan_check import check_images, generate_checked
from ldm.inference.offload import offload
from ldm.inference.precision import set_precision
from ldm.inference.tiling import slice_vae, tile_vae

WAYS = {
    "nan_check": check_images,
    "bf16": lambda model: set_precision(model, "bf16"),
    "autocast": lambda model: set_precision(model, "autocast"),
    "compile": lambda model: compile_unet(model, backend="eager"),
    "channels last": channels_last,
    "offload": lambda model: offload(model, "swap", "cpu"),
    "offload to the CPU": lambda model: offload(model, "cpu", "cpu"),
    "tiling": lambda model: tile_vae(model, 16),
    "slicing": slice_vae,
}
TORCHS = "_compiled_call_impl"  # where `nn.Module.compile` puts its function


def image(model, **settings) -> bytes:
    return generate_checked(model, ["a one"], **settings)[0].tobytes()


def state(model: nn.Module) -> dict[str, dict]:
    """All that the modules hold, tensors by their identity and a copy of their values."""

    def value(one):
        if isinstance(one, Tensor):
            return id(one), one.dtype, one.stride(), one.detach().flatten().view(torch.uint8).numpy().tobytes()
        return {key: value(part) for key, part in one.items()} if isinstance(one, dict) else one

    return {name: {key: value(one) for key, one in vars(m).items()} for name, m in model.named_modules()}


def replaced(model: nn.Module) -> list[tuple[str, str]]:
    """Names of functions and methods that an instance holds itself."""
    kinds = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
    rows = [(name, key, one) for name, m in model.named_modules() for key, one in vars(m).items() if key != TORCHS]
    return [(name, key) for name, key, one in rows if isinstance(one, kinds)]


@pytest.fixture
def model(tiny_model, way):
    model = copy.deepcopy(tiny_model)
    if way == "compile":
        model.model.diffusion_model = OneConvolution()
    model.defaults |= {"steps": 2, "scale": 2.0}
    image(model)  # what is computed at its first use, such as the schedule, is there
    return model


@pytest.mark.parametrize("way", WAYS)
def test_it_replaces_nothing_and_can_be_undone(model, way):
    before, expected, callables = state(model), image(model), replaced(model)
    with WAYS[way](model):
        assert state(model) != before and replaced(model) == callables
        other = copy.copy(model)
        other.defaults = model.defaults | {"scale": 1.0, "steps": 3}
        assert image(other) == image(model, scale=1.0, steps=3) != image(model)
    assert state(model) == before and image(model) == expected


@pytest.mark.parametrize("way", WAYS)
def test_it_is_undone_after_a_failure(model, way):
    before, expected = state(model), image(model)
    with pytest.raises(RuntimeError), WAYS[way](model):
        model.first_stage_model.decode(torch.zeros(1, 5, 8, 8))
    assert state(model) == before and image(model) == expected
