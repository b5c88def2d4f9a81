"""Samplers: step functions over denoise(x, sigma), one driver, and the table of names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise, Prediction
from ldm.diffusion.sampling.first_order import Noise, Point, Points, euler
from ldm.diffusion.sampling.multistep import deis, dpmpp_2m, dpmpp_3m, lms, plms, unipc
from ldm.diffusion.sampling.second_order import dpm2, heun
from ldm.diffusion.sampling.stochastic import ddpm, ddpm_large, dpmpp_sde, lcm

# (denoise, points, sigma_next, eta, noise) -> x at sigma_next
StepFunction = Callable[[BoundDenoise, Points, float, float, Noise | None], Tensor]
AUTO = "auto"  # see choose_sampler
REMEMBERED = 4  # points, for Adams-Bashforth of order 4


class Step(NamedTuple):
    """Where a run stands after step `index`: x (b, ...) at level `sigma`, and the x0 (b, ...) predicted on the way."""

    index: int
    sigma: float
    x: Tensor
    x0: Tensor


def sample(
    denoise: BoundDenoise,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    step: StepFunction = euler,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Walk x from sigmas[0] to sigmas[-1], yielding a Step after each of the len(sigmas) - 1 steps.

    x: (b, ...) = x0 + sigmas[0] noise; see denoiser.from_vp to start from unit noise and to_vp to end above sigma 0.
    It is kept in float32 or wider. sigmas: descending; the last may be 0, or the one before it again.
    eta: 0 to 1, the share of fresh noise. noise: () -> (b, ...), drawn a fixed number of times a step.

    Raises ValueError (at the call, not at the first step) for eta out of range, eta without noise, and bad sigmas.
    """
    levels = _levels(sigmas)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} needs a source of noise, got none")
    return _walk(denoise, _wide(x), levels, step, eta, noise)


def _levels(sigmas: Tensor | Sequence[float]) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or min(levels[:-1]) <= 0 or levels[-1] < 0:
        raise ValueError(f"a run needs two or more sigmas, above 0 save for the last, got {levels}")
    if not (all(above > below for above, below in pairwise(levels[:-1])) and levels[-1] <= levels[-2]):
        raise ValueError(f"the sigmas of a run must descend, got {levels}")
    return levels


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _walk(denoise, x, levels, step, eta, noise) -> Iterator[Step]:
    points = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        found = denoise(x, sigma)
        points = [*points[1 - REMEMBERED :], Point(sigma, x, found.x0, found.variance_share)]
        if sigma_next < sigma:
            x = step(denoise, points, sigma_next, eta, noise)
        yield Step(index, sigma_next, x, points[-1].x0)


def invert(denoise: BoundDenoise, x: Tensor, sigmas: Tensor | Sequence[float], corrections: int = 0) -> Iterator[Step]:
    """DDIM inversion: walk x up from sigmas[-1] to sigmas[0], to where `ddim` on these sigmas would lead back to it.

    Euler's method upwards (Dhariwal & Nichol 2021, appendix F; Song et al. 2021, section 4.3). eps is predicted at the
    step's lower end, that of sigma 0 at its upper end; each correction predicts it anew at the upper end as found so
    far, which is a fixed-point iteration to the exact inverse of the step. Evaluates 1 + corrections times a step.

    sigmas: as for `sample`, descending. x: (b, ...) at level sigmas[-1]; an image's latents where that is about 0.
    """
    x = _wide(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(reversed(_levels(sigmas)))):
        x_next, level = x, sigma if sigma > 0 else sigma_next
        for _ in range(1 + corrections):
            x0 = denoise(x_next, level).x0
            x_next, level = x + (sigma_next - sigma) * Point(level, x_next, x0).eps, sigma_next
        x = x_next
        yield Step(index, sigma_next, x, x0)


@dataclass(frozen=True)
class Sampler:
    """A row of the table: the step function and its defaults. Calling it is `sample` with them.

    spacing, final_sigma: for schedule.sampling_sigmas. eta: for the step; None where it adds no noise whatever eta is.
    """

    step: StepFunction
    eta: float | None = 0.0
    spacing: str = "trailing"
    final_sigma: str = "zero"

    def __call__(
        self,
        denoise: BoundDenoise,
        x: Tensor,
        sigmas: Tensor | Sequence[float],
        eta: float | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        if self.eta is None and eta is not None and eta != 0:
            able = ", ".join(name for name, row in SAMPLERS.items() if row.eta is not None)
            raise ValueError(f"this sampler adds no noise, so eta must be 0, got {eta}; those that can: {able}")
        eta = self.eta if eta is None else eta
        return sample(denoise, x, sigmas, self.step, 0.0 if eta is None else eta, noise)

    def evaluations(self, sigmas: Tensor | Sequence[float]) -> list[int]:
        """How often each step of a run on these sigmas calls denoise: counted in a run on a single number."""
        calls = [0]

        def denoise(x: Tensor, sigma: float) -> Prediction:
            calls[-1] += 1
            return Prediction(x)

        zero = torch.zeros(1, device="cpu")
        for _ in self(denoise, zero, sigmas, noise=lambda: zero):
            calls.append(0)
        return calls[:-1]


SAMPLERS = {
    "ddim": Sampler(euler),
    "ddpm": Sampler(ddpm, eta=1.0),
    "ddpm_large": Sampler(ddpm_large, eta=1.0),
    "euler": Sampler(euler),  # under its two other names
    "euler_a": Sampler(euler, eta=1.0),
    "heun": Sampler(heun, eta=None),
    "dpm2": Sampler(dpm2),
    "dpm2_a": Sampler(dpm2, eta=1.0),
    "plms": Sampler(plms, eta=None),
    "lms": Sampler(lms, eta=None),
    "deis": Sampler(deis, eta=None),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m, eta=1.0),
    "dpmpp_3m_sde": Sampler(dpmpp_3m, eta=1.0),
    "dpmpp_sde": Sampler(dpmpp_sde, eta=1.0),
    "unipc": Sampler(unipc, eta=None),
    "lcm": Sampler(lcm, eta=1.0),
}


def get_sampler(name: str) -> Sampler:
    """The row of a name. Raises ValueError for an unknown one, listing the names there are."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join((*SAMPLERS, AUTO))}")
    return SAMPLERS[name]


def choose_sampler(name: str, steps: int, T: int) -> str:
    """The name, and for "auto" that of the sampler for so many steps: ddpm for all T levels of a schedule, else ddim.

    The ancestral chain is what the model was trained as, and needs all its steps; DDIM does with fewer.
    """
    return name if name != AUTO else "ddim" if steps < T else "ddpm"
