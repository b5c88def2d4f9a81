"""Noise schedules: betas -> alpha-bar -> sigmas, the timesteps a sampler visits, and q_sample. All in float64.

A noisy image is a mix of signal and noise. Two scalings of the same mix are in use. Networks are trained on DDPM's
variance-preserving one (VP; Ho et al. 2020, eq. 4), whose signal level and noise level add up to variance 1:

    x_vp = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise,      ab_t = prod_{s <= t} (1 - beta_s),   t in 0..T-1.

Samplers work on the variance-exploding one of Karras et al. 2022, which is x_vp / sqrt(ab_t): the signal level is 1 and
the noise level is sigma.

    x = x0 + sigma noise,                             sigma = sqrt((1 - ab) / ab).

`betas` and `Schedule` say which noise levels a network is trained on, `timesteps` and `sampling_sigmas` which of them
a sampler visits. In code ab is `alphas_cumprod`, the name in every checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from ldm.arrays import Tensor, cast_like, library, to_numpy
from ldm.checks import Range, Rate

MIN_ALPHA_BAR = 2.0**-24  # replaces ab = 0 (zero terminal SNR), so that sigma is finite: 4096

# name -> default (start, end). These are betas, except for sigmoid_alphabar (the sigmoid's arguments) and vp (rates).
SCHEDULES = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": None,
    "flow": None,
    "sigmoid_alphabar": (-3.0, 3.0),
    "sigmoid_beta": (1e-4, 0.02),
    "sqrt": (1e-4, 0.02),
    "vp": (0.1, 20.0),
}
VP_START_TIME = 1e-3
TIMESTEP_SPACINGS = ("compvis", "leading", "linspace", "trailing", "quad")
SIGMA_SPACINGS = ("karras", "exponential")
FINAL_SIGMAS = ("zero", "sigma_min")


def betas(name: str, T: int = 1000, start: float | None = None, end: float | None = None) -> Tensor:
    """Return the variances beta_0..beta_{T-1} of the forward process: float64 (T,), each in (0, 1), flow's last one 1.

      linear            beta linear from 1e-4 to 0.02 (Ho et al. 2020). CompVis calls this "sqrt_linear".
      scaled_linear     sqrt(beta) linear, beta from 0.00085 to 0.012 (Stable Diffusion). CompVis: "linear".
      cosine            ab = cos^2 (Nichol & Dhariwal 2021, eq. 17, s = 0.008); takes neither start nor end.
      flow              sigma = t / (1 - t), t = 1/T, 2/T, ..., 1: the times of flow matching (Liu et al. 2022), for any
                        prediction; takes neither start nor end.
      sigmoid_alphabar  ab a sigmoid on [-3, 3] (Jabri et al. 2022, fig. 8, tau = 1).
      sigmoid_beta      beta = start + (end - start) sigmoid(u), u linear from -6 to 6, from 1e-4 to 0.02.
      sqrt              beta = sqrt(u), u linear from 1e-4 to 0.02 (CompVis).
      vp                T intervals of the variance-preserving SDE from time 0.001 to 1, whose rate grows from 0.1
                        to 20 (Song et al. 2021, "Score-based ...", appendix C; few steps: Xiao et al. 2022).

    start and end replace the two numbers of the name. They are never rescaled with T.
    """
    import torch  # here and below: only a new schedule needs it, which a model without torch brings along

    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    if T < 1:
        raise ValueError(f"a noise schedule needs at least 1 step, got T={T}")
    defaults = SCHEDULES[name]
    if defaults is None:
        if start is not None or end is not None:
            raise ValueError(f"schedule {name!r} takes neither start nor end, got start={start}, end={end}")
        if name == "flow":
            return betas_from_alpha_bar(lambda t: (1 - t) ** 2 / ((1 - t) ** 2 + t**2), T, max_beta=1)
        return betas_from_alpha_bar(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T)
    start = defaults[0] if start is None else start
    end = defaults[1] if end is None else end
    needs, fits = {
        "sigmoid_alphabar": ("start < end", start < end),
        "vp": ("0 < start <= end", 0 < start <= end),
    }.get(name, ("start and end between 0 and 1", 0 < start < 1 and 0 < end < 1))
    if not fits:
        raise ValueError(f"schedule {name!r} needs {needs}, got start={start}, end={end}")
    if name == "sigmoid_alphabar":
        top = 1 / (1 + math.exp(-end))
        return betas_from_alpha_bar(lambda u: top - torch.sigmoid(u * (end - start) + start), T)
    if name == "vp":  # 1 - ab(time_{t+1}) / ab(time_t), ab = exp(-start time - (end - start) time^2 / 2)
        time = torch.linspace(VP_START_TIME, 1, T + 1, dtype=torch.float64)
        return -torch.expm1((-start * time - (end - start) / 2 * time**2).diff())
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    if name == "sigmoid_beta":
        return start + (end - start) * torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
    line = torch.linspace(start, end, T, dtype=torch.float64)
    return line.sqrt() if name == "sqrt" else line


def betas_from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], T: int, max_beta: float = 0.999) -> Tensor:
    """Return beta_t = 1 - ab((t + 1) / T) / ab(t / T), at most max_beta, for a curve ab on [0, 1]: float64 (T,).

    Without the bound the last beta of a curve that ends at 0 would be 1 (Nichol & Dhariwal 2021, section 3.2).
    """
    import torch

    curve = alpha_bar(torch.arange(T + 1, dtype=torch.float64) / T)
    return (1 - curve[1:] / curve[:-1]).clamp(max=max_beta)


def alphas_cumprod(beta: Tensor) -> Tensor:
    """Return ab_t = prod_{s <= t} (1 - beta_s) (Ho et al. 2020, eq. 4): (T,) -> float64 (T,)."""
    return (1 - beta.double()).cumprod(0)


def rescale_zero_terminal_snr(ab: Tensor) -> Tensor:
    """Shift and scale sqrt(ab) so that the last one is 0 and the first one stays (Lin et al. 2024, algorithm 1).

    Use it with v or x0 prediction: at ab = 0 the noisy image is pure noise, and a predicted eps does not determine x0.
    """
    if len(ab) < 2:
        raise ValueError(f"zero terminal SNR needs a schedule of at least 2 steps, got T={len(ab)}")
    root = ab.double().sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels that a network was trained on.

    Attributes:
        alphas_cumprod: ab, float64 (T,) on the CPU, strictly decreasing within [0, 1); only the last may be 0.
    """

    alphas_cumprod: Tensor

    def __post_init__(self):
        ab = self.alphas_cumprod
        if not str(ab.dtype).endswith("float64") or ab.ndim != 1 or str(ab.device) != "cpu" or len(ab) == 0:
            raise ValueError(f"alphas_cumprod must be float64 (T,) on the CPU, got {ab.dtype} {tuple(ab.shape)}")
        if not (ab[0] < 1 and ab[-1] >= 0 and bool((ab[1:] < ab[:-1]).all())):
            raise ValueError("alphas_cumprod must decrease strictly, starting below 1 and ending at 0 or more")

    @property
    def T(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt((1 - ab) / ab), strictly ascending and finite: float64 (T,).

        ab = 0 is replaced by 2^-24, or by half of the ab before it where that is smaller.
        """
        ab = 1 * self.alphas_cumprod
        if ab[-1] == 0:
            ab[-1] = MIN_ALPHA_BAR if self.T == 1 else min(MIN_ALPHA_BAR, float(ab[-2]) / 2)
        return ((1 - ab) / ab) ** 0.5

    @cached_property
    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        """t = 0..T-1, and -log ab there; it is interpolated linearly in t, as in DPM-Solver (Lu et al. 2022)."""
        return np.arange(self.T), np.log1p(to_numpy(self.sigmas) ** 2)

    def sigma_at(self, t: float) -> float:
        """Return sigma at timestep t, which may be fractional. Raises ValueError outside 0..T-1."""
        if not 0 <= t <= self.T - 1:
            raise ValueError(f"timestep {t} is outside 0..{self.T - 1}")
        return float(self.sigmas[int(t)]) if t == int(t) else math.sqrt(math.expm1(np.interp(t, *self._knots)))

    def t_at(self, sigma: float) -> float:
        """Return the fractional timestep of sigma: exactly i for sigmas[i], clamped to 0..T-1."""
        timesteps, logs = self._knots
        t = float(np.interp(math.log1p(sigma * sigma), logs, timesteps))
        # log1p rounds, but sigmas[i] must give back the integer timestep that the network was trained on.
        return float(round(t)) if abs(t - round(t)) < 1e-6 else t


def make_schedule(
    name: str = "cosine",
    T: Annotated[int, Range(1, 2**16)] = 1000,
    start: float | None = None,
    end: float | None = None,
    zero_terminal_snr: bool = False,
    shift: float = 1.0,
) -> Schedule:
    """Build a schedule.

    Args:
        name: linear, scaled_linear, cosine, flow, sigmoid_alphabar, sigmoid_beta, sqrt or vp: see `betas`.
        T: the number of timesteps.
        start, end: in place of the name's two numbers.
        zero_terminal_snr: rescale it to end in noise alone (Lin et al. 2024, algorithm 1).
        shift: multiplies each sigma, for larger images: t becomes shift t / (1 + (shift - 1) t) of flow matching
            (Esser et al. 2024, eq. 23), and log SNR falls by 2 log shift (Hoogeboom et al. 2023, section 3.1).
    """
    ab = alphas_cumprod(betas(name, T, start, end))
    ab = rescale_zero_terminal_snr(ab) if zero_terminal_snr else ab
    if not 0 < shift < math.inf:
        raise ValueError(f"the shift of a noise schedule must be above 0 (1 for none), got {shift}")
    return Schedule(ab if shift == 1 else ab / (ab + shift**2 * (1 - ab)))


def signal_and_noise_levels(ab: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(ab) and sqrt(1 - ab) of each image, (b,) -> (b, 1, ...) of x's dtype and device, to multiply x."""
    ab = ab.double().reshape(-1, *[1] * (x.ndim - 1))  # (b, 1, ...)
    return ab.sqrt().to(x), (1 - ab).sqrt().to(x)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """Sample q(x_t | x0) = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise, for x0 (b, ...) at timesteps t (b,) in 0..T-1."""
    signal_level, noise_level = signal_and_noise_levels(schedule.alphas_cumprod[t.cpu()], x0)
    return signal_level * x0 + noise_level * noise


def training_timesteps(
    name: str, batch: int, T: int, mean: float = 0.0, std: Rate = 1.0, generator: Any = None
) -> Tensor:
    """Sample the timesteps to train on: int64 (batch,) in 0..T-1, on the CPU.

    Args:
        name: uniform, or logit_normal: floor(T sigmoid(n)) with n ~ N(mean, std) (Esser et al. 2024, section 3.1).
        mean, std: Of logit_normal only; a mean above 0 trains more on high noise levels.
    """
    import torch

    if name == "uniform":
        return torch.randint(0, T, (batch,), generator=generator)
    if name == "logit_normal":
        n = mean + std * torch.randn(batch, dtype=torch.float64, generator=generator)
        return (T * n.sigmoid()).long().clamp(max=T - 1)  # the sigmoid rounds to 1 for n > 37
    raise ValueError(f"unknown distribution of timesteps {name!r}; choose from uniform, logit_normal")


def compvis_quad(steps: int, T: int) -> list[int]:
    """Return CompVis's "quad" timesteps, ascending; many steps repeat low ones (50 of 1000 begin 1, 1, 2, 3)."""
    return [int(root**2) + 1 for root in np.linspace(0, math.sqrt(0.8 * T), steps)]


def _distinct(grid: list[int], T: int) -> list[int]:
    """Move timesteps as little as needed to be strictly ascending within 0..T-1."""
    result = []
    for i, t in enumerate(grid):
        lowest = result[-1] + 1 if result else 0
        result.append(min(max(t, lowest), T - len(grid) + i))
    return result


def timesteps(spacing: str, steps: int, T: int) -> list[int]:
    """Choose `steps` timesteps in 0..T-1 for a sampling run, strictly descending.

    The spacing is one of these, with i = 0..steps-1 (leading, linspace, trailing: Lin et al. 2024, table 2):
      compvis   floor(i T / steps) + 1: CompVis's timesteps where `steps` divides T. Elsewhere CompVis makes more
                steps than requested or fails; this spreads the requested number over the same range.
      leading   i floor(T / steps) + 1: diffusers with Stable Diffusion's steps_offset = 1.
      linspace  round(linspace(0, T - 1, steps)); one step is T - 1.
      trailing  round(T - i T / steps) - 1: starts at T - 1, where training ends.
      quad      CompVis's quadratic spacing up to 0.8 T.
    A timestep that repeats, or lies above T - 1, moves to the nearest free one.
    """
    if spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"unknown timestep spacing {spacing!r}; choose from {', '.join(TIMESTEP_SPACINGS)}")
    _check_steps(steps, T)
    if spacing == "compvis":
        grid = [i * T // steps + 1 for i in range(steps)]
    elif spacing == "leading":
        grid = [i * (T // steps) + 1 for i in range(steps)]
    elif spacing == "linspace":
        grid = [round(t) for t in np.linspace(0, T - 1, steps).tolist()] if steps > 1 else [T - 1]
    elif spacing == "trailing":
        grid = [round(t) - 1 for t in np.arange(T, 0, -T / steps)[:steps].tolist()][::-1]  # [:steps]: it may overrun
    else:
        grid = compvis_quad(steps, T)
    return _distinct(grid, T)[::-1]


def _check_steps(steps: int, T: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps must be from 1 to {T} (the model's noise levels), got {steps}")


def _sigma_ramp(spacing: str, steps: int, low: float, high: float, rho: float = 7.0) -> np.ndarray:
    """Return sigmas from high to low, evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5) or log sigma."""
    ramp = np.linspace(0, 1, steps)
    if spacing == "exponential":
        sigmas = np.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    else:
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return sigmas.clip(low, high)  # both ends are rounded


def _listed_sigmas(listed: str | Sequence[float], schedule: Schedule) -> list[float]:
    """Return the sigmas of listed timesteps, or those listed after the word "sigmas", descending."""
    try:
        words = listed.replace(",", " ").split() if isinstance(listed, str) else list(listed)
        are_sigmas = words[:1] == ["sigmas"]
        numbers = [float(word) for word in words[are_sigmas:]]
    except (ValueError, TypeError):
        raise ValueError(
            f"unknown spacing {listed!r}; choose from {', '.join(TIMESTEP_SPACINGS + SIGMA_SPACINGS)}, or list "
            "timesteps (999,749,499,249) or sigmas (sigmas 14,3.6,1.2)"
        ) from None
    sigmas = numbers if are_sigmas else [schedule.sigma_at(t) for t in numbers]
    low, high = schedule.sigmas[[0, -1]].tolist()
    for sigma in sigmas:
        if not low <= sigma <= high:
            raise ValueError(f"sigma {sigma} is outside {low:.7g}..{high:.7g}, the model's noise levels")
    if any(above <= below for above, below in pairwise(sigmas)):
        raise ValueError(f"the listed noise levels must descend, got {listed}")
    return sigmas


def sampling_sigmas(
    schedule: Schedule, steps: int, spacing: str | Sequence[float] = "trailing", final_sigma: str = "zero"
) -> Tensor:
    """Choose the noise levels of a sampling run.

    Args:
        schedule: What the network was trained on.
        steps: 1 to T.
        spacing: One of `timesteps`; or karras or exponential, from the schedule's largest sigma to its smallest; or
            `steps` descending timesteps in 0..T-1, which may be fractional, as a sequence or as text ("999, 749.5,
            499"); or sigmas within the schedule's as text after that word ("sigmas 14, 5.5, 1.2").
        final_sigma: zero, or sigma_min = sigma(ab_0), where CompVis stops.

    Returns:
        float64 (steps + 1,): the sigmas at which the network is evaluated, strictly descending, then the final one.
    """
    if final_sigma not in FINAL_SIGMAS:
        raise ValueError(f"unknown final sigma {final_sigma!r}; choose from {', '.join(FINAL_SIGMAS)}")
    if isinstance(spacing, str) and spacing in SIGMA_SPACINGS:
        _check_steps(steps, schedule.T)
        sigmas = _sigma_ramp(spacing, steps, float(schedule.sigmas[0]), float(schedule.sigmas[-1]))
    elif isinstance(spacing, str) and spacing in TIMESTEP_SPACINGS:
        sigmas = schedule.sigmas[timesteps(spacing, steps, schedule.T)]
    else:
        sigmas = _listed_sigmas(spacing, schedule)
        if len(sigmas) != steps:
            raise ValueError(f"the spacing lists {len(sigmas)} noise levels, but the number of steps is {steps}")
    own = schedule.sigmas
    return library(own).concatenate([cast_like(sigmas, own), own[:1] if final_sigma == "sigma_min" else 0 * own[:1]])
