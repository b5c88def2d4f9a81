"""The forward chain's step and its posterior, against the chain itself, Bayes' rule and the sampler's step."""

import math

import pytest
import torch

from ldm.diffusion.bound import levels, q_posterior
from ldm.diffusion.denoiser import Prediction, from_vp, to_vp
from ldm.diffusion.sampling.first_order import Point, euler
from ldm.diffusion.schedule import make_schedule, q_sample
from ldm.optional.ddgan import q_pair

VP = make_schedule("vp", 4)
T = torch.arange(4)


def rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed)).double()


def test_levels_begin_at_the_clean_image():
    now, before = levels(T, VP)
    assert torch.equal(now, VP.alphas_cumprod) and before[0] == 1 and torch.equal(before[1:], now[:-1])


def test_a_pair_is_of_one_walk():
    """x_t has the level's own mean and variance, and its earlier half those of the level before."""
    x0, noise, fresh = (rows(1, 2, 2, seed=seed) for seed in range(3))
    zero = torch.zeros_like(x0)
    before, now = q_pair(x0, T, zero, zero, VP)
    torch.testing.assert_close(now, q_sample(x0, T, zero, VP))
    assert torch.equal(before[0], x0[0])
    torch.testing.assert_close(before[1:], q_sample(x0[1:], T[:-1], zero[1:], VP))
    # both noises together have variance 1 - ab_t
    of_noise, of_fresh = (q_pair(zero, T, *pair, VP)[1] for pair in ((noise, zero), (zero, fresh)))
    variance = (of_noise / noise).square() + (of_fresh / fresh).square()
    torch.testing.assert_close(variance, (1 - VP.alphas_cumprod).reshape(4, 1, 1, 1).expand_as(variance))


def test_posterior_by_bayes_rule():
    """In one dimension: prior N(sqrt(ab_before) x0, 1 - ab_before), likelihood N(x_t; sqrt(1 - beta) x, beta)."""
    for t in (1, 2, 3):
        now, before = (float(ab) for ab in (VP.alphas_cumprod[t], VP.alphas_cumprod[t - 1]))
        beta, x0, x = 1 - now / before, 0.7, -1.3
        precision = 1 / (1 - before) + (1 - beta) / beta
        mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * x / beta) / precision
        found = q_posterior(*torch.tensor([[[x0]], [[x]]], dtype=torch.float64), torch.tensor([t]), VP)
        assert [float(v) for v in found] == pytest.approx([mean, 1 / precision], rel=1e-12)


def test_posterior_weights_x0_by_the_root_of_alpha_bar():
    """systems.md's E1: with ab_{t-1} instead of its root the weights no longer carry a walk's mean along."""
    x0 = rows(3, seed=4)
    x = q_sample(x0, T, torch.zeros_like(x0), VP)
    mean, _ = q_posterior(x0, x, T, VP)
    torch.testing.assert_close(mean, q_pair(x0, T, torch.zeros_like(x0), torch.zeros_like(x0), VP)[0])


def test_the_samplers_step_samples_the_posterior():
    """Euler-ancestral in the frame of sigma, mean and spread, at every level of the schedule."""
    x0, x = rows(1, 2, 2, seed=5), rows(1, 2, 2, seed=6)
    mean, variance = q_posterior(x0, x, T, VP)
    assert torch.equal(mean[0], x0[0]) and variance[0] == 0
    for t in T.tolist():
        sigma, following = float(VP.sigmas[t]), float(VP.sigmas[t - 1]) if t else 0.0
        for noise in (0.0, 1.0):
            now = Point(sigma, from_vp(x[t], sigma), x0[t])
            step = euler(lambda x, sigma: Prediction(x), [now], following, 1.0, lambda n=noise: torch.full((1,), n))
            expected = mean[t] + noise * variance[t].sqrt()
            torch.testing.assert_close(to_vp(step, following), expected, rtol=1e-9, atol=1e-12)
