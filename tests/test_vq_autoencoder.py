"""The VQ autoencoder, as a first stage and in the form that trains; see test_published.py too."""

import torch
from conftest import refused
from golden_fill import fill, load_golden, untrained
from torch import nn

from ldm.models.vq_autoencoder import VQModel, VQModelInterface


def golden(kind: type) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    params, seed, tensors = load_golden("autoencoder_vq")
    return fill(kind(**params), seed), tensors


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


def test_every_parameter_trains():
    model = golden(VQModel)[0].train()
    decoded, loss = model(golden(VQModel)[1]["in/x"])
    (decoded.square().mean() + loss).backward()
    assert untrained(model) == []
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
        refused("double_z false", VQModel, **params | {"ddconfig": ddconfig})
