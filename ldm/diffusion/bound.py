"""The variational bound on an image's negative log-likelihood (Ho et al. 2020, eq. 5), for 8-bit pixels in [-1, 1].

    L = KL(q(x_T | x0) || N(0, I)) + sum_t KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) - log p(x0 | x at t = 0)
        `prior_bits`                 `step_bits`, for t from 1 on                         `step_bits`, for t = 0

All in bits per dimension. p(x_{t-1} | x_t) is the posterior with the predicted x0 in place of x0, and a variance
between the small and the large one (Nichol & Dhariwal 2021, eq. 15).
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.loss import weighted_mean
from ldm.diffusion.schedule import Schedule

HALF_BIN = 1 / 255  # half the distance between two of 256 values in [-1, 1]
SMALLEST = 1e-12  # probability of a bin, so that its logarithm is finite and has a gradient in float32


def levels(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return (ab_t, ab_{t-1}) of timesteps t (b,) in 0..T-1, float64 (b,) each on the CPU; ab_{-1} = 1."""
    ab = torch.cat([schedule.alphas_cumprod.new_ones(1), schedule.alphas_cumprod])
    return ab[t.cpu() + 1], ab[t.cpu()]


def q_posterior(x0: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return mean (b, ...) and variance (b, 1, ...) of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7).

    x is x_t in DDPM's variance-preserving scaling. Samplers, whose batches share a timestep, have `first_order.euler`.
    mean = sqrt(ab_{t-1}) beta_t / (1 - ab_t) x0 + sqrt(1 - beta_t) (1 - ab_{t-1}) / (1 - ab_t) x_t,
    variance = beta_t (1 - ab_{t-1}) / (1 - ab_t). At t = 0 the mean is x0 and the variance 0.
    """
    now, before = (ab.reshape(-1, *[1] * (x.ndim - 1)) for ab in levels(t, schedule))  # (b, 1, ...)
    beta = 1 - now / before
    x0_coef, x_coef = before.sqrt() * beta / (1 - now), (1 - beta).sqrt() * (1 - before) / (1 - now)
    return x0_coef.to(x) * x0 + x_coef.to(x) * x, (beta * (1 - before) / (1 - now)).to(x)


def log_variances(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return the logarithms of the small and the large variance of a step: log posterior variance, log beta_t.

    At t = 0, where the posterior's variance is 0, the small one is that of t = 1, as in the code of both papers. Both
    are float64 (b,) on the CPU.
    """
    if schedule.T < 2:
        raise ValueError(f"the variational bound needs a schedule of at least 2 levels, got T={schedule.T}")
    now, before = levels(t.clamp(min=1), schedule)
    small = (1 - now / before) * (1 - before) / (1 - now)
    now, before = levels(t, schedule)
    return small.log(), (1 - now / before).log()


def step_bits(
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    predicted: Tensor,
    share: Tensor | float,
    schedule: Schedule,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the bound's term at timestep t (b,) of each image, in bits per dimension: (b,).

    Args:
        x0: The image, (b, ...).
        x: The image at timestep t, in DDPM's variance-preserving scaling.
        predicted: The network's x0.
        share: Where the log variance lies between the small (0) and the large one (1); (b, ...) if learned.
        mask: As in `weighted_mean`.
    """
    shape = [-1, *[1] * (x.ndim - 1)]
    small, large = (log.reshape(shape).to(x) for log in log_variances(t, schedule))  # (b, 1, ...)
    log_variance = share * large + (1 - share) * small
    true, _ = q_posterior(x0, x, t, schedule)
    mean, _ = q_posterior(predicted, x, t, schedule)
    divergence = normal_kl(true, small, mean, log_variance)
    decoder = -log_bin(x0, mean, log_variance)
    first = (t == 0).reshape(shape).to(x.device)
    return weighted_mean(torch.where(first, decoder, divergence), mask) / math.log(2)


def prior_bits(x0: Tensor, schedule: Schedule) -> Tensor:
    """Return KL(q(x_T | x0) || N(0, I)) of each image (b, ...), in bits per dimension: (b,)."""
    ab = float(schedule.alphas_cumprod[-1])
    mean, log_variance = math.sqrt(ab) * x0, torch.full_like(x0, math.log1p(-ab))
    zero = torch.zeros_like(x0)
    return normal_kl(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, element by element."""
    difference = logvar1 - logvar2
    return ((mean1 - mean2).square() * (-logvar2).exp() + difference.expm1() - difference) / 2


def log_bin(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of each value's bin of 256 under a normal; the outer bins are open (eq. 13)."""
    precision = (-log_variance / 2).exp()
    above, below = ((x - mean + side * HALF_BIN) * precision for side in (1, -1))
    # In the upper tail both probabilities are near 1 and their difference would be lost; mirrored, they are near 0.
    mirrored = below > 0
    top, bottom = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    probability = torch.where(x < -1 + HALF_BIN, _normal_below(above), _normal_below(top) - _normal_below(bottom))
    probability = torch.where(x > 1 - HALF_BIN, _normal_below(-below), probability)
    return probability.clamp(min=SMALLEST).log()


def _normal_below(x: Tensor) -> Tensor:
    """Return the standard normal's distribution function; torch's `ndtr` loses the tail in float32."""
    return torch.erfc(x * -(0.5**0.5)) / 2
