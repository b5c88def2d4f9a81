import pytest
import torch
from conftest import refused
from torch import nn

from ldm.models.perceptual import feature_distance, lpips, perceptual_distance


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 1, 3, 3, generator=generator), requires_grad=False)
        self.second = nn.Parameter(torch.randn(8, 6, 3, 3, generator=generator) / 7, requires_grad=False)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = nn.functional.conv2d(x, self.first).relu()
        return [first, nn.functional.conv2d(first, self.second, stride=2).relu()]


def test_distance_by_hand():
    a = [torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2), torch.ones(1, 3, 1, 1)]
    b = [torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2), torch.full((1, 3, 1, 1), 5.0)]
    # unit vectors (.6, .8) and (.8, .6): squared distance .08; the second maps point the same way: 0
    assert feature_distance(a, b).tolist() == pytest.approx([0.04], abs=1e-4)
    opposite = feature_distance([torch.ones(1, 3, 1, 1)], [-torch.ones(1, 3, 1, 1)])
    assert opposite.tolist() == pytest.approx([4.0], abs=1e-3)


def test_zero_for_equal_images_and_growing_with_noise():
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.rand(3, 1, 12, 12, generator=generator), torch.randn(3, 1, 12, 12, generator=generator)
    network = Features()
    distances = torch.stack([perceptual_distance(network, x + s * noise, x) for s in (0.0, 0.05, 0.2, 0.8)])
    assert distances[0].tolist() == [0, 0, 0] and distances.shape == (4, 3)
    assert (distances.diff(dim=0) > 0).all()


def test_gradient_reaches_x_only_and_stays_finite_where_features_vanish():
    x, target = torch.zeros(1, 1, 12, 12, requires_grad=True), torch.rand(1, 1, 12, 12, requires_grad=True)
    network = Features()
    perceptual_distance(network, x + 1e-6, target).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0 and target.grad is None
    assert x.grad.abs().max() < 100


def test_wrong_lists_are_refused():
    maps = [torch.ones(1, 2, 1, 1)]
    refused("got 1 and 2 feature maps", feature_distance, maps, maps * 2)
    refused("got 0 and 0", feature_distance, [], [])


def test_lpips_is_the_packages():
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    theirs = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = {f"features.{key.partition('.')[2]}": tensor for key, tensor in theirs.net.state_dict().items()}
    x, y = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1)
    network = lpips({**layers, "classifier.0.bias": torch.zeros(1)})
    torch.testing.assert_close(perceptual_distance(network, x, y), theirs(x, y).flatten(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in network.parameters())
