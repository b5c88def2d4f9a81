"""Euler's step, which is DDIM, and with fresh noise DDPM. All other samplers refine it.

Lowering the noise level of x = x0 + sigma noise follows the probability flow ODE (Karras et al. 2022, eq. 1 and 3)

    dx/dsigma = eps = (x - x0) / sigma,        x0 = denoise(x, sigma).

Euler's method on it is DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 14). A step that goes further
down and then adds fresh noise is DDIM with eta > 0, and for eta = 1 DDPM.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ldm.arrays import Tensor, cast_like
from ldm.diffusion.denoiser import BoundDenoise

Noise = Callable[[], Tensor] | None  # () -> unit normal noise, (b, ...)


class Point(NamedTuple):
    """A visited noise level: x (b, ...) at sigma, and the `Prediction` from it: x0 (b, ...) and variance_share."""

    sigma: float
    x: Tensor
    x0: Tensor
    variance_share: Tensor | None = None

    @property
    def eps(self) -> Tensor:
        """The predicted noise, which is the slope dx/dsigma of the flow: (b, ...)."""
        return (self.x - self.x0) / self.sigma


Points = Sequence[Point]  # the last few, in the order visited; [-1] is the current one


def euler_to(now: Point, sigma: float) -> Tensor:
    """Make Euler's step to sigma: x + (sigma - now.sigma) eps, (b, ...)."""
    # As x0 + sigma eps, which does not cancel where sigma is far below now.sigma (4096 to 2, for example).
    return now.x0 + (sigma / now.sigma) * (now.x - now.x0)


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return (sigma_down, sigma_up): step down to sigma_down, then add noise of deviation sigma_up to reach sigma_next.

    sigma_down^2 + sigma_up^2 = sigma_next^2, and sigma_up is Song et al. 2021, eq. 16, divided by sqrt(ab_next).
    """
    ratio = sigma_next / sigma
    down = sigma_next * math.hypot(math.sqrt(1 - eta * eta), eta * ratio)
    return down, eta * sigma_next * math.sqrt((1 - ratio) * (1 + ratio))


def add_noise(x: Tensor, up: float, noise: Noise) -> Tensor:
    """Return x + up noise; for up = 0 the source of noise is not called."""
    if up == 0:
        return x
    assert noise is not None  # `sample` checks it
    return x + up * cast_like(noise(), x)


def euler(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make one step of Euler and DDIM (eta = 0), or of Euler-ancestral and DDPM with the small variance (eta = 1).

    The small variance is that of the posterior q(x_next | x, x0) of the two noise levels visited, however far apart (Ho
    et al. 2020, eq. 7, with beta_t = 1 - ab_t / ab_next).
    """
    now = points[-1]
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    return add_noise(euler_to(now, down), up, noise)
