"""Text encoder and first stage off the accelerator. Here that is the meta device: it computes shapes alone, and nothing
can be copied back from it, which swapping must not need."""

import copy

import numpy as np
import pytest
import torch
from conftest import refused

import ldm
from ldm.inference.offload import offload
from ldm.inference.precision import set_precision


def devices_seen(module: torch.nn.Module) -> list[set[str]]:
    """Return a list that records at each call of the module the devices of its weights."""
    seen: list[set[str]] = []
    module.register_forward_pre_hook(lambda *_: seen.append({p.device.type for p in module.parameters()}))
    return seen


@pytest.mark.parametrize("way", ["cpu", "swap"])
def test_on_one_device_nothing_changes(model, tiny_model, way):
    offload(model, way, "cpu")
    images = [m.generate(["a one", "a two"], steps=2) for m in (model, tiny_model)]
    assert all(np.array_equal(a, b) for a, b in zip(*images, strict=True))
    pixels = torch.rand(1, 1, 32, 32)
    own, expected = (m.first_stage_model.encode(pixels) for m in (model, tiny_model))
    for name in ("mean", "std", "logvar", "var"):
        assert torch.equal(getattr(own, name), getattr(expected, name))


def test_swapped_weights_are_on_the_device_while_used_and_then_the_same_as_before(model):
    parts = (model.cond_stage_model, model.first_stage_model)
    before = [p for part in parts for p in part.parameters()]
    values = [p.data_ptr() for p in before]
    offload(model, "swap", "meta")
    assert {p.device.type for p in model.model.parameters()} == {"meta"}
    assert all(p.device.type == "cpu" for p in before)
    text = devices_seen(model.cond_stage_model.model.ln_final)
    decoder, encoder = devices_seen(model.first_stage_model.decoder), devices_seen(model.first_stage_model.encoder)

    cond = model.condition(["a one", "a two"])
    pixels = model.decode(torch.zeros(2, 4, 8, 8, device="meta"))
    latents = model.encode(torch.zeros(2, 1, 32, 32))  # from the CPU
    assert cond["c_crossattn"].shape == (2, 16, 32) and cond["c_crossattn"].device.type == "meta"
    assert pixels.shape == (2, 1, 32, 32) and pixels.device.type == "meta"
    assert latents.shape == (2, 4, 8, 8) and latents.device.type == "meta"
    assert text and decoder and encoder and all(seen == {"meta"} for seen in text + decoder + encoder)
    after = [p for part in parts for p in part.parameters()]
    assert all(a is b for a, b in zip(after, before, strict=True)) and [p.data_ptr() for p in after] == values
    # the UNet takes the conditioning as it is
    assert model.apply_model(torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, device="meta"), cond).shape[0] == 2


def test_what_computes_on_the_cpu_stays_there(model):
    text = devices_seen(model.cond_stage_model.model.ln_final)
    encoder = devices_seen(model.first_stage_model.encoder)
    offload(model, "cpu", "meta")
    assert model.condition(["a one"])["c_crossattn"].device.type == "meta"
    assert model.first_stage_model.encode(torch.zeros(1, 1, 32, 32)).mean.device.type == "cpu"
    assert model.decode(torch.zeros(1, 4, 8, 8)).device.type == "meta"
    assert all(seen == {"cpu"} for seen in text + encoder) and text and encoder


def test_float16_is_widened_where_it_computes_on_the_cpu(model):
    set_precision(model, "fp16", device="meta")
    assert {p.dtype for p in model.cond_stage_model.parameters()} == {torch.float16}
    swapped = copy.deepcopy(model)
    offload(model, "cpu", "meta")
    offload(swapped, "swap", "meta")
    assert {p.dtype for p in model.cond_stage_model.parameters()} == {torch.float32}
    assert {p.dtype for p in swapped.cond_stage_model.parameters()} == {torch.float16}
    assert {p.dtype for p in model.model.parameters()} == {torch.float16}


def test_weights_come_back_after_a_failure(model):
    offload(model, "swap", "meta")
    with pytest.raises(RuntimeError):
        model.first_stage_model.decode(torch.zeros(1, 5, 8, 8, device="meta"))
    assert {p.device.type for p in model.first_stage_model.parameters()} == {"cpu"}


def test_unconditional_models_and_unknown_ways(model):
    model.cond_stage_model = None
    offload(model, "swap", "meta")
    assert model.decode(torch.zeros(1, 4, 8, 8, device="meta")).shape == (1, 1, 32, 32)
    refused("offload 'gpu' is unknown: it is one of cpu, swap", offload, model, "gpu", "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ["cpu", "swap"])
def test_on_a_gpu(way):
    prompts = ["a handwritten digit five", "a bold seven"]
    exact = np.stack(ldm.load(device="cuda").generate(prompts)).astype(int)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    model = ldm.load(device="cpu")
    offload(model, way, "cuda")
    unet = sum(p.numel() * p.element_size() for p in model.model.parameters())
    assert torch.cuda.memory_allocated() - start < 1.2 * unet
    assert np.abs(np.stack(model.generate(prompts)) - exact).max() <= 2  # other devices, other orders of sums
    assert torch.cuda.memory_allocated() - start < 1.2 * unet
