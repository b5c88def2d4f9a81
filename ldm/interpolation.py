"""Images on the way from one prompt or seed to another: `interpolate` lists them, and `generate` takes them.

Seeds are interpolated on the sphere, since the length of noise of many dimensions is nearly constant and a straight
line would shorten it (White 2016, https://arxiv.org/abs/1609.04468); prompts on a straight line between their hidden
states.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.arrays import Tensor, cast_like, library
from ldm.batching import Blend
from ldm.settings import INT, Setting

COUNT = Setting(INT, "", low=2)


def interpolate(first: Any, last: Any, count: int) -> list[Blend]:
    """Return `count` prompts, or seeds, evenly spaced from the first to the last of them, both included."""
    count = COUNT.checked("count", count)
    return [Blend(first, last, i / (count - 1)) for i in range(count)]


def slerp(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Interpolate two tensors of one shape on the sphere (Shoemake 1985): the first at share 0, the last at 1."""
    own = library(first)
    angle = own.arccos((first * last).sum() / ((first * first).sum() * (last * last).sum()) ** 0.5)
    if not own.sin(angle) >= 1e-3:  # of one direction, or opposite ones, between which there is no one way
        return first + share * (last - first)
    return (own.sin((1 - share) * angle) * first + own.sin(share * angle) * last) / own.sin(angle)


def lerp_conditions(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], shares: Sequence[float]
) -> dict[str, Tensor]:
    """Interpolate the conditions (b, ...) of b images on straight lines. ValueError for class numbers."""
    found = {}
    for name, start in first.items():
        if "int" in str(start.dtype):
            raise ValueError("prompts of this model are class numbers, between which there is nothing: name one class")
        share = cast_like(shares, start).reshape(-1, *[1] * (start.ndim - 1))
        found[name] = (1 - share) * start + share * last[name]
    return found
