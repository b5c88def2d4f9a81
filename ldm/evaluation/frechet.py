"""Fréchet distance between two sets of features, each taken as a Gaussian."""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the unbiased covariance (d, d), in float64, of features (n, d).

    Raises:
        ValueError: fewer than two rows, which have no covariance.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance: give at least 2")
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def sqrt_psd(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a symmetric positive semi-definite matrix (d, d), by its eigenvalues.

    Unlike scipy.linalg.sqrtm it stays real and accurate for a singular covariance (fewer images than features).
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding makes some zeros negative


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians, in squared units of the features.

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^1/2 cov2 cov1^1/2)^1/2), in float64 (Dowson & Landau 1982; Heusel et
    al. 2017, eq. 6).
    """
    mean1, cov1, mean2, cov2 = mean1.double(), cov1.double(), mean2.double(), cov2.double()
    root = sqrt_psd(cov1)
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)
