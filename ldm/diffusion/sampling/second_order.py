"""Second-order samplers, which evaluate the network twice a step: Heun's method and the midpoint method."""

import math

from ldm.arrays import Tensor
from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, Point, Points, add_noise, ancestral_split, euler_to


def two_slopes(denoise: BoundDenoise, now: Point, sigma: float, middle: float, share: float) -> Tensor:
    """Step to sigma with the slope (1 - share) eps + share eps(middle), evaluated after an Euler step to `middle`.

    It is Euler's step where a second slope would do harm: for middle = 0, where there is none, and for a long step in
    almost pure noise (a cosine schedule may go from sigma 20000 to 10). There the flow is straight to within
    var(x0) / (2 middle), and weighing eps(middle) over the whole step multiplies that error by share sigma / middle.
    """
    if middle == 0 or now.sigma > 10 * max(middle, 1):
        return euler_to(now, sigma)
    change = now.x0 - denoise(euler_to(now, middle), middle).x0  # middle (eps(middle) - eps), without cancellation
    return euler_to(now, sigma) + share * (sigma - now.sigma) / middle * change


def heun(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a Heun step: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1)."""
    return two_slopes(denoise, points[-1], sigma_next, sigma_next, 0.5)


def dpm2(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a DPM-Solver-2 step: the slope at the midpoint of log sigma (Lu et al. 2022, algorithm 1, r = 1/2)."""
    now = points[-1]
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    return add_noise(two_slopes(denoise, now, down, math.sqrt(now.sigma * down), 1.0), up, noise)
