"""Distances among many points, in blocks, so that the table of all distances is never held at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # distances held at a time: 64 MiB in float32


def distance_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the Euclidean distances, float32, from a (n, d) to b (m, d): (rows of a, distances (rows, m))."""
    height = max(1, BLOCK_ELEMENTS // len(b))
    for first in range(0, len(a), height):
        rows = slice(first, first + height)
        yield rows, torch.cdist(a[rows].float(), b.float())


def kth_nearest(points: Tensor, k: int) -> Tensor:
    """Return the distance (n,) from each of points (n, d) to its k-th nearest other point.

    Raises:
        ValueError: there are not k other points.
    """
    if not 1 <= k < len(points):
        raise ValueError(f"k = {k} of {len(points)} points: k must be at least 1 and below the number of points")
    result = torch.empty(len(points))
    for rows, distances in distance_blocks(points, points):
        distances.diagonal(rows.start).fill_(torch.inf)  # a point is not its own neighbour; its copy is
        result[rows] = distances.topk(k, dim=1, largest=False).values[:, -1]
    return result


def nearest_neighbour(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distance, index), (n,) each, of the nearest of `others` (m, d) to each of points (n, d)."""
    index = torch.cat([distances.argmin(dim=1) for _, distances in distance_blocks(points, others)])
    return (points.float() - others[index].float()).norm(dim=1), index  # from differences: exactly 0 for a copy
