"""The variational bound on the bits that an image costs (Ho et al. 2020, eq. 5), for 8-bit pixels in [-1, 1].

    L = KL(q(x_T | x0) | N(0, I)) + sum_t KL(q(x_{t-1} | x_t, x0) | p(x_{t-1} | x_t)) - log p(x0 | x_first level)
        `prior_bits`                `step_bits`, for t from 1 on                        `step_bits`, for t = 0

All in bits per dimension. p(x_{t-1} | x_t) is the posterior with the predicted x0 in place of x0, and a variance from
the small to the large one (Nichol & Dhariwal 2021, eq. 15).
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.posterior import levels, q_posterior
from ldm.diffusion.schedule import Schedule

HALF_BIN = 1 / 255  # half the distance of two of 256 values in [-1, 1]
SMALLEST = 1e-12  # probability of a bin: what is less is no number in float32, nor has it a gradient


def log_variances(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Logarithms of the small and the large variance of the step from t: log posterior variance, log beta_t.

    float64 (b,) on the CPU. At t = 0, where the posterior has no variance, the small one is that of t = 1, as in the
    code of both papers: the decoder needs one. Raises ValueError for a schedule of one level.
    """
    if schedule.T < 2:
        raise ValueError(f"the variational bound needs a schedule of at least 2 levels, got T={schedule.T}")
    now, before = levels(t.clamp(min=1), schedule)
    small = (1 - now / before) * (1 - before) / (1 - now)
    now, before = levels(t, schedule)
    return small.log(), (1 - now / before).log()


def step_bits(x0: Tensor, x: Tensor, t: Tensor, predicted: Tensor, share: Tensor | float, schedule: Schedule) -> Tensor:
    """The bound's term of level t of each image: (b,) bits per dimension.

    x0: (b, ...), the image; x: at level t, (b,), in the variance-preserving frame; predicted: x0 as the network has
    it; share: of the variance, 0 the small, 1 the large (Ho et al.'s two), or (b, ...) as learned.
    """
    shape = [-1, *[1] * (x.ndim - 1)]
    small, large = (log.reshape(shape).to(x) for log in log_variances(t, schedule))  # (b, 1, ...)
    log_variance = share * large + (1 - share) * small
    true, _ = q_posterior(x0, x, t, schedule)
    mean, _ = q_posterior(predicted, x, t, schedule)
    divergence = normal_kl(true, small, mean, log_variance)
    decoder = -log_bin(x0, mean, log_variance)
    first = (t == 0).reshape(shape).to(x.device)
    return torch.where(first, decoder, divergence).flatten(1).mean(1) / math.log(2)


def prior_bits(x0: Tensor, schedule: Schedule) -> Tensor:
    """KL(q(x_T | x0) | N(0, I)) of each image: (b, ...) -> (b,) bits per dimension."""
    ab = float(schedule.alphas_cumprod[-1])
    mean, log_variance = math.sqrt(ab) * x0, torch.full_like(x0, math.log1p(-ab))
    zero = torch.zeros_like(x0)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, element by element."""
    difference = logvar1 - logvar2
    return ((mean1 - mean2).square() * (-logvar2).exp() + difference.expm1() - difference) / 2


def log_bin(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of what N(mean, variance) gives each number's bin of 256, the outer ones open (Ho et al. 2020, eq. 13)."""
    precision = (-log_variance / 2).exp()
    above, below = ((x - mean + side * HALF_BIN) * precision for side in (1, -1))
    # Where both are far up, the difference of two numbers near 1 would be lost: mirrored, they are near 0.
    mirrored = below > 0
    top, bottom = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    probability = torch.where(x < -1 + HALF_BIN, _normal_below(above), _normal_below(top) - _normal_below(bottom))
    probability = torch.where(x > 1 - HALF_BIN, _normal_below(-below), probability)
    return probability.clamp(min=SMALLEST).log()


def _normal_below(x: Tensor) -> Tensor:
    """The share of N(0, 1) below x; torch's own `ndtr` has no tail in float32."""
    return torch.erfc(x * -(0.5**0.5)) / 2
