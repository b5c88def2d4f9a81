"""A distance between images as a small frozen network sees them (Zhang et al. 2018, eq. 1, without weights)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIN_SQUARED_NORM = (
    1e-4  # added to the squared norm: where all features are near zero, less would let the gradient explode
)


def perceptual_distance(features: Callable[[Tensor], Sequence[Tensor]], x: Tensor, target: Tensor) -> Tensor:
    """How different x looks from target, (b, c, h, w) both, pixels in [-1, 1]: (b,), each from 0 to 4.

    `features` is a network that returns a list of feature maps (b, c_i, h_i, w_i); the caller freezes it. Gradients
    reach x only.
    """
    with torch.no_grad():
        wanted = features(target)
    return feature_distance(features(x), wanted)


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Squared distance of feature vectors scaled to unit length, averaged over positions, then over maps.

    a and b are lists of as many maps (b, c_i, h_i, w_i); the result is (b,), in float32.
    Raises ValueError when there are no maps, or not as many in both.
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
