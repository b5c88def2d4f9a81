"""Diversity within a class: how far apart two images of the same digit are."""

import torch
from torch import Tensor

from ldm.evaluation.distances import distance_blocks


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
