"""From a network that predicts eps, x0, v or flow to denoise(x, sigma, cond), which predicts x0; and their targets.

Samplers and guidance work on x = x0 + sigma noise and call a function `denoise` that predicts x0 from it (Karras et al.
2022). A network takes the variance-preserving x_vp = x / sqrt(1 + sigma^2) and a timestep t, and predicts eps, x0 or v;
or it takes the line x / (1 + sigma) between image and noise, and predicts its direction, the flow. This module is the
only place where the two meet.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ldm.arrays import Tensor, cast_like, is_tensor, library
from ldm.diffusion.schedule import Schedule, signal_and_noise_levels

PREDICTIONS = ("eps", "x0", "v", "flow")

Cond = dict[str, Tensor]  # a conditioning: "c_crossattn", "c_concat", "c_adm"; {} for none


class Prediction(NamedTuple):
    """The denoised prediction, and what samplers and guidance need besides.

    Attributes:
        x0: The predicted clean image or latent, (b, ...).
        variance_share: Of a network that learned the variance: 0 for the small variance of the step that follows, 1 for
            the large one, interpolated in log variance; (b, ...), see `split_variance`. It is a share because the
            variances depend on where the step ends, which only the sampler knows.
        unguided: Where guidance has changed x0, the conditional prediction before that, (b, ...).
    """

    x0: Tensor
    variance_share: Tensor | None = None
    unguided: Tensor | None = None


Denoise = Callable[[Tensor, Any, Cond], Prediction]  # (x, sigma, cond): `model.denoiser()`; sigma may be (b,)
BoundDenoise = Callable[[Tensor, float], Prediction]  # (x, sigma): with the conditioning bound by guidance


def check_prediction(prediction: str | None) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; choose from {', '.join(PREDICTIONS)}")


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """Scale x = x0 + sigma noise to the network's x_vp = sqrt(ab) x = x / sqrt(1 + sigma^2), EDM's c_in."""
    return x * (1 / math.sqrt(1 + sigma * sigma))


def from_vp(x_vp: Tensor, sigma: float) -> Tensor:
    """Scale the network's x_vp to x = x0 + sigma noise. Sampling starts at from_vp(unit normal noise, sigmas[0])."""
    return x_vp * math.sqrt(1 + sigma * sigma)


def scalings(prediction: str | None, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return (c_skip, c_out) of x0 = c_skip x + c_out output, for x = x0 + sigma noise (Karras et al. 2022, eq. 7).

    eps:  x0 = x - sigma eps.
    x0:   x0 = output.
    v:    x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v, which is sqrt(ab) x_vp - sqrt(1 - ab) v (Salimans & Ho
          2022, section 4).
    flow: x0 = x / (1 + sigma) - sigma / (1 + sigma) flow, which is x_t - t flow (Liu et al. 2022, arXiv 2209.03003),
          with t = sigma / (1 + sigma).
    """
    check_prediction(prediction)
    if prediction == "eps":
        return 1.0, -sigma
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "flow":
        return 1 / (1 + sigma), -sigma / (1 + sigma)
    return 1 / (1 + sigma * sigma), -sigma / (1 + sigma * sigma) ** 0.5


def target(prediction: str, x0: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Return what the network learns to predict from x_vp = sqrt(ab) x0 + sqrt(1 - ab) noise: (b, ...).

    It is noise (eps; Ho et al. 2020), x0, sqrt(ab) noise - sqrt(1 - ab) x0 (v; Salimans & Ho 2022, section 4), with ab
    of each image, (b,), or noise - x0 (flow; Liu et al. 2022).
    """
    check_prediction(prediction)
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "flow":
        return noise - x0
    signal_level, noise_level = signal_and_noise_levels(alphas_cumprod_t, x0)
    return signal_level * noise - noise_level * x0


def network_input(prediction: str, x_vp: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return what the network takes for x_vp (b, ...) at timesteps t (b,): these two, but for flow x_t and T t.

    There x_t = (1 - t) x0 + t noise, for the time t = sigma / (1 + sigma) in [0, 1].
    """
    if prediction != "flow":
        return x_vp, t
    signal_level, noise_level = signal_and_noise_levels(schedule.alphas_cumprod[t.cpu()], x_vp)
    total = signal_level + noise_level
    return x_vp / total, schedule.T * (noise_level / total).flatten()


def predicted_x0(prediction: str, output: Tensor, x_vp: Tensor, sigmas: Tensor) -> Tensor:
    """Return the x0 (b, ...) that a network's output for x_vp means, the inverse of `target`; sigmas: float64 (b,)."""
    sigma = sigmas.reshape(-1, *[1] * (x_vp.ndim - 1))  # (b, 1, ...)
    c_skip, c_out = scalings(prediction, sigma)
    return (c_skip * (1 + sigma * sigma).sqrt()).to(x_vp) * x_vp + cast_like(c_out, x_vp) * output


def make_denoiser(
    network: Callable[[Tensor, Tensor, Cond], Tensor],
    schedule: Schedule,
    prediction: str,
    dtype: Any = None,
    learned_variance: bool = False,
) -> Denoise:
    """Wrap network(x_vp, t, cond) as denoise(x, sigma, cond) -> Prediction.

    There sigma is a number, or a float64 tensor (b,) with that of each image.

    Args:
        network: Takes x_vp (b, ...) and t (b,) in 0..T-1, fractional between the timesteps it was trained on, in the
            dtype of x; one that predicts flow takes what `network_input` says.
        schedule: What the network was trained on; it relates sigma to t.
        prediction: What the network returns: eps, x0, v or flow.
        dtype: Of x_vp, if the network's differs from that of x. x0 always has the dtype of x, float32 or wider.
        learned_variance: The network returns twice x's channels, see `split_variance`.
    """
    check_prediction(prediction)

    def denoise(x: Tensor, sigma: Any, cond: Cond) -> Prediction:
        def of_sigma(value: Callable[[float], Any]) -> Any:  # a number, or a column (b, 1, ...) with that of each image
            if not is_tensor(sigma) or sigma.ndim == 0:
                return value(float(sigma))
            return cast_like(list(map(value, sigma.tolist())), x).reshape(-1, *[1] * (x.ndim - 1))

        c_skip, c_out = (of_sigma(lambda s, i=i: scalings(prediction, s)[i]) for i in range(2))
        if prediction == "flow":
            scaled, time = x / of_sigma(lambda s: 1 + s), of_sigma(lambda s: schedule.T * s / (1 + s))
        else:
            scaled, time = x * of_sigma(lambda s: 1 / math.sqrt(1 + s * s)), of_sigma(schedule.t_at)
        full = library(x).full
        t = time.flatten() if is_tensor(time) else full((len(x),), time, dtype=x.dtype, device=x.device)
        output = cast_like(network(scaled if dtype is None else scaled.to(dtype), t, cond), x)
        output, share = split_variance(output, x.shape[1]) if learned_variance else (output, None)
        return Prediction(output if prediction == "x0" else c_skip * x + c_out * output, share)

    return denoise


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Split the output (b, 2c, ...) of a network that learned the variance into its prediction and `variance_share`.

    The second half v is in about [-1, 1], and the share is (v + 1) / 2: log variance = share log beta_t + (1 - share)
    log posterior variance (Nichol & Dhariwal 2021, eq. 15, with v as in their code). Both are (b, c, ...).
    """
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"a network that learns the variance returns 2 x {channels} channels, but this one returns "
            f"{output.shape[1]}: set out_channels to {2 * channels}, or learned_variance to false"
        )
    predicted, v = output[:, :channels], output[:, channels:]
    return predicted, (v + 1) / 2
