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
    """A network's estimate: x0 (b, ...), and the variance of the step from here where the network learned one.

    variance_share: where the log variance lies between those of the small (0) and the large (1) variance of the step,
        (b, ...); see `split_variance`. A share and not the log variance itself, which depends on where the step leads:
        only the sampler knows that, and it may take fewer steps than the network was trained on.
    unguided: where guidance has moved x0, what it was before, under the conditioning alone: (b, ...).
    """

    x0: Tensor
    variance_share: Tensor | None = None
    unguided: Tensor | None = None


Denoise = Callable[[Tensor, float, Cond], Prediction]  # (x, sigma, cond): what a model gives
BoundDenoise = Callable[[Tensor, float], Prediction]  # (x, sigma): what guidance gives and samplers take


def check_prediction(prediction: str | None) -> None:
    """Raise ValueError unless prediction is eps, x0 or v."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}")


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """x0 + sigma noise -> the network's frame, unit variance for unit data: x / sqrt(1 + sigma^2)."""
    return x * (1 / math.sqrt(1 + sigma * sigma))


def from_vp(x_vp: Tensor, sigma: float) -> Tensor:
    """The network's frame -> x0 + sigma noise. A sampler starts from from_vp(unit normal noise, sigmas[0])."""
    return x_vp * math.sqrt(1 + sigma * sigma)


def skip_and_out(prediction: str | None, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(c_skip, c_out) such that x0 = c_skip x + c_out output, with x = x0 + sigma noise (Karras et al. 2022, eq. 7).

    sigma: one level, or a tensor of them.

    eps: x0 = x - sigma eps.   x0: itself.
    v:   x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v   (Salimans & Ho 2022, section 4: x0 = a x_vp - s v).
    """
    check_prediction(prediction)
    if prediction == "eps":
        return 1.0, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    return 1 / (1 + sigma * sigma), -sigma / (1 + sigma * sigma) ** 0.5


def predicted_x0(prediction: str, output: Tensor, x_vp: Tensor, sigmas: Tensor) -> Tensor:
    """x0 of a network's output for x_vp, each image at its own level: (b, ...), where `target` goes back from.

    sigmas: float64 (b,), of the levels; finite at zero terminal SNR too, as `Schedule.sigmas` are.
    """
    sigma = sigmas.reshape(-1, *[1] * (x_vp.ndim - 1))  # (b, 1, ...)
    c_skip, c_out = skip_and_out(prediction, sigma)
    return (c_skip * (1 + sigma * sigma).sqrt()).to(x_vp) * x_vp + torch.as_tensor(c_out).to(x_vp) * output


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The output (b, 2c, ...) of a network that learned the variance -> its prediction and the variance's share.

    The second half v is in [-1, 1] or so, and the share (v + 1) / 2: log variance = share log beta_t +
    (1 - share) log posterior variance (Nichol & Dhariwal 2021, eq. 15; v as in their code). Both (b, c, ...).
    Raises ValueError unless there are 2 `channels` channels.
    """
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"a network that learns the variance gives 2 x {channels} channels, and this one gives {output.shape[1]}: "
            f"set out_channels to {2 * channels}, or learned_variance to false"
        )
    predicted, v = output.chunk(2, dim=1)
    return predicted, (v + 1) / 2


def target(prediction: str, x0: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """What the network is trained to give for x_t = sqrt(ab) x0 + sqrt(1 - ab) noise: (b, ...).

    eps: noise (Ho et al. 2020).   x0: x0.   v: sqrt(ab) noise - sqrt(1 - ab) x0 (Salimans & Ho 2022, section 4).
    x0, noise: (b, ...); alphas_cumprod_t: (b,), the level of each image.
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
    learned_variance: bool = False,
) -> Denoise:
    """Wrap network(x_vp, t, cond), which gives eps, x0 or v, as denoise(x, sigma, cond) -> Prediction.

    x is (b, ...) with x = x0 + sigma noise, float32 or wider; x0 comes back in its dtype, whatever the network's.
    t reaches the network as (b,) in x's dtype, in 0..T-1, fractional between the trained levels.
    dtype: of the network's input x_vp; None leaves it as x is.
    learned_variance: the network gives twice x's channels, see `split_variance`.

    Raises ValueError for an unknown prediction, and for channels that do not fit.
    """
    check_prediction(prediction)

    def denoise(x: Tensor, sigma: float, cond: Cond) -> Prediction:
        sigma = float(sigma)
        c_skip, c_out = skip_and_out(prediction, sigma)
        t = torch.full((len(x),), schedule.t_at(sigma), dtype=x.dtype, device=x.device)
        output = network(to_vp(x, sigma).to(x.dtype if dtype is None else dtype), t, cond).to(x.dtype)
        output, share = split_variance(output, x.shape[1]) if learned_variance else (output, None)
        return Prediction(output if prediction == "x0" else c_skip * x + c_out * output, share)

    return denoise


def self_conditioned(denoise: Denoise, images: int = 0) -> Denoise:
    """Tell a network what it last thought of the same images, as `c_concat` (Chen et al. 2022, arXiv 2208.04202).

    At first that is nothing: zeros. Clamped as it was in training (`guess`). For one run: each batch needs a new one.

    images: in the batch, b; 0 where all calls are on as many. Guidance may ask for b under the
    conditioning alone or for 2b, without it first: each image is then told of its own x0 under the same conditioning,
    or of the conditioned one where there is no other.
    """
    last: list[Tensor] = []  # (b or 2b, ...)

    def denoise_again(x: Tensor, sigma: float, cond: Cond) -> Prediction:
        told = last.pop() if last else torch.zeros_like(x)
        if (len(told), len(x)) == (images, 2 * images):
            told = torch.cat([told, told])
        elif (len(told), len(x)) == (2 * images, images):
            told = told[images:]
        found = denoise(x, sigma, {**cond, "c_concat": told})
        last.append(guess(found.x0))
        return found

    return denoise_again


def guess(x0: Tensor) -> Tensor:
    """What a self-conditioned network is told of a prediction: x0 without gradient, within [-1, 1] as pixels are.

    Unclamped, an untrained eps network's would be x / sqrt(ab), thousands where the noise is strongest.
    """
    return x0.detach().clamp(-1, 1)
