"""Samplers that take one network evaluation a step and remember nothing: DDIM and DDPM, in sigma coordinates.

With x = x0 + sigma noise, DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models") is Euler's method on the
probability-flow ODE (its eq. 14), DDIM with eta the ancestral form of that, and DDPM that with eta = 1.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise

Noise = Callable[[], Tensor]


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the level to step down to, and the fresh noise that leads from there to sigma_next.

    sigma_up is the sigma of Song et al. 2021, eq. 16, over sqrt(ab_next); sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    if eta == 0:
        return sigma_next, 0.0
    ratio = sigma_next / sigma
    kept = (1 - ratio) * (1 + ratio)  # 1 - ratio^2, without cancellation
    return sigma_next * math.sqrt(1 - eta * eta * kept), eta * sigma_next * math.sqrt(kept)


def ddim(
    denoise: BoundDenoise, x: Tensor, sigma: float, sigma_next: float, eta: float, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """One step from sigma to sigma_next: Euler for eta = 0, DDPM with the small variance for eta = 1.

    The small variance is that of the true posterior between the two levels visited, however far apart (Ho et al. 2020,
    eq. 7, with beta_t = 1 - ab_t / ab_next). Returns (x at sigma_next, x0), both (b, ...).
    """
    x0 = denoise(x, sigma).x0
    sigma_down, sigma_up = ancestral_split(sigma, sigma_next, eta)
    x = x0 + (sigma_down / sigma) * (x - x0)  # not x + d (sigma_down - sigma): that cancels at sigma = 4096
    if sigma_up > 0:
        x = x + sigma_up * noise().to(x)
    return x, x0


def ddpm_large(
    denoise: BoundDenoise, x: Tensor, sigma: float, sigma_next: float, eta: float, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """As `ddim`, with the fresh noise's variance beta_t = 1 - ab_t / ab_next instead (Ho et al. 2020, section 3.2).

    It is the sigma-hat of Song et al. 2021, section 5, times eta; no noise in a step to sigma 0, as in DDPM.
    It leaves x noisier than its level, by (sigma^2 - sigma_next^2)^2 / (sigma^2 (1 + sigma^2)) a step for eta = 1.
    """
    x0 = denoise(x, sigma).x0
    sigma_down, _ = ancestral_split(sigma, sigma_next, eta)
    x = x0 + (sigma_down / sigma) * (x - x0)
    if eta > 0 and sigma_next > 0:
        beta = (sigma - sigma_next) * (sigma + sigma_next) / (1 + sigma * sigma)
        x = x + eta * math.sqrt(beta * (1 + sigma_next * sigma_next)) * noise().to(x)
    return x, x0
