"""One step of the forward chain, and its posterior: where the chain was before, given where it is and where it began.

In the variance-preserving frame, with ab_{-1} = 1: x_{-1} is the clean image x0. Everything per image, so that the
images of a batch may be at different levels; samplers, whose batches are at one, do the same by `first_order.euler`.
"""

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, signal_and_noise


def levels(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(ab_t, ab_{t-1}), float64 (b,) each on the CPU, of timesteps t (b,) in 0..T-1; ab_{-1} = 1."""
    ab = torch.cat([schedule.alphas_cumprod.new_ones(1), schedule.alphas_cumprod])
    return ab[t.cpu() + 1], ab[t.cpu()]


def q_pair(x0: Tensor, t: Tensor, noise: Tensor, fresh: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(x_{t-1}, x_t) of one walk: x_{t-1} = sqrt(ab) x0 + sqrt(1 - ab) noise at t-1, x_t one step from it.

    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) fresh (Ho et al. 2020, eq. 2). x0, noise, fresh: (b, ...); t: (b,).
    """
    now, before = levels(t, schedule)
    signal, spread = signal_and_noise(before, x0)
    x_before = signal * x0 + spread * noise
    signal, spread = signal_and_noise(now / before, x0)  # 1 - beta_t
    return x_before, signal * x_before + spread * fresh


def q_posterior(x0: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Mean (b, ...) and variance (b, 1, ...) of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7).

    mean = sqrt(ab_{t-1}) beta_t / (1 - ab_t) x0 + sqrt(1 - beta_t) (1 - ab_{t-1}) / (1 - ab_t) x_t,
    variance = beta_t (1 - ab_{t-1}) / (1 - ab_t). At t = 0 that is x0, without variance.
    """
    now, before = (ab.reshape(-1, *[1] * (x.ndim - 1)) for ab in levels(t, schedule))  # (b, 1, ...)
    beta = 1 - now / before
    of_x0, of_x = before.sqrt() * beta / (1 - now), (1 - beta).sqrt() * (1 - before) / (1 - now)
    return of_x0.to(x) * x0 + of_x.to(x) * x, (beta * (1 - before) / (1 - now)).to(x)
