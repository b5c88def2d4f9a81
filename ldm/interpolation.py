"""Images on the way from one prompt or seed to another: `interpolate` lists them, and `generate` takes them.

Seeds are interpolated on the sphere, since the length of noise of many dimensions is nearly constant and a straight
line would shorten it (White 2016, https://arxiv.org/abs/1609.04468); prompts on a straight line between their hidden
states.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.batching import Blend
from ldm.settings import INT, Setting

COUNT = Setting(INT, "", low=2)


def interpolate(first: Any, last: Any, count: int) -> list[Blend]:
    """Return `count` prompts, or seeds, evenly spaced from the first to the last of them, both included."""
    count = COUNT.checked("count", count)
    return [Blend(first, last, i / (count - 1)) for i in range(count)]


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Interpolate two tensors of one shape on the sphere (Shoemake 1985): the first at share 0, the last at 1."""
    cosine = (first * last).sum() / (first.norm() * last.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-3:  # of one direction, or opposite ones, between which there is no one way
        return torch.lerp(first, last, share)
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / angle.sin()


def lerp_conditions(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Interpolate the conditions (b, ...) of b images on straight lines. ValueError for class numbers."""
    found = {}
    for name, start in first.items():
        if not start.is_floating_point():
            raise ValueError("prompts of this model are class numbers, between which there is nothing: name one class")
        share = torch.tensor(shares).to(start).view(-1, *[1] * (start.ndim - 1))
        found[name] = torch.lerp(start, last[name], share)
    return found
