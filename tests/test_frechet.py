"""Fréchet distance against closed forms."""

import pytest
import torch
from conftest import refused

from ldm.evaluation.frechet import frechet_distance, moments, sqrt_psd


def covariance(d: int, seed: int) -> torch.Tensor:
    root = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / d


def test_distance_of_commuting_gaussians_is_that_of_their_deviations():
    # Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2.
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    expected = 1 + 4 + 1 + 0 + 6.25
    assert frechet_distance(m1, s1.square().diag(), m2, s2.square().diag()) == pytest.approx(expected, rel=1e-12)


def test_distance_of_2_by_2_covariances_is_the_closed_form():
    # tr (A^1/2 B A^1/2)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2.
    a, b, zero = covariance(2, 0), covariance(2, 1), torch.zeros(2)
    cross = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_scaled_copy_of_correlated_gaussians():
    # B = c^2 A: tr(A) (1 - c)^2.
    a, mean = covariance(64, 2), torch.randn(64, generator=torch.Generator().manual_seed(3))
    assert frechet_distance(mean, a, mean, 1.1**2 * a) == pytest.approx(0.01 * a.trace().item(), rel=1e-9)
    assert frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-9)


def test_distance_is_symmetric_and_survives_singular_covariances():
    a = covariance(32, 4)
    low = torch.zeros(32, 32, dtype=torch.float64)
    low[:5, :5] = covariance(5, 5)  # 27 dead units
    zero = torch.zeros(32)
    forth, back = frechet_distance(zero, a, zero, low), frechet_distance(zero, low, zero, a)
    assert forth == pytest.approx(back, rel=1e-6) and forth > 0  # the root of a zero eigenvalue keeps half the digits
    assert frechet_distance(zero, low, zero, low) == pytest.approx(0, abs=1e-6)


def test_square_root_squares_to_the_matrix():
    a = covariance(48, 6)
    torch.testing.assert_close(sqrt_psd(a) @ sqrt_psd(a), a, rtol=1e-10, atol=1e-10)


def test_moments_are_numpys():
    features = torch.randn(100, 7, generator=torch.Generator().manual_seed(7))
    mean, cov = moments(features)
    centred = features.double() - features.double().mean(0)
    torch.testing.assert_close(cov, centred.T @ centred / 99, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, features.double().mean(0))
    assert cov.dtype == torch.float64
    refused("1 images", moments, features[:1])
