"""Data sets whose images have several shapes: the `groups` of a data set list them."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def alike_batches(dataset: Any, batch_size: int) -> list[list[int]]:
    """Return the indices of a whole data set in batches, in order, of images of one shape each (`groups`)."""
    return in_groups(range(len(dataset)), getattr(dataset, "groups", None), batch_size)


def in_groups(indices: Iterable[int], groups: Sequence[Hashable] | None, size: int) -> list[list[int]]:
    """Return the indices, in their order, as lists of at most `size` of one group each; `groups` as in EpochBatches."""
    parts = defaultdict(list)
    for index in indices:
        parts[None if groups is None else groups[index]].append(index)
    return [part[i : i + size] for part in parts.values() for i in range(0, len(part), size)]


def latent_statistics(parts: Iterable[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (z,) in float64, over all images and pixels.

    parts: for each shape, the mean and deviation of each image's latents, (z, h, w) each.
    """
    stacks = [[torch.stack(both).double() for both in zip(*part, strict=True)] for part in parts]
    count = sum(means[:, 0].numel() for means, _ in stacks)
    mean = torch.stack([means.sum((0, 2, 3)) for means, _ in stacks]).sum(0) / count
    squares = [((means - mean[:, None, None]).square() + stds.square()).sum((0, 2, 3)) for means, stds in stacks]
    return mean, (torch.stack(squares).sum(0) / count).sqrt()


def squared(images: Tensor, size: int) -> Tensor:
    """Resize images (b, c, h, w) to squares, distorted; those of that size stay as they are."""
    shape = (size, size)
    return images if images.shape[-2:] == shape else F.interpolate(images, shape, mode="bilinear", antialias=True)
