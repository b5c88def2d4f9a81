"""A distance between images in the features of a frozen network (Zhang et al. 2018, eq. 1, without weights)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Added to the squared norm: where all features are near zero, less would let the gradient explode.
MIN_SQUARED_NORM = 1e-4


def perceptual_distance(features: Callable[[Tensor], Sequence[Tensor]], x: Tensor, target: Tensor) -> Tensor:
    """Return the perceptual distance (b,) of x from target, from 0 to 4; gradients reach x only.

    Args:
        features: a network that returns a list of feature maps (b, c_i, h_i, w_i), frozen by the caller.
        x, target: pixels in [-1, 1], (b, c, h, w).
    """
    with torch.no_grad():
        target_features = features(target)
    return feature_distance(features(x), target_features)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of feature vectors scaled to unit length, averaged over positions, then over maps.

    a and b are lists of feature maps (b, c_i, h_i, w_i); the distance is float32 (b,).
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
