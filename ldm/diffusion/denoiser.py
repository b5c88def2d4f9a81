"""What a network predicts (eps, x0 or v), what it is trained towards, and how that becomes denoise(x, sigma, cond).

Samplers and guidance know x = x0 + sigma noise and a function denoise that estimates x0 from it. The network knows the
variance-preserving x_vp = x / sqrt(1 + sigma^2) and the level t. This module is the only place where the two meet.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, signal_and_noise

PREDICTIONS = ("eps", "x0", "v")

Cond = dict[str, Tensor]


class Prediction(NamedTuple):
    """A network's estimate: x0 (b, ...), and the log variance of the step where the network learned one.

    unguided: where guidance has moved x0, what it was before, under the conditioning alone: (b, ...).
    """

    x0: Tensor
    log_variance: Tensor | None = None
    unguided: Tensor | None = None


Denoise = Callable[[Tensor, float, Cond], Prediction]  # (x, sigma, cond): what a model gives
BoundDenoise = Callable[[Tensor, float], Prediction]  # (x, sigma): what guidance gives and samplers take


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless prediction is eps, x0 or v."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}")


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """x0 + sigma noise -> the network's frame, unit variance for unit data: x / sqrt(1 + sigma^2)."""
    return x * (1 / math.sqrt(1 + sigma * sigma))


def from_vp(x_vp: Tensor, sigma: float) -> Tensor:
    """The network's frame -> x0 + sigma noise. A sampler starts from from_vp(unit normal noise, sigmas[0])."""
    return x_vp * math.sqrt(1 + sigma * sigma)


def skip_and_out(prediction: str, sigma: float) -> tuple[float, float]:
    """(c_skip, c_out) such that x0 = c_skip x + c_out output, with x = x0 + sigma noise (Karras et al. 2022, eq. 7).

    eps: x0 = x - sigma eps.   x0: itself.
    v:   x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v   (Salimans & Ho 2022, section 4: x0 = a x_vp - s v).
    """
    check_prediction(prediction)
    if prediction == "eps":
        return 1.0, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    return 1 / (1 + sigma * sigma), -sigma / math.sqrt(1 + sigma * sigma)


def target(prediction: str, x0: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """What the network is trained to give for x_t = sqrt(ab) x0 + sqrt(1 - ab) noise: (b, ...).

    eps: noise (Ho et al. 2020).   x0: x0.   v: sqrt(ab) noise - sqrt(1 - ab) x0 (Salimans & Ho 2022, section 4).
    x0, noise: (b, ...); alphas_cumprod_t: (b,), the level of each picture.
    """
    check_prediction(prediction)
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    signal, spread = signal_and_noise(alphas_cumprod_t, x0)
    return signal * noise - spread * x0


def make_denoiser(
    network: Callable[[Tensor, Tensor, Cond], Tensor],
    schedule: Schedule,
    prediction: str,
    dtype: torch.dtype | None = None,
) -> Denoise:
    """Wrap network(x_vp, t, cond), which gives eps, x0 or v, as denoise(x, sigma, cond) -> Prediction.

    x is (b, ...) with x = x0 + sigma noise, float32 or wider; x0 comes back in its dtype, whatever the network's.
    t reaches the network as (b,) in x's dtype, in 0..T-1, fractional between the trained levels.
    dtype: of the network's input x_vp; None leaves it as x is.

    Raises ValueError for an unknown prediction.
    """
    check_prediction(prediction)

    def denoise(x: Tensor, sigma: float, cond: Cond) -> Prediction:
        sigma = float(sigma)
        c_skip, c_out = skip_and_out(prediction, sigma)
        t = torch.full((len(x),), schedule.t_at(sigma), dtype=x.dtype, device=x.device)
        output = network(to_vp(x, sigma).to(x.dtype if dtype is None else dtype), t, cond).to(x.dtype)
        return Prediction(output if prediction == "x0" else c_skip * x + c_out * output)

    return denoise
