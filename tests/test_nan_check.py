"""An image that is not finite: the module where that began is named, and finite images cost one check."""

import numpy as np
import pytest
import torch
from conftest import refused

from ldm.inference.compile import compile_unet
from ldm.inference.nan_check import generate_checked
from ldm.inference.tiling import tile_vae

UNET = "model.diffusion_model"


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def message(model, **settings) -> str:
    before = hooks(model)
    with pytest.raises(ValueError) as error:
        generate_checked(model, ["a one", "a two"], **{"steps": 3, **settings})
    assert hooks(model) == before
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.startswith("the image is not finite (NaN or infinity), and that began in")
    return sentence.removeprefix("the image is not finite (NaN or infinity), and that began in ")


def test_finite_images_are_the_same_and_checked_once(model, tiny_model, monkeypatch):
    checked = []
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: checked.append(tuple(x.shape)) or isfinite(x))
    images = generate_checked(model, ["a one"] * 3, steps=2, batch_size=2)
    assert checked == [(2, 1, 32, 32), (1, 1, 32, 32)] and hooks(model) == 0
    expected = tiny_model.generate(["a one"] * 3, steps=2, batch_size=2)
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}.time_embed.2",
        f"{UNET}.middle_block.0.in_layers.2",
        f"{UNET}.output_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
        "first_stage_model.decoder.up.0.block.1.norm2",
        "cond_stage_model.model.ln_final",
    ],
)
@pytest.mark.parametrize("form", ["plain", "tiled"])
def test_broken_weights_are_found_by_name(model, name, form):
    if form == "tiled":
        tile_vae(model, 16)
    model.get_submodule(name).weight[0] = torch.nan
    if form == "tiled" and name.endswith("norm2"):  # in bands, a normalisation is computed between modules
        name = "first_stage_model.decoder, before it calls first_stage_model.decoder.up.0.block.1.conv2"
    assert message(model) == f"{name}; its weights are not finite: the checkpoint is damaged, or its training diverged"


def test_overflow_between_modules(model):
    block = f"{UNET}.middle_block.1.transformer_blocks.0.attn1"
    for projection in ("to_q", "to_k"):
        model.get_submodule(f"{block}.{projection}").weight *= 1e25  # finite, and their product is not
    sentence = message(model)
    assert sentence.startswith(f"{block}, before it calls {block}.to_out; try --attention math")


def test_overflow_of_float16(model):
    model.model.half()
    norm, _, conv = model.model.diffusion_model.out
    norm.weight *= 100
    conv.weight *= 5000
    assert message(model) == f"{UNET}.out.2; float16 ends at 65504: use --precision bf16 or full"


def test_overflow_outside_the_networks(model):
    model.model.diffusion_model.out[2].weight *= 1e20  # finite; float32 ends at 3e38
    assert message(model, scale=1e30).startswith("the sampler or its guidance, before it calls model; ")


class OneConvolution(torch.nn.Module):
    """In place of a UNet, because tracing one takes 20 seconds."""

    downsampling = 1

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

    def forward(self, x, timesteps, context=None, y=None):
        return self.conv(x)


def test_compiled_networks_are_checked_too(model):
    model.model.diffusion_model = OneConvolution()
    compile_unet(model, backend="eager")
    model.generate(["a one", "a two"], steps=2, scale=1)
    model.model.diffusion_model.conv.weight[0] = torch.nan
    assert message(model, scale=1).startswith(f"{UNET}.conv; its weights are not finite")


def test_a_fault_that_does_not_repeat(model, monkeypatch):
    decode, calls = type(model).decode, []

    def faulty(self, latents):
        calls.append(1)
        return decode(self, latents * torch.nan if len(calls) == 1 else latents)

    monkeypatch.setattr(type(model), "decode", faulty)
    refused("was when generated again: the device may be at fault", generate_checked, model, ["a one"], steps=2)
