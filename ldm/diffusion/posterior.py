"""The posterior q(x_{t-1} | x_t, x0) of one step of the forward process.

In DDPM's variance-preserving scaling, with ab_{-1} = 1: x_{-1} is the clean image x0. Each image has its own timestep;
samplers, whose batches share one, do the same by `first_order.euler`.
"""

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule


def levels(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return (ab_t, ab_{t-1}) of timesteps t (b,) in 0..T-1, float64 (b,) each on the CPU; ab_{-1} = 1."""
    ab = torch.cat([schedule.alphas_cumprod.new_ones(1), schedule.alphas_cumprod])
    return ab[t.cpu() + 1], ab[t.cpu()]


def q_posterior(x0: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return mean (b, ...) and variance (b, 1, ...) of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7).

    mean = sqrt(ab_{t-1}) beta_t / (1 - ab_t) x0 + sqrt(1 - beta_t) (1 - ab_{t-1}) / (1 - ab_t) x_t,
    variance = beta_t (1 - ab_{t-1}) / (1 - ab_t). At t = 0 the mean is x0 and the variance 0.
    """
    now, before = (ab.reshape(-1, *[1] * (x.ndim - 1)) for ab in levels(t, schedule))  # (b, 1, ...)
    beta = 1 - now / before
    x0_coef, x_coef = before.sqrt() * beta / (1 - now), (1 - beta).sqrt() * (1 - before) / (1 - now)
    return x0_coef.to(x) * x0 + x_coef.to(x) * x, (beta * (1 - before) / (1 - now)).to(x)
