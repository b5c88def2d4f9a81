"""Distances among many points, and the figures that follow from them: precision and recall, diversity, memorisation.

They are computed in blocks, so that the table of all distances is never held at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

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


class PrecisionRecall(NamedTuple):
    """Shares in 0..1; real images against other real ones reach about 0.85 to 0.9, not 1."""

    precision: float  # generated images that lie where real ones do
    recall: float  # real images that lie where generated ones do


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al. 2019) of generated features (n, d) against real (m, d).

    Both depend on n and m.

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest neighbour
    in the set (eq. 1); precision and recall are the shares of each set inside the other's manifold (eq. 2).
    """
    real_radius, generated_radius = kth_nearest(real, k), kth_nearest(generated, k)
    precise = torch.empty(len(generated), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for rows, distances in distance_blocks(generated, real):
        precise[rows] = (distances <= real_radius).any(dim=1)
        recalled |= (distances <= generated_radius[rows, None]).any(dim=0)
    return PrecisionRecall(precise.double().mean().item(), recalled.double().mean().item())


def mean_pairwise_distance(points: Tensor) -> float:
    """Return the mean Euclidean distance over all pairs of different points (n, d); nan for fewer than two."""
    if len(points) < 2:
        return float("nan")
    total = 0.0
    for rows, distances in distance_blocks(points, points):
        distances.diagonal(rows.start).fill_(0)  # exactly: rounding leaves a little
        total += distances.sum(dtype=torch.float64).item()
    return total / (len(points) * (len(points) - 1))


def class_diversity(features: Tensor, labels: Tensor, classes: int = 10) -> list[float]:
    """Return the mean pairwise distance of features (n, d) within each class of labels (n,)."""
    return [mean_pairwise_distance(features[labels == label]) for label in range(classes)]


class Memorisation(NamedTuple):
    """Distances are Euclidean over the inner pixels, in [0, 1]."""

    median: float  # of generated images' distances to the nearest training image
    real_median: float  # the same for test images
    ratio: float  # median / real_median; well below 1 means copying
    share_below_first_percentile: float  # generated images nearer than 99 % of test images are; 0.01 if alike


def nearest_training_distance(images: Tensor, training: Tensor) -> Tensor:
    """Return the distance (n,) of uint8 images (n, h, w) to the nearest of uint8 (m, h, w), pixels in [0, 1]."""
    return nearest_neighbour(images.flatten(1).float() / 255, training.flatten(1).float() / 255)[0]


def memorisation(distances: Tensor, real_median: float, real_first_percentile: float) -> Memorisation:
    """Compare generated images' distances (n,) with two quantiles of the test images' distances."""
    median = distances.quantile(0.5).item()
    share = (distances < real_first_percentile).double().mean().item()
    return Memorisation(median, real_median, median / real_median, share)


def quantiles(distances: Tensor) -> tuple[float, float]:
    """Return (median, first percentile) of distances (n,)."""
    median, first = distances.double().quantile(torch.tensor([0.5, 0.01], dtype=torch.float64)).tolist()
    return median, first
