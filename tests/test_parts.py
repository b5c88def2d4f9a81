"""A part of a model in place of its own: out of any file or folder that has it, whatever else that lacks."""

import pytest
import torch
from conftest import refused
from lora_models import tiny
from safetensors.torch import load_file, save_file
from tiny_sdxl import build_pipeline, our_images

import ldm
from ldm.checkpoint.writing import save_file as write_network
from ldm.loading import load, take_part

PROMPTS = ["a five", "a red apple"]
TEXT, VAE, UNET = "conditioner.", "first_stage_model.", "model.diffusion_model."


@pytest.fixture(scope="module")
def xl(no_hub, tmp_path_factory):
    """A tiny Stable Diffusion XL in a single file without configuration, its tensors, and its folder of diffusers."""
    root = tmp_path_factory.mktemp("xl")
    _, folder = build_pipeline(root)
    path = root / "xl.safetensors"
    ldm.save(load(folder, device="cpu"), path, format="compvis")
    state = load_file(path)
    save_file(state, path)
    return path, state, folder


def other(model):
    """The same with other weights."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.mul_(1 + 0.5 * (sum(map(ord, name)) % 3))
    return model


@pytest.fixture(params=["sd1", "sd2"])
def models(request, tmp_path):
    """Two of Stable Diffusion's kind, and a folder with the second one's text encoder in several places."""
    first, second = tiny(request.param), other(tiny(request.param))
    ldm.save(first, tmp_path / "first.safetensors")
    ldm.save(second, tmp_path / "whole.safetensors")
    ldm.save(second, tmp_path / "diffusers", format="diffusers")
    encoder, config = second.cond_stage_model, second.config["cond_stage_config"]
    write_network(tmp_path / "alone.safetensors", encoder.state_dict(), config)
    return request.param, second, tmp_path


@pytest.mark.parametrize("place", ["whole.safetensors", "alone.safetensors", "diffusers", "diffusers/text_encoder"])
def test_a_text_encoder_of_stable_diffusion(models, place):
    """Read from the layer that the model reads, from a folder of transformers too, which has no such layer."""
    kind, second, folder = models
    if place == "diffusers/text_encoder" and kind == "sd2":  # a folder of transformers has not OpenCLIP's layout
        refused(
            "is openclip of width .* is transformers", load, folder / "first.safetensors", text_encoder=folder / place
        )
        return
    model = load(folder / "first.safetensors", device="cpu", text_encoder=folder / place)
    expected = second.condition(PROMPTS)
    torch.testing.assert_close(model.condition(PROMPTS), expected, rtol=0, atol=1e-6)
    own = load(folder / "first.safetensors", device="cpu").condition(PROMPTS)["c_crossattn"]
    assert (own - expected["c_crossattn"]).abs().max() > 1e-3
    assert [change.kind for change in model.changes] == ["text_encoder"] if (folder / place).is_file() else True


@pytest.mark.parametrize("lost", [(), (VAE,), (UNET,), (VAE, UNET)])
def test_the_text_encoders_of_a_file_that_lacks_other_parts(xl, lost, tmp_path):
    path, state, folder = xl
    kept = {
        name: 2 * t if name.startswith(TEXT) else t for name, t in state.items() if not name.startswith(lost or "-")
    }
    save_file(kept, tmp_path / "kept.safetensors")
    model = load(path, device="cpu", text_encoder=tmp_path / "kept.safetensors")
    expected = {name: tensor for name, tensor in kept.items() if name.startswith(TEXT)}
    own = {TEXT + n.removeprefix("cond_stage_model."): t for n, t in model.state_dict().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items() if "position_ids" not in name)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_other_parts_of_such_a_file(xl, part, tmp_path):
    """Without text encoders, by which the UNet alone is recognised by its sizes."""
    path, state, folder = xl
    prefix = {"unet": UNET, "vae": VAE}[part]
    kept = {name: tensor for name, tensor in state.items() if name.startswith((prefix, TEXT))}
    save_file(
        {name: 1.5 * t if name.endswith("bias") else t for name, t in kept.items()}, tmp_path / "kept.safetensors"
    )
    model = load(folder, device="cpu", **{part: tmp_path / "kept.safetensors"})
    assert (our_images(model) != our_images(load(folder, device="cpu"))).any()
    own = take_part({"unet": "unet", "vae": "first_stage"}[part], tmp_path / "kept.safetensors")
    assert own.state.keys() == {name.removeprefix(prefix) for name in kept if name.startswith(prefix)}


def test_a_file_without_text_encoders_and_those_of_another(xl, tmp_path):
    path, state, folder = xl
    save_file({n: t for n, t in state.items() if not n.startswith(TEXT)}, tmp_path / "rest.safetensors")
    refused("has no encoder for it", load, tmp_path / "rest.safetensors")
    model = load(tmp_path / "rest.safetensors", device="cpu", text_encoder=folder)
    assert (our_images(model) == our_images(load(path, device="cpu"))).all()


def test_what_does_not_fit_is_refused(xl, models):
    kind, _, folder = models
    first, whole = folder / "first.safetensors", folder / "whole.safetensors"
    message = "is conditioned by .*SizedTextEncoder, and text encoder: .* is a .*TextEncoder"
    refused(message, load, xl[2], text_encoder=whole)
    refused("is not one that we know", load, first, text_encoder=folder / "diffusers" / "vae")
    another = folder / "another.safetensors"
    ldm.save(tiny({"sd1": "sd2", "sd2": "sd1"}[kind]), another)
    layouts = {"sd1": ("transformers", "openclip"), "sd2": ("openclip", "transformers")}[kind]
    refused("is {} of width 32, and text encoder: .* is {} of".format(*layouts), load, first, text_encoder=another)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_8_bits_are_read_as_float16(xl, dtype, tmp_path):
    path, state, folder = xl
    small = {name: t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t for name, t in state.items()}
    save_file(small, tmp_path / "small.safetensors")
    model = load(tmp_path / "small.safetensors", device="cpu", dtype=None)
    assert any("weights are stored in 8 bits (float8" in note and "as float16" in note for note in model.notes)
    name = next(name for name in small if name.startswith(UNET) and small[name].dtype == dtype)
    found = model.state_dict()[name]
    assert found.dtype == torch.float16 and torch.equal(found, small[name].half())
    our_images(load(tmp_path / "small.safetensors", device="cpu"))
