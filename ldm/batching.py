"""How a run of images is split into batches. It imports no torch: recipes are planned before that is imported."""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple


class Blend(NamedTuple):
    """A prompt or seed between two others: the first at share 0, the last at share 1 (`ldm.interpolation`)."""

    first: Any
    last: Any
    share: float


def of_ends(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the function's result, of a blend the blend of those of its ends."""
    if not isinstance(value, Blend):
        return function(value)
    return Blend(function(value.first), function(value.last), value.share)


def distinct_prompts(prompts: Collection[Any]) -> tuple[list[Any], list[int]]:
    """Return the distinct prompts in order, and the index of each prompt among them."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return list(index), [index[prompt] for prompt in prompts]


def batches(lengths: Sequence[int], size: int) -> list[slice]:
    """Return consecutive batches of up to `size` images, a new one wherever the length of the prompts changes.

    lengths: how many chunks each image's prompt (or negative prompt) has. It is the same in a batch, so that no
    image's prompt is padded because of another's.
    """
    found, start = [], 0
    for _, run in groupby(lengths):
        end = start + len(list(run))
        found += [slice(i, min(i + size, end)) for i in range(start, end, size)]
        start = end
    return found
