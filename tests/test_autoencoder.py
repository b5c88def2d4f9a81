import torch
from conftest import refused
from golden_fill import fill, shapes, untrained
from torch import nn

from ldm.models.autoencoder import AttnBlock, AutoencoderKL

SMALL = {"ch": 16, "out_ch": 1, "in_channels": 1, "num_res_blocks": 1, "resolution": 32, "z_channels": 4}
SMALL |= {"ch_mult": [1, 2, 4], "attn_resolutions": [], "norm_groups": 8}


def small(**changes) -> AutoencoderKL:
    return fill(AutoencoderKL(SMALL | changes, embed_dim=3), 3)


def images() -> torch.Tensor:
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_epsilons():
    model = small(attn_resolutions=[8])
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) > 10 and {norm.eps for norm in norms} == {1e-6}
    assert {norm.num_groups for norm in norms} == {8}


def test_small_widths_train():
    model = AutoencoderKL(SMALL, embed_dim=4)
    decoded, posterior = model(images())
    assert decoded.shape == (2, 1, 32, 32) and posterior.mean.shape == (2, 4, 8, 8)
    (decoded.square().mean() + posterior.kl().mean()).backward()
    assert untrained(model) == []
    assert model.get_last_layer() is model.decoder.conv_out.weight


def test_forward_samples_or_takes_the_mode():
    model, x = small(), images()
    with torch.no_grad():
        posterior = model.encode(x)
        assert torch.equal(model(x, sample_posterior=False)[0], model.decode(posterior.mode()))
        torch.manual_seed(0)
        decoded, _ = model(x)
        torch.manual_seed(0)
        assert torch.equal(decoded, model.decode(posterior.sample()))


def test_every_option_of_ddconfig():
    x, keys = images(), set(shapes(small()))
    assert isinstance(small(attn_resolutions=[8]).encoder.down[2].attn[0], AttnBlock)
    assert len(small(attn_resolutions=[8]).decoder.up[2].attn) == 2
    assert small(attn_resolutions=[32]).decoder.up[0].attn[0].q.in_channels == 16
    assert not [key for key in shapes(small(attn_type="none")) if "attn" in key]
    assert set(shapes(small(attn_type="vanilla-xformers"))) == keys
    assert not [key for key in shapes(small(resamp_with_conv=False)) if "sample" in key]
    for options in ({"attn_resolutions": [8, 32]}, {"attn_type": "none"}, {"resamp_with_conv": False}):
        model = small(**options)
        assert model.decode(model.encode(x).mode()).shape == x.shape
    z = small().encode(x).mode()
    torch.testing.assert_close(small(tanh_out=True).decode(z), small().decode(z).tanh())
    dropping = small(dropout=0.5)
    assert torch.equal(dropping.decode(z), small().decode(z))
    assert not torch.equal(dropping.train().decode(z), small().decode(z))


def test_wrong_options_are_refused():
    refused("16 channels do not split into 32 groups", small, norm_groups=32)
    refused("attn_type is 'linear'", small, attn_type="linear")
    refused("double_z", small, double_z=False)
    refused("chs", small, chs=16)
    refused("patch 0 must be an integer from 1", small, patch=0)


def test_patches_are_channels_of_a_smaller_image():
    x = images()
    model = small(patch=2, ch_mult=[1, 2], attn_resolutions=[16])  # attention at 16 x 16, the first level
    inner = small(in_channels=4, out_ch=4, ch_mult=[1, 2], resolution=16, attn_resolutions=[16])
    assert shapes(model) == shapes(inner) and model.decoder.z_shape == inner.decoder.z_shape
    assert (model.downsampling, model.image_channels) == (2 * inner.downsampling, 1)
    squares = x.view(2, 1, 16, 2, 16, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 4, 16, 16)
    z = inner.encode(squares).mode()
    assert torch.equal(model.encode(x).mode(), z)
    pixels = inner.decode(z).view(2, 2, 2, 16, 16).permute(0, 3, 1, 4, 2).reshape(2, 1, 32, 32)
    assert torch.equal(model.decode(z), pixels)


def test_fold_latent_statistics():
    model, x = small().double(), images().double()
    with torch.no_grad():
        before = model.encode(x)
        decoded = model.decode(before.mode())
        mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
        model.fold_latent_statistics(mean, std)
        after = model.encode(x)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(after.std, before.std / std[:, None, None], atol=1e-12, rtol=0)
    torch.testing.assert_close(model.decode(after.mode()), decoded, atol=1e-12, rtol=0)


def test_fold_latent_statistics_in_float32():
    model, x = small(), images()
    with torch.no_grad():
        decoded = model.decode(model.encode(x).mode())
        model.fold_latent_statistics(torch.tensor([0.5, -3.0, 0.0]), torch.tensor([0.2, 4.0, 1.0]))
        torch.testing.assert_close(model.decode(model.encode(x).mode()), decoded, atol=1e-5, rtol=0)


def test_fold_latent_statistics_refuses_nonsense():
    model = small()
    refused("3 latent channels", model.fold_latent_statistics, torch.zeros(4), torch.ones(3))
    for std in (0.0, -1.0, float("nan")):
        refused("std positive", model.fold_latent_statistics, torch.zeros(3), torch.tensor([1.0, std, 1.0]))


def test_half_width_weights():
    model, x = small(), images()
    with torch.no_grad():
        expected = model.decode(model.encode(x).mode())
        model.bfloat16()
        posterior = model.encode(x)
        decoded = model.decode(posterior.mode())
    assert posterior.mean.dtype == torch.float32 and decoded.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits, and rounding adds up over some 20 layers
    assert (decoded - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.02
