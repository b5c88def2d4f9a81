"""LoRA files for Stable Diffusion XL: read in every naming, written so that diffusers makes the same images of them."""

import numpy as np
import pytest
import torch
from lora_models import learned
from safetensors.torch import load_file, save_file
from tiny_sdxl import build_pipeline, our_images, their_images

import ldm
from ldm.finetune import lora
from ldm.finetune.lora_files import load_lora, merge_lora, rewrite, save_lora
from ldm.finetune.lora_names import layers_of, to_kohya

XL = "stable-diffusion-xl-v1-base/lora"


@pytest.fixture(scope="module")
def theirs(no_hub, tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def model(theirs):
    return ldm.load(theirs[1], device="cpu")


@pytest.fixture(scope="module")
def adapters(theirs):
    return learned(ldm.load(theirs[1], device="cpu"), targets=("attn", "text"), attached=False)


def same(found, adapters) -> bool:
    return found.keys() == adapters.keys() and all(
        found[name].alpha == own.alpha and all(map(torch.equal, found[name].parameters(), own.parameters()))
        for name, own in adapters.items()
    )


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_makes_the_same_images_of_our_files(theirs, model, adapters, format, tmp_path):
    pipe, path = theirs[0], tmp_path / "lora.safetensors"
    save_lora(path, adapters, model, format)
    names = load_file(path)
    parts = {"kohya": ("lora_unet_", "lora_te1_", "lora_te2_"), "peft": ("unet.", "text_encoder.", "text_encoder_2.")}
    assert {next(part for part in parts[format] if name.startswith(part)) for name in names} == set(parts[format])
    assert same(load_lora(path, model)[0], adapters)
    before = our_images(model)
    merge_lora(model, path)
    pipe.load_lora_weights(path)
    try:
        images = their_images(pipe)
    finally:
        pipe.unload_lora_weights()
    assert np.abs(images - before).max() > 0.02
    np.testing.assert_allclose(our_images(model), images, atol=1e-4)


def test_files_of_sd_scripts_have_the_unet_s_original_names(theirs, model, adapters, tmp_path):
    """Joined by underscores; that of the time and sizes is label_emb."""
    adapters = adapters | learned(model, targets=("label_emb",), attached=False)
    save_lora(tmp_path / "ours.safetensors", adapters, model)
    diffusers_names = {own: theirs for theirs, own in layers_of(model).items()}
    unet = {name: f"unet.{name.split('diffusion_model.')[1]}" for name in adapters if "diffusion_model." in name}
    joined = {to_kohya(diffusers_names[name], True): to_kohya(original, True) for name, original in unet.items()}
    state = {
        f"{joined.get(name.split('.', 1)[0], name.split('.', 1)[0])}.{name.split('.', 1)[1]}": tensor
        for name, tensor in load_file(tmp_path / "ours.safetensors").items()
    }
    assert "lora_unet_label_emb_0_0.alpha" in state and not any("down_blocks" in name for name in state)
    save_file(state, tmp_path / "theirs.safetensors")
    assert same(load_lora(tmp_path / "theirs.safetensors", model)[0], adapters)


def test_rewriting_gives_original_names_diffusers_ones(tmp_path):
    """Of the published model, without it: the width of the context, 2048, and the second encoder tell that it is XL."""
    to_k = "transformer_blocks_9_attn2_to_k"
    state = {}
    for layer, width in ((f"lora_unet_input_blocks_7_1_{to_k}", 2048), ("lora_unet_label_emb_0_0", 2816)):
        state |= {f"{layer}.lora_down.weight": torch.ones(2, width), f"{layer}.lora_up.weight": torch.ones(1280, 2)}
    save_file(state, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="peft")
    names = {name.split(".lora_")[0] for name in load_file(tmp_path / "b.safetensors")}
    attention = "unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k"
    assert names == {attention, "unet.add_embedding.linear_1"}
    rewrite(tmp_path / "b.safetensors", tmp_path / "c.safetensors", format="kohya")
    kept = load_file(tmp_path / "c.safetensors")
    assert "lora_unet_add_embedding_linear_1.lora_up.weight" in kept
    second = {"lora_te2_text_model_encoder_layers_0_mlp_fc1": 8, "lora_te1_text_model_encoder_layers_0_mlp_fc1": 8}
    state = pairs(second | {"lora_te2_text_projection": 8})
    save_file(state, tmp_path / "d.safetensors")
    rewrite(tmp_path / "d.safetensors", tmp_path / "e.safetensors")
    assert load_file(tmp_path / "e.safetensors").keys() == {*state, *(f"{n.split('.')[0]}.alpha" for n in state)}


def pairs(widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Matrices of rank 2 for layers of these widths."""
    state = {}
    for layer, width in widths.items():
        state |= {f"{layer}.lora_down.weight": torch.ones(2, width), f"{layer}.lora_up.weight": torch.ones(width, 2)}
    return state


@pytest.mark.parametrize("header", [{"ss_base_model_version": "sdxl_base_v1-0"}, {"modelspec.architecture": XL}])
def test_the_header_may_say_that_a_file_is_for_it(header, tmp_path):
    save_file(
        pairs({"lora_unet_label_emb_0_0": 2816, "lora_unet_output_blocks_0_1_proj_in": 8}), tmp_path / "a", header
    )
    rewrite(tmp_path / "a", tmp_path / "b.safetensors", format="peft")
    names = {name.split(".lora_")[0] for name in load_file(tmp_path / "b.safetensors")}
    assert names == {"unet.add_embedding.linear_1", "unet.up_blocks.0.attentions.0.proj_in"}
    save_file(pairs({"text_encoder.text_model.encoder.layers.0.mlp.fc1": 8}), tmp_path / "c", header)
    rewrite(tmp_path / "c", tmp_path / "d.safetensors", format="kohya")
    assert all(name.startswith("lora_te1_text_model_") for name in load_file(tmp_path / "d.safetensors"))


def test_a_lora_is_undone_to_the_bit(model, adapters, tmp_path):
    save_lora(tmp_path / "lora.safetensors", adapters, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = merge_lora(model, tmp_path / "lora.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lora.restore(model, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
