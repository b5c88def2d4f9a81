"""Noise schedules: betas -> alpha-bar -> sigmas, the levels a sampler visits, and q_sample. Everything in float64.

Two frames describe the same noisy image. Networks see the variance-preserving one of DDPM (Ho et al. 2020, eq. 4),

    x_vp = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise,      ab_t = prod_{s <= t} (1 - beta_s),   t in 0..T-1,

samplers the variance-exploding one of Karras et al. 2022, which is x_vp / sqrt(ab_t):

    x = x0 + sigma noise,                             sigma = sqrt((1 - ab) / ab).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# What ab = 0 (zero terminal SNR) becomes, so that its sigma is finite: 4096.
SMALLEST_ALPHA_BAR = 2.0**-24

# name -> default (start, end): betas, save for sigmoid_alphabar, where they are arguments of the sigmoid, and vp, where
# they are rates.
SCHEDULES = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": None,
    "sigmoid_alphabar": (-3.0, 3.0),
    "sigmoid_beta": (1e-4, 0.02),
    "sqrt": (1e-4, 0.02),
    "vp": (0.1, 20.0),
}
VP_FIRST = 1e-3  # the time at which the vp schedule begins
TIMESTEP_SPACINGS = ("compvis", "leading", "linspace", "trailing", "quad")
SIGMA_SPACINGS = ("karras", "exponential")
FINAL_SIGMAS = ("zero", "sigma_min")


def betas(name: str, T: int = 1000, start: float | None = None, end: float | None = None) -> Tensor:
    """Forward-process variances beta_0..beta_{T-1}: float64 (T,), each in (0, 1).

    name (defaults of start and end, which are never rescaled with T):
      linear            beta linear from 1e-4 to 0.02 (Ho et al. 2020). CompVis calls this "sqrt_linear".
      scaled_linear     sqrt(beta) linear, beta from 0.00085 to 0.012 (Stable Diffusion). CompVis calls this "linear".
      cosine            ab = cos^2 of Nichol & Dhariwal 2021, eq. 17, s = 0.008; takes neither start nor end.
      sigmoid_alphabar  ab a sigmoid between its values at -3 and 3 (Jabri et al. 2022, fig. 8, tau = 1).
      sigmoid_beta      beta = start + (end - start) sigmoid(u), u linear from -6 to 6; from 1e-4 to 0.02.
      sqrt              beta = sqrt(u), u linear from 1e-4 to 0.02 (CompVis).
      vp                T stretches of the variance-preserving SDE from time 0.001 to 1, whose rate grows from 0.1 to 20
                        (Song et al. 2021, "Score-based ...", appendix C; in a few large steps: Xiao et al. 2022).

    Raises ValueError for an unknown name, T < 1, start or end given to cosine, and betas outside (0, 1).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose from {', '.join(SCHEDULES)}")
    if T < 1:
        raise ValueError(f"a noise schedule needs at least 1 step, got T={T}")
    defaults = SCHEDULES[name]
    if defaults is None:
        if start is not None or end is not None:
            raise ValueError(f"schedule {name!r} takes neither start nor end, got start={start}, end={end}")
        return betas_of_curve(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T)
    start = defaults[0] if start is None else start
    end = defaults[1] if end is None else end
    if name == "sigmoid_alphabar":
        if not start < end:
            raise ValueError(f"schedule {name!r} needs start < end, got start={start}, end={end}")
        top = 1 / (1 + math.exp(-end))
        return betas_of_curve(lambda u: top - torch.sigmoid(u * (end - start) + start), T)
    if name == "vp":
        if not 0 < start <= end:
            raise ValueError(f"schedule {name!r} needs 0 < start <= end, got start={start}, end={end}")
        return _vp(T, start, end)
    if not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"schedule {name!r} needs start and end between 0 and 1, got start={start}, end={end}")
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    if name == "sigmoid_beta":
        return start + (end - start) * torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
    line = torch.linspace(start, end, T, dtype=torch.float64)
    return line.sqrt() if name == "sqrt" else line


def betas_of_curve(alpha_bar: Callable[[Tensor], Tensor], T: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - ab(t + 1) / ab(t), at most max_beta, for a curve ab over [0, 1]: float64 (T,).

    The bound 0.999 is Nichol & Dhariwal's 2021 (section 3.2): the curve ends at 0, where the last beta would be 1.
    """
    curve = alpha_bar(torch.arange(T + 1, dtype=torch.float64) / T)
    return (1 - curve[1:] / curve[:-1]).clamp(max=max_beta)


def _vp(T: int, start: float, end: float) -> Tensor:
    """beta = 1 - ab(time_{t+1}) / ab(time_t), ab = exp(-start time - (end - start) time^2 / 2): float64 (T,)."""
    time = torch.linspace(VP_FIRST, 1, T + 1, dtype=torch.float64)
    return -torch.expm1((-start * time - (end - start) / 2 * time**2).diff())


def alphas_cumprod(beta: Tensor) -> Tensor:
    """ab_t = prod_{s <= t} (1 - beta_s) (Ho et al. 2020, eq. 4): (T,) -> float64 (T,)."""
    return torch.cumprod(1 - beta.double(), dim=0)


def rescale_zero_terminal_snr(ab: Tensor) -> Tensor:
    """Shift and scale sqrt(ab) so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1): float64 (T,).

    An eps network tells nothing about x0 at ab = 0: use v or x0 with it.
    """
    if len(ab) < 2:
        raise ValueError(f"zero terminal SNR needs a schedule of at least 2 steps, got T={len(ab)}")
    root = ab.double().sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels a network was trained on.

    alphas_cumprod: float64 (T,) on the CPU, strictly decreasing within [0, 1); exactly 0 is allowed at the end.
    """

    alphas_cumprod: Tensor

    def __post_init__(self):
        ab = self.alphas_cumprod
        if ab.dtype != torch.float64 or ab.ndim != 1 or ab.device.type != "cpu" or len(ab) == 0:
            raise ValueError(f"alphas_cumprod must be float64 (T,) on the CPU, got {ab.dtype} {tuple(ab.shape)}")
        if not (ab[0] < 1 and ab[-1] >= 0 and bool((ab.diff() < 0).all())):
            raise ValueError("alphas_cumprod must decrease strictly from below 1 to 0 or more")

    @property
    def T(self) -> int:
        """Number of noise levels."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt((1 - ab) / ab), strictly ascending: float64 (T,).

        ab = 0 enters as 2^-24, sigma 4096; should the level before it lie there already, as half of that one's ab.
        """
        ab = self.alphas_cumprod.clone()
        if ab[-1] == 0:
            ab[-1] = SMALLEST_ALPHA_BAR if self.T == 1 else min(SMALLEST_ALPHA_BAR, float(ab[-2]) / 2)
        return ((1 - ab) / ab).sqrt()

    @cached_property
    def _knots(self) -> list[float]:
        """-log ab at t = 0..T-1; between them it is taken as linear in t, as in DPM-Solver (Lu et al. 2022)."""
        return torch.log1p(self.sigmas**2).tolist()

    def sigma_at(self, t: float) -> float:
        """sigma of a level t in 0..T-1, fractional or not. Raises ValueError outside."""
        if not 0 <= t <= self.T - 1:
            raise ValueError(f"timestep {t} is outside 0..{self.T - 1}")
        i = int(t)
        if i == t:
            return float(self.sigmas[i])
        low, high = self._knots[i], self._knots[i + 1]
        return math.sqrt(math.expm1(low + (t - i) * (high - low)))

    def t_at(self, sigma: float) -> float:
        """Fractional level t of a sigma: exactly i for sigmas[i]; beyond the schedule's ends, the end."""
        value = math.log1p(sigma * sigma)
        i = bisect_right(self._knots, value) - 1
        if i < 0:
            return 0.0
        if i >= self.T - 1:
            return float(self.T - 1)
        low, high = self._knots[i], self._knots[i + 1]
        t = i + (value - low) / (high - low)
        # log1p rounds: a level of the schedule must come back as the whole number that the network was trained on.
        return float(round(t)) if abs(t - round(t)) < 1e-6 else t


def make_schedule(
    name: str = "cosine",
    T: int = 1000,
    start: float | None = None,
    end: float | None = None,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Schedule of a name (see `betas` for names, defaults and errors), with zero terminal SNR on request."""
    ab = alphas_cumprod(betas(name, T, start, end))
    return Schedule(rescale_zero_terminal_snr(ab) if zero_terminal_snr else ab)


def signal_and_noise(ab: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(ab) and sqrt(1 - ab), computed in float64, as (b, 1, ...) beside x (b, ...), in its dtype and on its device.

    ab: (b,), one level per image.
    """
    ab = ab.double().reshape(-1, *[1] * (x.ndim - 1))  # (b, 1, ...)
    return ab.sqrt().to(x), (1 - ab).sqrt().to(x)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise (Ho et al. 2020, eq. 4), in the variance-preserving frame.

    x0, noise: (b, ...); t: int64 (b,) in 0..T-1, one per image. Returns (b, ...).
    """
    signal, spread = signal_and_noise(schedule.alphas_cumprod[t.cpu()], x0)
    return signal * x0 + spread * noise


def training_timesteps(
    name: str, batch: int, T: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Levels to train on: int64 (batch,) in 0..T-1, on the CPU.

    name: uniform, or logit_normal: floor(T sigmoid(n)), n ~ N(mean, std) (Esser et al. 2024, section 3.1);
    a mean above 0 means more noise. mean and std are for logit_normal alone.
    """
    if name == "uniform":
        return torch.randint(0, T, (batch,), generator=generator)
    if name == "logit_normal":
        n = mean + std * torch.randn(batch, dtype=torch.float64, generator=generator)
        return (T * n.sigmoid()).long().clamp(max=T - 1)  # the sigmoid rounds to 1 for n > 37
    raise ValueError(f"unknown distribution of timesteps {name!r}; choose from uniform, logit_normal")


def compvis_quad(steps: int, T: int) -> list[int]:
    """CompVis's "quad" grid as it is, ascending. Many steps repeat low levels (50 of 1000 begin 1, 1, 2, 3)."""
    return [int(root**2) + 1 for root in np.linspace(0, math.sqrt(0.8 * T), steps)]


def _distinct(grid: list[int], T: int) -> list[int]:
    """The nearest strictly ascending levels within 0..T-1; a grid that is so already comes back as it is."""
    levels = []
    for i, t in enumerate(grid):
        above = levels[-1] + 1 if levels else 0
        levels.append(min(max(t, above), T - len(grid) + i))
    return levels


def timesteps(spacing: str, steps: int, T: int) -> list[int]:
    """Exactly `steps` levels in 0..T-1, strictly descending, for any number of steps from 1 to T.

    spacing, with i = 0..steps-1 (all but compvis and quad as named by Lin et al. 2024, table 2):
      compvis   floor(i T / steps) + 1. Where steps divides T this is CompVis's grid bit for bit; elsewhere CompVis
                makes more steps than asked or fails, and this spreads the steps asked for over the same range.
      leading   i floor(T / steps) + 1: diffusers with Stable Diffusion's steps_offset = 1.
      linspace  round(linspace(0, T - 1, steps)); one step is T - 1.
      trailing  round(T - i T / steps) - 1: begins at T - 1, where training ended.
      quad      CompVis's quadratic grid, up to 0.8 T; levels that it would repeat move up to the next free one.
    Levels above T - 1 (leading and compvis when steps = T) move down likewise.

    Raises ValueError for an unknown spacing and for steps outside 1..T.
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


def _sigma_ramp(spacing: str, steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Sigmas from high down to low, even in sigma^(1/rho) (Karras et al. 2022, eq. 5) or in log sigma: (steps,)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "exponential":
        levels = torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    else:
        levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return levels.clamp(low, high)  # the ends round


def _own_sigmas(levels: str | Sequence[float], schedule: Schedule) -> Tensor:
    """The sigmas of the timesteps listed, or those listed behind the word "sigmas": float64 (n,), descending."""
    try:
        words = levels.replace(",", " ").split() if isinstance(levels, str) else list(levels)
        are_sigmas = words[:1] == ["sigmas"]
        numbers = [float(word) for word in words[are_sigmas:]]
    except (ValueError, TypeError):
        raise ValueError(
            f"unknown spacing {levels!r}; choose from {', '.join(TIMESTEP_SPACINGS + SIGMA_SPACINGS)}, or list levels "
            "of your own: timesteps (999,749,499,249) or sigmas (sigmas 14,3.6,1.2)"
        ) from None
    sigmas = numbers if are_sigmas else [schedule.sigma_at(t) for t in numbers]
    low, high = schedule.sigmas[[0, -1]].tolist()
    for sigma in sigmas:
        if not low <= sigma <= high:
            raise ValueError(f"sigma {sigma} is outside {low:.7g}..{high:.7g}, the levels that the model knows")
    if any(above <= below for above, below in pairwise(sigmas)):
        raise ValueError(f"the levels of a spacing must descend, got {levels}")
    return torch.tensor(sigmas, dtype=torch.float64)


def sampling_sigmas(
    schedule: Schedule, steps: int, spacing: str | Sequence[float] = "trailing", final_sigma: str = "zero"
) -> Tensor:
    """The levels of a run: `steps` network levels, strictly descending, then the final one: float64 (steps + 1,).

    spacing: one of `timesteps`; or karras or exponential, which run from the schedule's largest sigma to its smallest;
      or levels of one's own, `steps` of them, descending: timesteps in 0..T-1, fractions too, as a sequence or as text
      ("999, 749.5, 499"), or sigmas within the schedule's as text after that word ("sigmas 14, 5.5, 1.2").
    final_sigma: zero, or sigma_min = sigma(ab_0), where CompVis stops.

    Raises ValueError for unknown names, for steps outside 1..T, and for levels that do not fit.
    """
    if final_sigma not in FINAL_SIGMAS:
        raise ValueError(f"unknown final sigma {final_sigma!r}; choose from {', '.join(FINAL_SIGMAS)}")
    if isinstance(spacing, str) and spacing in SIGMA_SPACINGS:
        _check_steps(steps, schedule.T)
        levels = _sigma_ramp(spacing, steps, float(schedule.sigmas[0]), float(schedule.sigmas[-1]))
    elif isinstance(spacing, str) and spacing in TIMESTEP_SPACINGS:
        levels = schedule.sigmas[timesteps(spacing, steps, schedule.T)]
    else:
        levels = _own_sigmas(spacing, schedule)
        if len(levels) != steps:
            raise ValueError(f"the spacing lists {len(levels)} levels: the number of steps must be that, got {steps}")
    final = schedule.sigmas[:1] if final_sigma == "sigma_min" else schedule.sigmas.new_zeros(1)
    return torch.cat([levels, final])
