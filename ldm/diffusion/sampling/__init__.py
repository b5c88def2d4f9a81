"""Samplers: step functions over denoise(x, sigma), one driver, and the table of names."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, ddim, ddpm_large

# (denoise, x, sigma, sigma_next, eta, noise) -> (x at sigma_next, x0)
StepFunction = Callable[[BoundDenoise, Tensor, float, float, float, Noise | None], tuple[Tensor, Tensor]]


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
    step: StepFunction = ddim,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """Walk x from sigmas[0] to sigmas[-1], yielding a Step after each of the len(sigmas) - 1 steps.

    x: (b, ...) = x0 + sigmas[0] noise; see denoiser.from_vp to start from unit noise and to_vp to end above sigma 0.
    It is kept in float32 or wider. sigmas: the last may be 0, the others not.
    eta: 0 to 1, the share of fresh noise. noise: () -> (b, ...), drawn once in each step that adds some.

    Raises ValueError (at the call, not at the first step) for eta out of range, eta without noise, and bad sigmas.
    """
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or min(levels[:-1]) <= 0 or levels[-1] < 0:
        raise ValueError(f"a run needs two or more sigmas, above 0 save for the last, got {levels}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} needs a source of noise, got none")
    return _walk(denoise, x.to(torch.promote_types(x.dtype, torch.float32)), levels, step, eta, noise)


def _walk(denoise, x, levels, step, eta, noise) -> Iterator[Step]:
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x, x0 = step(denoise, x, sigma, sigma_next, eta, noise)
        yield Step(index, sigma_next, x, x0)


@dataclass(frozen=True)
class Sampler:
    """A row of the table: the step function and its defaults. Calling it is `sample` with them.

    spacing, final_sigma: for schedule.sampling_sigmas. eta: for the step.
    """

    step: StepFunction
    spacing: str = "trailing"
    final_sigma: str = "zero"
    eta: float = 0.0

    def __call__(
        self,
        denoise: BoundDenoise,
        x: Tensor,
        sigmas: Tensor | Sequence[float],
        eta: float | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        return sample(denoise, x, sigmas, self.step, self.eta if eta is None else eta, noise)


SAMPLERS = {
    "ddim": Sampler(ddim),
    "ddpm": Sampler(ddim, eta=1.0),
    "ddpm_large": Sampler(ddpm_large, eta=1.0),
}


def get_sampler(name: str) -> Sampler:
    """The row of a name. Raises ValueError for an unknown one, listing the names there are."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
