"""Distances among many points, precision and recall, diversity, memorisation."""

import math

import pytest
import torch
from conftest import refused
from sklearn.neighbors import NearestNeighbors

from ldm.evaluation import distances
from ldm.evaluation.distances import (
    class_diversity,
    kth_nearest,
    mean_pairwise_distance,
    memorisation,
    nearest_neighbour,
    nearest_training_distance,
    precision_recall,
    quantiles,
)


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[2**24, 1000])
def blocks(request, monkeypatch):
    """Everything at once, and a few rows at a time: the same figures."""
    monkeypatch.setattr(distances, "BLOCK_ELEMENTS", request.param)


def test_kth_nearest_is_scikit_learns(blocks):
    points = normal(300, 16, 0)
    reference = NearestNeighbors(n_neighbors=4).fit(points.numpy()).kneighbors()[0]  # excludes the point itself
    # Squared norms are about 16, so 16 * 2^-23 * a few is lost by expanding the square.
    assert kth_nearest(points, 3).numpy() == pytest.approx(reference[:, 2], abs=1e-4)


@pytest.mark.parametrize("k", [0, 5])
def test_kth_nearest_needs_k_others(k):
    refused(f"k = {k}", kth_nearest, normal(5, 2, 0), k)


def test_precision_and_recall_of_hand_made_points(blocks):
    # On a line, k = 1: real balls reach 1 around 0 and 1, and 9 around 10; generated ones 0.1 around 0.5 and
    # 0.6, and 99.4 around 100.
    real, generated = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.5], [0.6], [100.0]])
    precision, recall = precision_recall(real, generated, k=1)
    assert precision == pytest.approx(2 / 3)  # 100 lies outside every real ball
    assert recall == pytest.approx(2 / 3)  # 1 and 10 lie within 99.4 of 100; 0 lies outside all balls


def test_precision_and_recall_tell_collapse_from_spread(blocks):
    real = normal(400, 4, 0)
    same = precision_recall(real, normal(400, 4, 1))
    narrow = precision_recall(real, 0.2 * normal(400, 4, 2))
    wide = precision_recall(real, 4 * normal(400, 4, 3))
    assert 0.75 < same.precision < 1 and 0.75 < same.recall < 1
    assert narrow.precision > 0.95 and narrow.recall < 0.3
    assert wide.precision < 0.4 and wide.recall > 0.6
    assert precision_recall(real, real) == (1.0, 1.0)


def test_mean_pairwise_distance_of_triangle_and_of_normals(blocks):
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert mean_pairwise_distance(triangle) == pytest.approx(4.0, rel=1e-6)
    # Difference of two normals in d dimensions: sqrt(2) chi_d, of mean 2 Gamma((d + 1) / 2) / Gamma(d / 2).
    expected = 2 * math.exp(math.lgamma(32.5) - math.lgamma(32.0))
    assert mean_pairwise_distance(normal(1000, 64, 1)) == pytest.approx(expected, rel=5e-3)
    assert math.isnan(mean_pairwise_distance(triangle[:1]))


def test_diversity_is_taken_within_classes():
    features, labels = torch.tensor([[0.0], [2.0], [10.0], [15.0]]), torch.tensor([0, 0, 1, 1])
    assert class_diversity(features, labels, classes=2) == pytest.approx([2.0, 5.0])


def test_nearest_finds_copies_exactly(blocks):
    others = torch.rand(200, 784, generator=torch.Generator().manual_seed(0))
    points = torch.cat([others[[17, 3]], others[[5]] + 0.1])
    distance, index = nearest_neighbour(points, others)
    assert index.tolist() == [17, 3, 5]
    assert distance[:2].tolist() == [0.0, 0.0]  # from differences, so no rounding is left
    assert distance[2].item() == pytest.approx(2.8, rel=1e-4)  # 0.1 sqrt(784)


def test_memorisation_of_copies_and_of_fresh_images():
    generator = torch.Generator().manual_seed(0)
    training, test, fresh = torch.randint(0, 256, (3, 300, 28, 28), dtype=torch.uint8, generator=generator)
    real = quantiles(nearest_training_distance(test, training))
    alike = memorisation(nearest_training_distance(fresh, training), *real)
    assert alike.ratio == pytest.approx(1, abs=0.01) and alike.share_below_first_percentile < 0.05
    copied = memorisation(nearest_training_distance(training[:50], training), *real)
    assert copied.ratio == 0 and copied.share_below_first_percentile == 1
