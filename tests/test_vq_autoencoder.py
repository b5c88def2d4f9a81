"""The VQ autoencoder: the original's numbers, and the names and shapes of all published VQ first stages."""

import pytest
import torch
from golden_fill import fill, load_golden, published_shapes, shapes
from torch import nn

from ldm.models.vq_autoencoder import VQModel, VQModelInterface

PUBLISHED = {"ch": 128, "out_ch": 3, "in_channels": 3, "num_res_blocks": 2, "resolution": 256, "double_z": False}
VQ = {  # LDM's table of VQ autoencoders: ddconfig, n_embed; embed_dim is z_channels
    "vq-f4": ({"z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": []}, 8192),
    "vq-f4-noattn": ({"z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": [], "attn_type": "none"}, 8192),
    "vq-f8": ({"z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}, 16384),
    "vq-f16": ({"z_channels": 8, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}, 16384),
}
FIRST_STAGES = {
    "ldm-cin256-v2": "vq-f4",
    "ldm-celebahq-vq4": "vq-f4",
    "ldm-inpainting-big": "vq-f4-noattn",
    "ldm-layout2img": "vq-f4",
    "ldm-semantic-synthesis256": "vq-f4",
    "ldm-bsr-sr": "vq-f4",
}


def published(model: str, kind: type = VQModelInterface) -> nn.Module:
    ddconfig, n_embed = VQ[model]
    with torch.device("meta"):
        return kind(PUBLISHED | ddconfig, embed_dim=ddconfig["z_channels"], n_embed=n_embed)


def golden(kind: type) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    params, seed, tensors = load_golden("autoencoder_vq")
    return fill(kind(**params), seed), tensors


@torch.no_grad()
def test_golden():
    model, tensors = golden(VQModelInterface)
    h = model.encode(tensors["in/x"])
    torch.testing.assert_close(h, tensors["out/pre_quantized"], atol=1e-5, rtol=0)
    quantized, loss, (_, _, indices) = model.quantize(h)
    torch.testing.assert_close(quantized, tensors["out/quantized"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.view(1), tensors["out/codebook_loss"], atol=1e-5, rtol=0)
    assert torch.equal(indices, tensors["out/indices"])
    torch.testing.assert_close(model.decode(h), tensors["out/reconstruction"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_training_form_is_the_same_autoencoder():
    model, tensors = golden(VQModel)
    quantized, loss, (_, _, indices) = model.encode(tensors["in/x"])
    torch.testing.assert_close(quantized, tensors["out/quantized"], atol=1e-5, rtol=0)
    assert torch.equal(indices, tensors["out/indices"])
    torch.testing.assert_close(model.decode(quantized), tensors["out/reconstruction"], atol=1e-5, rtol=0)
    first_stage, _ = golden(VQModelInterface)
    for form in (model, first_stage):
        decoded, loss = form(tensors["in/x"])
        torch.testing.assert_close(decoded, tensors["out/reconstruction"], atol=1e-5, rtol=0)
        torch.testing.assert_close(loss.view(1), tensors["out/codebook_loss"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_decoder_that_is_forced_not_to_quantize():
    model, tensors = golden(VQModelInterface)
    h = tensors["out/pre_quantized"]
    quantized = model.quantize(h)[0]
    torch.testing.assert_close(model.decode(quantized, force_not_quantize=True), model.decode(h), atol=1e-6, rtol=0)
    assert (model.decode(h, force_not_quantize=True) - model.decode(h)).abs().max() > 0.01


@pytest.mark.parametrize("model", ["vq-f4", "vq-f8", "vq-f16"])
def test_names_and_shapes_of_published_autoencoders(model):
    assert shapes(published(model)) == shapes(published(model, VQModel)) == published_shapes(model)
    assert published(model).downsampling == int(model[4:])


@pytest.mark.parametrize("model", FIRST_STAGES)
def test_names_and_shapes_of_first_stages(model):
    assert shapes(published(FIRST_STAGES[model])) == published_shapes(model, "first_stage_model.")
    if model == "ldm-inpainting-big":  # its conditioner "__is_first_stage__" was saved once more
        assert shapes(published(FIRST_STAGES[model])) == published_shapes(model, "cond_stage_model.")


def test_every_parameter_trains():
    model = golden(VQModel)[0].train()
    decoded, loss = model(golden(VQModel)[1]["in/x"])
    (decoded.square().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.get_last_layer() is model.decoder.conv_out.weight


def test_half_width_weights_take_any_input():
    model, tensors = golden(VQModelInterface)
    model.bfloat16()
    with torch.no_grad():
        decoded = model.decode(model.encode(tensors["in/x"]).float())
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (2, 3, 32, 32)


def test_a_doubled_code_is_refused():
    params, _, _ = load_golden("autoencoder_vq")
    doubled = params["ddconfig"] | {"double_z": True}
    default = {key: value for key, value in params["ddconfig"].items() if key != "double_z"}
    for ddconfig in (doubled, default):
        with pytest.raises(ValueError, match="double_z false"):
            VQModel(**params | {"ddconfig": ddconfig})
