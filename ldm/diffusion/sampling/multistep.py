"""Multistep samplers: one network evaluation a step, and Euler's step corrected by previous predictions.

The flow has two exact forms (Zhang & Chen 2023; Lu et al. 2022, "DPM-Solver++"; here at signal level 1):

    x_next = x + integral of eps dsigma                                        plms, lms, deis
    x_next = (sigma_next / sigma) x + sigma_next integral of x0 d(1 / sigma)   dpmpp_2m, dpmpp_3m, unipc

Each sampler fits a polynomial to the last predictions f_j, of eps or x0, and integrates it. A constant gives Euler's
step, so the rest is a correction: the sum of w_j (f_j - f_now). The polynomial's variable u is 0 now and 1 at the next
noise level; the w_j follow from the f_j's values of u, `nodes`, and the integrals of u, u^2, ..., `moments`.
"""

import math
from collections.abc import Sequence

import numpy as np

from ldm.arrays import Tensor
from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, Point, Points, add_noise, ancestral_split, euler_to
from ldm.diffusion.sampling.second_order import heun


def correction(now: Tensor, others: Sequence[Tensor], nodes: Sequence[float], moments: Sequence[float]) -> Tensor | int:
    """Return sum_j w_j (others[j] - now), where sum_j w_j nodes[j]^k = moments[k - 1] for k = 1..n; 0 if n = 0.

    now (b, ...) is the current prediction, at u = 0; the n others are at u = nodes[j].
    """
    if not others:
        return 0
    powers = [[node**k for node in nodes] for k in range(1, len(nodes) + 1)]
    weights = np.linalg.solve(powers, moments).tolist()
    return sum(w * (other - now) for w, other in zip(weights, others, strict=True))


def uniform_moments(n: int) -> list[float]:
    """Return the integrals of u^k du over [0, 1] for k = 1..n."""
    return [1 / (k + 1) for k in range(1, n + 1)]


def exponential_moments(h: float, n: int) -> list[float]:
    """Return the integrals of u^k h exp(h (u - 1)) du over [0, 1] for k = 1..n, by parts from k = 0; h is not 0."""
    moments = [-math.expm1(-h)]
    for k in range(1, n + 1):
        moments.append(1 - k * moments[-1] / h)
    return moments[1:]


def plms(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a PLMS step: Adams-Bashforth of order 4 with the weights of evenly spaced levels, starting with Heun's step.

    Liu et al. 2022 ("Pseudo Numerical Methods for Diffusion Models on Manifolds"), started as CompVis does. The noise
    levels are not evenly spaced in sigma, so its order is 2, as the paper says.
    """
    if len(points) == 1:
        return heun(denoise, points, sigma_next, eta, noise)
    now, *past = reversed(points[-4:])
    nodes = [-1, -2, -3][: len(past)]
    change = correction(now.eps, [point.eps for point in past], nodes, uniform_moments(len(past)))
    return euler_to(now, sigma_next) + (sigma_next - now.sigma) * change


def lms(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of Adams-Bashforth of order 4 for the actual sigmas: rho-AB-DEIS of Zhang & Chen 2023."""
    now, *past = reversed(points[-4:])
    step = sigma_next - now.sigma
    nodes = [(point.sigma - now.sigma) / step for point in past]
    change = correction(now.eps, [point.eps for point in past], nodes, uniform_moments(len(past)))
    return euler_to(now, sigma_next) + step * change


def deis(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of AB-DEIS of order 3, with a polynomial in log sigma (Zhang & Chen 2023).

    With u = log(now.sigma / sigma) / h, the integral of u^k dsigma is sigma_next exponential_moments(-h).
    """
    now, *past = reversed(points[-3:])
    if sigma_next == 0:
        return euler_to(now, 0.0)
    h = math.log(now.sigma / sigma_next)
    nodes = [math.log(now.sigma / point.sigma) / h for point in past]
    change = correction(now.eps, [point.eps for point in past], nodes, exponential_moments(-h, len(past)))
    return euler_to(now, sigma_next) + sigma_next * change


def x0_correction(now: Point, others: Sequence[Point], sigma_next: float, sigma_down: float) -> Tensor | int:
    """Integrate the change of x0 since `now` over the step, in log(1 / sigma), DPM-Solver's lambda; 0 without others.

    The polynomial passes through `now` and the others. With one other its slope has half the weight of its constant,
    as in DPM-Solver++(2M) and in UniPC with B(h) = exp(h) - 1; with more the integral is exact. The step of the SDE
    reduces x by sigma_down / sigma while lambda reaches that of sigma_next; without noise they are equal.
    """
    if sigma_next == 0:
        return 0
    h, decay = math.log(now.sigma / sigma_next), math.log(now.sigma / sigma_down)
    nodes = [math.log(now.sigma / point.sigma) / h for point in others]
    moments = [-math.expm1(-decay) / 2] if len(others) == 1 else exponential_moments(decay, len(others))
    return correction(now.x0, [point.x0 for point in others], nodes, moments)


def _dpmpp(points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    *others, now = points
    down, up = ancestral_split(now.sigma, sigma_next, eta)
    return add_noise(euler_to(now, down) + x0_correction(now, others, sigma_next, down), up, noise)


def dpmpp_2m(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), or with eta = 1 of their SDE-DPM-Solver++(2M)."""
    return _dpmpp(points[-2:], sigma_next, eta, noise)


def dpmpp_3m(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of order 3: `dpmpp_2m` with a parabola, integrated exactly.

    Other implementations give u^2 half its weight (diffusers, with noise, yet another one), which leaves order 2.
    """
    return _dpmpp(points[-3:], sigma_next, eta, noise)


def unipc(denoise: BoundDenoise, points: Points, sigma_next: float, eta: float, noise: Noise) -> Tensor:
    """Make a step of UniPC of order 2 (Zhao et al. 2023): correct the previous step, then predict as `dpmpp_2m` does.

    Predictor and corrector differ only in the points that their polynomials pass through, so the corrected x is x plus
    the difference of the two integrals. As in the paper, x0 is not predicted again at the corrected x.
    """
    now = points[-1]
    if len(points) > 1:
        last, before = points[-2], points[-3:-2]
        corrected = x0_correction(last, [now, *before], now.sigma, now.sigma)
        now = now._replace(x=now.x + corrected - x0_correction(last, before, now.sigma, now.sigma))
    return euler_to(now, sigma_next) + x0_correction(now, points[-2:-1], sigma_next, sigma_next)
