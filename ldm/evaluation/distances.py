"""Nearest neighbours among many points, in blocks, so that the table of all distances is never held at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # distances held at a time: 64 MiB in float32


def squared_distance_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances from a (n, d) to b (m, d), float32: (rows, distances (rows, m)) from top to bottom.

    By |x|^2 + |y|^2 - 2 x y, one matrix product; its rounding error is relative to |x|^2, not to the distance.
    """
    a, b = a.float(), b.float()
    norms = b.square().sum(dim=1)  # (m,)
    height = max(1, BLOCK_ELEMENTS // len(b))
    for first in range(0, len(a), height):
        rows = slice(first, min(first + height, len(a)))
        part = a[rows]
        distances = torch.addmm(norms, part, b.T, alpha=-2).add_(part.square().sum(dim=1, keepdim=True))
        yield rows, distances.clamp_(min=0)


def kth_nearest(points: Tensor, k: int) -> Tensor:
    """Squared distance (n,) from each of points (n, d) to its k-th nearest other point.

    Raises:
        ValueError: there are not k other points.
    """
    if not 1 <= k < len(points):
        raise ValueError(f"k = {k} of {len(points)} points: k must be at least 1 and below the number of points")
    result = torch.empty(len(points))
    for rows, distances in squared_distance_blocks(points, points):
        own = torch.arange(rows.start, rows.stop)
        distances[torch.arange(len(own)), own] = torch.inf  # a point is no neighbour of itself; its copy is
        result[rows] = distances.topk(k, dim=1, largest=False).values[:, -1]
    return result


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest of `others` (m, d) to each of points (n, d); distances from differences."""
    index = torch.empty(len(points), dtype=torch.long)
    for rows, distances in squared_distance_blocks(points, others):
        index[rows] = distances.argmin(dim=1)
    return (points.float() - others[index].float()).norm(dim=1), index
