"""How a run of images is cut into batches; free of torch, because recipes are planned before it is imported."""

from collections.abc import Sequence
from itertools import groupby


def batches(lengths: Sequence[int], size: int) -> list[slice]:
    """Consecutive batches of at most `size` images, a new one wherever the length of the prompts changes.

    lengths: how many chunks each image's prompt (or negative prompt) makes. Images of one batch share it, so that
    no image's prompt is padded because of another's.
    """
    found, start = [], 0
    for _, run in groupby(lengths):
        end = start + len(list(run))
        found += [slice(i, min(i + size, end)) for i in range(start, end, size)]
        start = end
    return found
