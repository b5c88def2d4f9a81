"""Euler's step, which every other sampler here corrects, and fresh noise: together DDIM and DDPM.

With x = x0 + sigma noise, the probability flow is dx/dsigma = eps = (x - x0(x, sigma)) / sigma (Karras et al. 2022,
eq. 1 and 3). Euler's method on it is DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 14); with fresh
noise it is DDIM with eta, and DDPM where eta = 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise

Noise = Callable[[], Tensor]


class Point(NamedTuple):
    """A visited level: x (b, ...) there, the x0 (b, ...) predicted from it, and `Prediction.variance_share`."""

    sigma: float
    x: Tensor
    x0: Tensor
    variance_share: Tensor | None = None

    @property
    def eps(self) -> Tensor:
        """The noise predicted, which is the flow's slope dx/dsigma: (b, ...)."""
        return (self.x - self.x0) / self.sigma


Points = Sequence[Point]  # the last ones visited; now is [-1]


def euler_to(now: Point, sigma: float) -> Tensor:
    """Along the flow's tangent at `now` to another level: (b, ...).

    Not x + (sigma - now.sigma) eps, which cancels where sigma is far below (4096 and 2, say).
    """
    return now.x0 + (sigma / now.sigma) * (now.x - now.x0)


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the level to step down to, and the fresh noise that leads from there to sigma_next.

    sigma_up is the sigma of Song et al. 2021, eq. 16, over sqrt(ab_next); sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    ratio = sigma_next / sigma
    down = sigma_next * math.hypot(math.sqrt(1 - eta * eta), eta * ratio)
    return down, eta * sigma_next * math.sqrt((1 - ratio) * (1 + ratio))


def add_noise(x: Tensor, up: float, noise: Noise | None) -> Tensor:
    """x + up times fresh noise: (b, ...). Draws once, and not at all for up = 0."""
    if up == 0:
        return x
    assert noise is not None  # `sample` checks it
    return x + up * noise().to(x)


def euler(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise | None) -> Tensor:
    """Euler and DDIM for eta = 0, Euler-ancestral and DDPM with the small variance for eta = 1.

    The small variance is that of the true posterior between the two levels visited, however far apart (Ho et al. 2020,
    eq. 7, with beta_t = 1 - ab_t / ab_next).
    """
    now = points[-1]
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    return add_noise(euler_to(now, down), up, noise)
