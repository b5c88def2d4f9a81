"""Samplers that spend noise in ways of their own: DDPM's other variances, latent consistency, DPM-Solver++ SDE."""

import math

from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, Point, Points, add_noise, ancestral_split, euler, euler_to


def ddpm(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """As `euler`; with the variance that the network gives where it learned one (Nichol & Dhariwal 2021, eq. 15).

    log variance = share log large + (1 - share) log small, both of the step between the two levels visited: the small
    one is `euler`'s, the large one `ddpm_large`'s, which is (1 + 1 / sigma_next^2) / (1 + 1 / sigma^2) times that.
    """
    now = points[-1]
    if now.variance_share is None or eta == 0 or sigma_next == 0:
        return euler(denoise, points, sigma_next, eta, noise)
    assert noise is not None  # `sample` checks it
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    spread = math.log((1 + sigma_next**-2) / (1 + now.sigma**-2)) / 2  # log of large over small deviation
    return euler_to(now, down) + up * (spread * now.variance_share).exp() * noise().to(now.x)


def ddpm_large(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """As `euler`, with the fresh noise's variance beta_t = 1 - ab_t / ab_next instead (Ho et al. 2020, section 3.2).

    It is the sigma-hat of Song et al. 2021, section 5, times eta; no noise in a step to sigma 0, as in DDPM.
    It leaves x noisier than its level, by (sigma^2 - sigma_next^2)^2 / (sigma^2 (1 + sigma^2)) a step for eta = 1.
    """
    now = points[-1]
    down, _ = ancestral_split(now.sigma, sigma_next, eta)
    beta = (now.sigma - sigma_next) * (now.sigma + sigma_next) / (1 + now.sigma * now.sigma)
    up = eta * math.sqrt(beta * (1 + sigma_next * sigma_next)) if sigma_next > 0 else 0.0
    return add_noise(euler_to(now, down), up, noise)


def lcm(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): x0, noised anew to the next level.

    For models distilled to give x0 in one step. eta < 1 keeps some of the old noise instead; eta = 0 is Euler.
    """
    return add_noise(euler_to(points[-1], sigma_next * math.sqrt(1 - eta * eta)), eta * sigma_next, noise)


def dpmpp_sde(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """SDE-DPM-Solver++ in single steps (Lu et al. 2022, "DPM-Solver++"), evaluated again in the middle of log sigma.

    An ancestral step to the middle; then both halves with the x0 predicted there, the first with its noise as drawn, so
    that x0 and the noise that it was predicted from stay together. Draws twice. eta = 0: algorithm 1 there, (2S).
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
