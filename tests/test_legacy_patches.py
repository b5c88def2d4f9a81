"""Patches by CompVis's names reach our running code, and old pickles load."""

import importlib
import pickle
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ldm.util import get_obj_from_str


def tiny_unet(**more):
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    size = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    net = UNetModel(**size, attention_resolutions=[1], channel_mult=[1], num_heads=2, use_spatial_transformer=True,
                    context_dim=8, legacy=False, **more)  # fmt: skip
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


ARGUMENTS = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 8))


def test_patching_a_class_by_its_old_name():
    net = tiny_unet()
    plain = net(*ARGUMENTS)
    calls = []

    def forward(self, x, context=None, mask=None):  # what research code reads of it
        calls.append(self.heads)
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.to_out(out.transpose(1, 2).flatten(2)) * 1.0

    with mock.patch("ldm.modules.attention.CrossAttention.forward", forward):
        patched = net(*ARGUMENTS)
    assert calls == [2] * 8  # two in each of four transformers
    assert torch.allclose(patched, plain, atol=1e-5)
    zero = "ldm.modules.attention.CrossAttention.forward"
    with mock.patch(zero, lambda self, x, context=None, mask=None: x * 0):
        assert not torch.allclose(net(*ARGUMENTS), plain, atol=1e-3)
    assert torch.equal(net(*ARGUMENTS), plain)


def test_patching_functions_by_their_old_names():
    net, calls = tiny_unet(use_checkpoint=True), []

    def no_checkpoint(func, inputs, params, flag):
        calls.append(flag)
        return func(*inputs)

    with mock.patch("ldm.modules.diffusionmodules.util.checkpoint", no_checkpoint):
        net(*ARGUMENTS)
    assert calls == [True] * 9  # five residual blocks and four transformer blocks
    with mock.patch("ldm.modules.diffusionmodules.openaimodel.timestep_embedding", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            net(*ARGUMENTS)
    with mock.patch("ldm.modules.diffusionmodules.openaimodel.SpatialTransformer") as made:
        made.side_effect = lambda *args, **kwargs: torch.nn.Identity()
        tiny_unet()
    assert made.call_count == 4


def test_patching_the_autoencoder():
    from ldm.models.autoencoder import Encoder

    size = {"ch": 32, "out_ch": 3, "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "resolution": 16}
    net, x = Encoder(**size, z_channels=4, ch_mult=[1, 2]), torch.randn(1, 3, 16, 16)
    plain = net(x)
    with mock.patch("ldm.modules.diffusionmodules.model.nonlinearity", side_effect=torch.nn.functional.silu) as silu:
        assert torch.equal(net(x), plain)
    assert silu.call_count == 9  # two in each of four residual blocks, and the last
    with mock.patch("ldm.modules.diffusionmodules.model.AttnBlock.forward", lambda self, x: x * 0):
        assert not torch.allclose(net(x), plain, atol=1e-4)
    assert torch.equal(net(x), plain)


def test_patching_the_samplers_and_names_that_are_merely_used():
    from ldm.models.diffusion.ddim import DDIMSampler

    with mock.patch("ldm.models.diffusion.ddim.make_ddim_timesteps", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            ab = torch.linspace(0.99, 0.01, 10)
            DDIMSampler(
                SimpleNamespace(num_timesteps=10, betas=ab, alphas_cumprod=ab, alphas_cumprod_prev=ab)
            ).make_schedule(5)
    for name in ("ldm.util.exists", "ldm.models.diffusion.ddpm.exists", "ldm.modules.losses.LPIPSWithDiscriminator"):
        module = importlib.import_module(name.rpartition(".")[0])
        before = getattr(module, name.rpartition(".")[2])
        with mock.patch(name) as patched:
            assert getattr(module, name.rpartition(".")[2]) is patched
        assert getattr(module, name.rpartition(".")[2]) is before
    with mock.patch("ldm.modules.losses.LPIPSWithDiscriminator", torch.nn.Identity) as patched:
        assert get_obj_from_str("torch.nn.Identity") is patched


# Old pickles


def test_pickles_of_old_names_load():
    from ldm.models.distributions import DiagonalGaussianDistribution
    from ldm.models.vq_autoencoder import VQModelInterface

    posterior = DiagonalGaussianDistribution(torch.arange(8.0).view(1, 2, 2, 2))
    new, old = b"ldm.models.distributions", b"ldm.modules.distributions.distributions"
    written = pickle.dumps(posterior, protocol=0).replace(new, old)
    assert old in written
    again = pickle.loads(written)
    assert type(again) is DiagonalGaussianDistribution and torch.equal(again.mean, posterior.mean)
    assert pickle.loads(b"cldm.models.autoencoder\nVQModelInterface\n.") is VQModelInterface
    assert pickle.loads(b"cldm.modules.losses\nLPIPSWithDiscriminator\n.").__module__ == "ldm.compvis.losses"
    assert pickle.loads(b"cldm.modules.diffusionmodules.util\nlinear\n.") is torch.nn.Linear
    with pytest.raises(ModuleNotFoundError, match="No module named 'ldm.modules.gone'"):
        pickle.loads(b"cldm.modules.gone\nThing\n.")


def test_whole_networks_of_old_pickles_load():
    net = tiny_unet()
    written = pickle.dumps(net, protocol=0)
    names = {"unet": "diffusionmodules.openaimodel", "blocks": "diffusionmodules.openaimodel", "attention": "attention"}
    for new, old in names.items():
        assert f"cldm.models.{new}\n".encode() in written
        written = written.replace(f"cldm.models.{new}\n".encode(), f"cldm.modules.{old}\n".encode())
    again = pickle.loads(written)
    assert type(again) is type(net) and torch.equal(again(*ARGUMENTS), net(*ARGUMENTS))
