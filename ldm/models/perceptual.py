"""Distances between images: in the features of a frozen network (Zhang et al. 2018, eq. 1), by LPIPS or without
learned weights, and in pixels."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

# Added to the squared norm: where all features are near zero, less would let the gradient explode.
MIN_SQUARED_NORM = 1e-4


def perceptual_distance(network: Any, x: Tensor, target: Tensor) -> Tensor:
    """Return the perceptual distance (b,) of x from target; gradients reach x only.

    Args:
        network: one whose `maps` returns a list of feature maps (b, c_i, h_i, w_i), or LPIPS; frozen by the caller.
        x, target: pixels in [-1, 1], (b, c, h, w).
    """
    if not hasattr(network, "maps"):
        return network(x, target).flatten()
    with torch.no_grad():
        target_features = network.maps(target)
    return feature_distance(network.maps(x), target_features)


def lpips(vgg16: Mapping[str, Tensor]) -> nn.Module:
    """Build LPIPS (Zhang et al. 2018; version 0.1) by its package: images (b, 3, h, w), twice -> (b, 1, 1, 1).

    vgg16: torchvision's tensors of VGG-16. The package has the learned weights of its layers, and would download these.
    """
    try:
        package = import_module("lpips")  # not a dependency, because only this needs it
    except ImportError:
        raise ValueError("the perceptual loss LPIPS needs the package lpips: pip install lpips") from None
    model = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = {key: vgg16[f"features.{key.partition('.')[2]}"] for key in model.net.state_dict()}  # slice1.0.weight
    model.net.load_state_dict(layers)
    return model.eval().requires_grad_(False)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of feature vectors scaled to unit length, averaged over positions, then over maps.

    a and b are lists of feature maps (b, c_i, h_i, w_i); the distance is float32 (b,), from 0 to 4.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(
            f"got {len(a)} and {len(b)} feature maps: the network must return the same list of at least one"
        )
    distances = [(_unit(p) - _unit(q)).square().sum(dim=1).mean(dim=(1, 2)) for p, q in zip(a, b, strict=True)]
    return torch.stack(distances).mean(dim=0)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + MIN_SQUARED_NORM)  # (b, c, h, w)


def psnr(reconstruction: Tensor, images: Tensor, peak: float = 2.0) -> Tensor:
    """Return 10 log10(peak^2 / mean squared error) in dB of each of (n, c, h, w): (n,); infinite for an exact copy.

    Args:
        peak: the range of the pixels, 2 for [-1, 1].
    """
    error = (reconstruction.double() - images.double()).square().flatten(1).mean(dim=1)
    return 10 * (peak**2 / error).log10()
