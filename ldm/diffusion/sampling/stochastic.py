"""Samplers that add noise differently: DDPM's other variances, latent consistency, single-step DPM-Solver++ SDE."""

import math

from ldm.arrays import Tensor, cast_like, library
from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, Point, Points, add_noise, ancestral_split, euler, euler_to


def ddpm(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make an `euler` step, with the variance that the network learned if it did (Nichol & Dhariwal 2021, eq. 15).

    log variance = share log large + (1 - share) log small, both of the step between the two noise levels visited: the
    small one is `euler`'s, the large one `ddpm_large`'s, (1 + 1 / sigma_next^2) / (1 + 1 / sigma^2) times larger.
    """
    now = points[-1]
    if now.variance_share is None or eta == 0 or sigma_next == 0:
        return euler(denoise, points, sigma_next, eta, noise)
    assert noise is not None  # `sample` checks it
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    log_ratio = math.log((1 + sigma_next**-2) / (1 + now.sigma**-2)) / 2  # of the large deviation to the small one
    deviation = up * library(now.x).exp(log_ratio * now.variance_share)
    return euler_to(now, down) + deviation * cast_like(noise(), now.x)


def ddpm_large(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make an `euler` step with fresh noise of variance beta_t = 1 - ab_t / ab_next (Ho et al. 2020, section 3.2).

    Its deviation is the sigma-hat of Song et al. 2021, section 5, times eta; a step to sigma 0 adds none, as in DDPM.
    For eta = 1 x gets noisier than sigma_next, in variance by (sigma^2 - sigma_next^2)^2 / (sigma^2 (1 + sigma^2)).
    """
    now = points[-1]
    down, _ = ancestral_split(now.sigma, sigma_next, eta)
    beta = (now.sigma - sigma_next) * (now.sigma + sigma_next) / (1 + now.sigma * now.sigma)
    up = eta * math.sqrt(beta * (1 + sigma_next * sigma_next)) if sigma_next > 0 else 0.0
    return add_noise(euler_to(now, down), up, noise)


def lcm(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of multistep consistency sampling (Luo et al. 2023, algorithm 3): x0 + sigma_next fresh noise.

    For models distilled to predict x0 in one step. eta < 1 keeps a part of the predicted noise; eta = 0 is Euler.
    """
    return add_noise(euler_to(points[-1], sigma_next * math.sqrt(1 - eta * eta)), eta * sigma_next, noise)


def dpmpp_sde(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a single-step SDE-DPM-Solver++ step (Lu et al. 2022, "DPM-Solver++"), with a second evaluation.

    An ancestral step leads to the midpoint of log sigma; then both halves are made with the x0 predicted there, and the
    first one with the noise that x0 was predicted from. Noise is sampled twice. eta = 0 is the paper's algorithm 1, 2S.
    """
    now = points[-1]
    if sigma_next == 0:
        return euler_to(now, 0.0)
    middle = math.sqrt(now.sigma * sigma_next)
    down, up = ancestral_split(now.sigma, middle, eta)
    x = add_noise(euler_to(now, down), up, noise)
    x0 = denoise(x, middle).x0
    x = x + (1 - down / now.sigma) * (x0 - now.x0)
    down, up = ancestral_split(middle, sigma_next, eta)
    return add_noise(euler_to(Point(middle, x, x0), down), up, noise)
