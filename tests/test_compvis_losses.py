"""CompVis's losses of autoencoders, term by term from their formulas."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses import vqperceptual as losses
from torch import nn

from ldm.models.distributions import DiagonalGaussianDistribution


class Linear1x1(nn.Module):
    """An autoencoder of one layer, its last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.last(x)


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def grad_norm(loss, layer):
    return torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()


def test_kl_loss_is_its_formula():
    net, stage = Linear1x1(), LPIPSWithDiscriminator(
        disc_start=10, logvar_init=0.3, kl_weight=0.01, disc_weight=0.5, perceptual_weight=0.0
    )  # fmt: skip
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    for step in (9, 10):
        y = net(X)
        loss, log = stage(X, y, posterior, 0, step, last_layer=net.last.weight, split="val")
        nll = ((X - y).abs() / math.exp(0.3) + 0.3).sum() / 2  # a sum per image
        g = -stage.discriminator(y).mean()
        weight = 0.5 * grad_norm(nll, net.last.weight) / (grad_norm(g, net.last.weight) + 1e-4)
        wanted = nll + 0.01 * posterior.kl().sum() / 2 + (weight * g if step == 10 else 0)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert log["val/total_loss"] == pytest.approx(wanted.item(), rel=1e-5)
        assert log["val/d_weight"] == pytest.approx(weight.item(), rel=1e-4)
        assert log["val/disc_factor"] == (step == 10)
    names = {"total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss", "d_weight", "disc_factor", "g_loss"}
    assert {f"val/{name}" for name in names} <= log.keys()
    weighted, _ = stage(
        X, y, posterior, 0, 0, last_layer=net.last.weight, weights=torch.tensor([2.0, 2.0]).view(2, 1, 1, 1)
    )
    assert weighted.item() == pytest.approx((2 * nll + 0.01 * posterior.kl().mean()).item(), rel=1e-5)
    loss.backward()
    assert stage.logvar.grad is not None
    with torch.no_grad():  # validation
        assert stage.eval()(X, net(X), posterior, 0, 20, last_layer=net.last.weight)[1]["train/d_weight"] == 0


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_discriminator_s_turn(kind):
    stage = LPIPSWithDiscriminator(disc_start=5, perceptual_weight=0.0, disc_loss=kind).eval()
    y = (X * 0.5).requires_grad_()
    real, fake = stage.discriminator(X), stage.discriminator(y)
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    vanilla = 0.5 * (torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean())
    loss, log = stage(X, y, None, 1, 5)
    assert loss.item() == pytest.approx((hinge if kind == "hinge" else vanilla).item(), rel=1e-5)
    assert log.keys() == {"train/disc_loss", "train/logits_real", "train/logits_fake"}
    loss.backward()
    assert y.grad is None and stage.discriminator.main[0].weight.grad is not None
    assert stage(X, y, None, 1, 4)[0] == 0


def test_vq_loss_is_its_formula():
    net = Linear1x1()
    stage = losses.VQLPIPSWithDiscriminator(
        disc_start=0, codebook_weight=0.7, disc_weight=0.8, perceptual_weight=0.0, n_classes=4, pixel_loss="l2"
    )
    y, codebook = net(X), torch.tensor(0.25)
    loss, log = stage(codebook, X, y, 0, 0, last_layer=net.last.weight, predicted_indices=torch.tensor([0, 0, 3, 3]))
    nll, g = (X - y).square().mean(), -stage.discriminator(y).mean()
    weight = 0.8 * grad_norm(nll, net.last.weight) / (grad_norm(g, net.last.weight) + 1e-4)
    assert loss.item() == pytest.approx((nll + weight * g + 0.7 * 0.25).item(), rel=1e-5)
    assert log["train/perplexity"] == pytest.approx(2.0, rel=1e-5) and log["train/cluster_usage"] == 2
    assert log["train/quant_loss"] == 0.25 and "logvar" not in dict(stage.named_parameters())
    for wrong in ({"use_actnorm": True}, {"disc_loss": "wgan"}, {"pixel_loss": "l3"}, {"perceptual_loss": "clips"}):
        refused(str(next(iter(wrong.values()))), losses.VQLPIPSWithDiscriminator, 0, perceptual_weight=0.0, **wrong)


def test_conditional_discriminator():
    stage = LPIPSWithDiscriminator(0, perceptual_weight=0.0, disc_conditional=True, disc_in_channels=5, disc_factor=0.0)
    cond = torch.zeros(2, 2, 32, 32)
    loss, _ = stage(X, X, DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)), 0, 0, cond=cond)
    assert loss == 0  # nothing lost, standard normal, and no discriminator
    with pytest.raises(AssertionError, match="if and only if disc_conditional"):
        stage(X, X, None, 1, 0)


def test_loss_helpers():
    real, fake = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    even = losses.hinge_d_loss_with_exemplar_weights(real, fake, torch.ones(3))
    assert even.item() == pytest.approx(losses.hinge_d_loss(real, fake).item())
    first = losses.hinge_d_loss_with_exemplar_weights(real, fake, torch.tensor([1.0, 0, 0]))
    assert first.item() == pytest.approx(losses.hinge_d_loss(real[:1], fake[:1]).item())
    assert losses.adopt_weight(0.5, 9, 10) == 0 and losses.adopt_weight(0.5, 10, threshold=10) == 0.5
    assert losses.adopt_weight(0.5, 0, 1, value=0.1) == 0.1
    assert (
        losses.l1(torch.tensor(1.0), torch.tensor(-2.0)) == 3 and losses.l2(torch.tensor(1.0), torch.tensor(-2.0)) == 9
    )
    uniform = losses.measure_perplexity(torch.arange(8), 8)
    assert uniform[0] == pytest.approx(8.0, rel=1e-5) and uniform[1] == 8


def test_perceptual_term(monkeypatch):
    """LPIPS is the package's: here one that gives 2 for the first image and 0 for the second."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    refused("pip install lpips", LPIPSWithDiscriminator, 0)

    class Stub(nn.Module):
        def __init__(self, net, use_dropout, verbose):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, y):
            return torch.tensor([2.0, 0.0]).view(2, 1, 1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Stub))
    stage = LPIPSWithDiscriminator(0, perceptual_weight=0.5, disc_factor=0.0)
    loss, log = stage(X, X, DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)), 0, 0)
    assert loss == 3 * 32 * 32 / 2 and log["train/rec_loss"] == 0.5  # on every pixel
    assert not stage.perceptual_loss.weight.requires_grad
