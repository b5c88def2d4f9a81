"""Memorisation: are generated images nearer to training images than unseen real ones are?"""

from typing import NamedTuple

import torch
from torch import Tensor

from ldm.evaluation.distances import nearest_neighbour


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
