import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from ldm.models.discriminator import (
    NLayerDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_d_loss,
    vanilla_d_loss,
)


@pytest.mark.parametrize("n_layers, size", [(1, 14), (2, 6), (3, 2)])
def test_layers_and_widths(n_layers, size):
    network = NLayerDiscriminator(input_nc=1, ndf=8, n_layers=n_layers)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 1, size, size)
    assert NLayerDiscriminator(ndf=8, n_layers=5).main[-1].in_channels == 64  # no wider than 8 ndf


def test_weights_start_small():
    network = NLayerDiscriminator()
    weight = network.main[5].weight  # 128 x 256 x 4 x 4
    assert abs(weight.std().item() - 0.02) < 1e-4 and abs(weight.mean().item()) < 1e-4
    norms = torch.cat([m.weight for m in network.main if isinstance(m, torch.nn.BatchNorm2d)])
    assert abs(norms.mean().item() - 1) < 0.01 and abs(norms.std().item() - 0.02) < 0.004


def test_no_layers_is_refused():
    refused("n_layers is 0", NLayerDiscriminator, n_layers=0)


def test_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = 0.5 * (cross_entropy(real, torch.ones(2)) + cross_entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_d_loss(real, fake), expected)
    assert generator_loss(fake).item() == 1.0


def test_adaptive_weight_of_linear_losses():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])  # gradients of norm 5 and 2
    assert adaptive_weight((a * w).sum(), (b * w).sum(), w).item() == pytest.approx(5 / (2 + 1e-4))
    assert adaptive_weight((a * w).sum(), (0 * b * w).sum(), w).item() == pytest.approx(1e4)  # not 5e4
    assert not adaptive_weight((a * w).sum(), (b * w).sum(), w).requires_grad
