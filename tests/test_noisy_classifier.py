"""The noisy classifier: closed forms of an untrained one, and ADM's size; see test_published.py too."""

import pytest
import torch
from conftest import refused
from golden_fill import count, fill, randn, unet_params, untrained
from torch.nn import functional as F

from ldm.optional.noisy_classifier import POOLS, AttentionPool2d, EncoderUNetModel
from ldm.util import get_obj_from_str

SMALL = unet_params(in_channels=1, out_channels=10, attention_resolutions=[2], num_head_channels=16)


@pytest.mark.parametrize("pool", ["spatial", "spatial_v2"])
def test_spatial_heads_read_the_mean_of_every_layer(pool):
    """In closed form: residual branches start at zero, averaging keeps means, and a 1x1 convolution maps them."""
    torch.manual_seed(0)
    model = EncoderUNetModel(**SMALL, resblock_updown=True, pool=pool).double()
    x, t = randn(2, 1, 8, 8).double(), torch.tensor([3, 700])
    first = model.input_blocks[0][0](x).mean(dim=(2, 3))  # (2, 32) of the first convolution, block and halving
    wider = model.input_blocks[3][0].skip_connection
    second = first @ wider.weight[:, :, 0, 0].T + wider.bias  # (2, 64) of the second level's block and the middle
    into, *_, out = model.out
    hidden = F.linear(torch.cat([first, first, first, second, second], dim=1), into.weight, into.bias)
    if pool == "spatial":
        hidden = hidden.relu()
    else:
        groups = hidden.view(2, 32, -1)
        scaled = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        hidden = F.silu(scaled.view(2, -1))  # gain 1 and shift 0 to begin with
    # the time embedding's angles are float32, but nothing of it arrives; all else is float64
    torch.testing.assert_close(model(x, t), F.linear(hidden, out.weight, out.bias), atol=1e-12, rtol=1e-12)


def test_attention_pooling_of_one_head_is_the_formula():
    torch.manual_seed(1)
    pooling, x = AttentionPool2d(3, 8, 8, 5).double(), randn(2, 8, 3, 3).double()
    tokens = x.flatten(2).mT  # (2, 9, 8)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + pooling.positional_embedding.T
    q, k, v = (tokens @ pooling.qkv_proj.weight[:, :, 0].T + pooling.qkv_proj.bias).split(8, dim=-1)
    mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
    expected = mixed[:, 0] @ pooling.c_proj.weight[:, :, 0].T + pooling.c_proj.bias  # only the mean's token is read
    torch.testing.assert_close(pooling(x), expected, atol=1e-12, rtol=1e-12)


def test_size_of_adms_classifier_of_64_pixels():
    with torch.device("meta"):
        size = {"channel_mult": [1, 2, 3, 4], "num_head_channels": 64, "use_scale_shift_norm": True}
        model = EncoderUNetModel(64, 3, 128, 1000, 4, [2, 4, 8], resblock_updown=True, pool="attention", **size)
    assert count(model) == 65_438_568


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_trains_and_images_and_levels_count(pool):
    model = fill(EncoderUNetModel(**SMALL, pool=pool, dropout=0.1, use_checkpoint=True), 1)
    x, t = randn(2, 1, 8, 8).requires_grad_(), torch.tensor([3.0, 700.5])
    logits = model(x, t)
    assert logits.shape == (2, 10) and not torch.allclose(logits, model(x, t.flip(0)))
    F.cross_entropy(logits, torch.tensor([1, 9])).backward()
    assert x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert untrained(model) == []


def test_an_untrained_adaptive_head_gives_zeros():
    assert torch.equal(EncoderUNetModel(**SMALL)(randn(2, 1, 8, 8), torch.tensor([0, 9])), torch.zeros(2, 10))


def test_only_attention_pooling_is_bound_to_the_size():
    t = torch.tensor([1, 2])
    for pool in ("adaptive", "spatial", "spatial_v2"):
        assert EncoderUNetModel(**SMALL, pool=pool)(randn(2, 1, 16, 16), t).shape == (2, 10)
    with pytest.raises(ValueError, match="4 x 4, and got 8 x 8: give images of image_size"):
        EncoderUNetModel(**SMALL, pool="attention")(randn(2, 1, 16, 16), t)


def test_computes_in_its_parameters_dtype():
    model = fill(EncoderUNetModel(**SMALL, pool="attention"), 1)
    x, t = randn(2, 1, 8, 8), torch.tensor([3.0, 700.5])
    with torch.no_grad():
        expected = model(x, t)
        logits = model.bfloat16()(x, t)
    assert model.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()  # 8 bits, over some 20 layers


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pool": "mean"}, "pool 'mean' is unknown: it is one of adaptive, attention, spatial, spatial_v2"),
        ({"pool": "attention", "num_head_channels": -1}, "needs num_head_channels"),
        ({"num_head_channels": 24}, "do not split into heads"),
        ({"dims": 3}, "dims is 3"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    refused(message, EncoderUNetModel, **SMALL | options)
    refused("8 channels do not split into heads: num_head_channels is 3", AttentionPool2d, 3, 8, 3)


def test_compvis_names():
    old = "ldm.modules.diffusionmodules.openaimodel."
    assert get_obj_from_str(f"{old}EncoderUNetModel") is EncoderUNetModel
    assert get_obj_from_str(f"{old}AttentionPool2d") is AttentionPool2d
