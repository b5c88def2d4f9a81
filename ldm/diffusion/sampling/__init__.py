"""Samplers: a function that makes one denoising step, the loop over noise levels, and the table of names.

Sampling starts with noise x at sigmas[0] and moves x along decreasing noise levels to an image. Every step evaluates
denoise(x, sigma), the model's prediction of the clean image, and moves x a little towards it. `first_order` explains
the step that all other samplers refine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ldm.arrays import Tensor, float32_or_wider
from ldm.diffusion.denoiser import BoundDenoise
from ldm.diffusion.sampling.first_order import Noise, Point, Points, euler
from ldm.diffusion.sampling.multistep import deis, dpmpp_2m, dpmpp_3m, lms, plms, unipc
from ldm.diffusion.sampling.second_order import dpm2, heun
from ldm.diffusion.sampling.stochastic import ddpm, ddpm_large, dpmpp_sde, lcm

# (denoise, points, sigma_next, eta, noise) -> x at sigma_next
StepFunction = Callable[[BoundDenoise, Points, float, float, Noise], Tensor]
Sigmas = Tensor | Sequence[float]
AUTO = "auto"  # see choose_sampler
HISTORY = 4  # points that a step function gets; Adams-Bashforth of order 4 uses all


class Step(NamedTuple):
    """The state after denoising step `index`: x (b, ...) at noise level `sigma`, and the x0 (b, ...) it predicted."""

    index: int
    sigma: float
    x: Tensor
    x0: Tensor


def sample(
    denoise: BoundDenoise, x: Tensor, sigmas: Sigmas, step: StepFunction = euler, eta: float = 0.0, noise: Noise = None
) -> Iterator[Step]:
    """Move x from noise level sigmas[0] to sigmas[-1], yielding a Step after each of the len(sigmas) - 1 steps.

    It is a generator, so that progress bars, previews and early stopping are the caller's. Bad arguments raise
    ValueError at the call, not at the first step.

    Args:
        x: x0 + sigmas[0] noise, (b, ...): `denoiser.from_vp` of unit normal noise. The state is float32 or wider.
        sigmas: Descending (`schedule.sampling_sigmas`). The last may be 0, or equal to the one before it.
        eta: The share of fresh noise in each step, 0 (deterministic) to 1 (ancestral).
        noise: () -> unit normal noise (b, ...); called a fixed number of times in each step.
    """
    levels = _checked(sigmas)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta {eta} needs a source of noise, got None")
    return _walk(denoise, float32_or_wider(x), levels, step, eta, noise)


def _checked(sigmas: Sigmas) -> list[float]:
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or min(levels[:-1]) <= 0 or levels[-1] < 0:
        raise ValueError(f"sampling needs two or more sigmas, above 0 except for the last, got {levels}")
    if not (all(above > below for above, below in pairwise(levels[:-1])) and levels[-1] <= levels[-2]):
        raise ValueError(f"the sigmas must descend, got {levels}")
    return levels


def _walk(denoise, x, levels, step, eta, noise) -> Iterator[Step]:
    points = []
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        found = denoise(x, sigma)
        points = [*points[1 - HISTORY :], Point(sigma, x, found.x0, found.variance_share)]
        if sigma_next < sigma:
            x = step(denoise, points, sigma_next, eta, noise)
        yield Step(index, sigma_next, x, points[-1].x0)


def invert(denoise: BoundDenoise, x: Tensor, sigmas: Sigmas, corrections: int = 0) -> Iterator[Step]:
    """Invert DDIM: move x up from sigmas[-1] to the noise at sigmas[0] from which `ddim` on these sigmas returns to x.

    Euler's method in the other direction (Dhariwal & Nichol 2021, appendix F; Song et al. 2021, section 4.3). eps is
    predicted at the lower end of a step, or at its upper end if the lower sigma is 0. Each correction predicts it again
    at the upper end reached so far: a fixed-point iteration to the exact inverse of the step.

    Args:
        x: (b, ...) at noise level sigmas[-1]: an image's latents where that is about 0.
        sigmas: As for `sample`, descending.
        corrections: The number of fixed-point iterations a step, each with another call of denoise.
    """
    x = float32_or_wider(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(reversed(_checked(sigmas)))):
        x_next, level = x, sigma if sigma > 0 else sigma_next
        for _ in range(1 + corrections):
            x0 = denoise(x_next, level).x0
            x_next, level = x + (sigma_next - sigma) * Point(level, x_next, x0).eps, sigma_next
        x = x_next
        yield Step(index, sigma_next, x, x0)


@dataclass(frozen=True)
class Sampler:
    """A row of the table: a step function and its defaults. Calling it is `sample` with them.

    Attributes:
        eta: The default share of fresh noise; None for a step that never adds noise.
        spacing: The default argument of `schedule.sampling_sigmas`.
    """

    step: StepFunction
    eta: float | None = 0.0
    spacing: str = "trailing"

    def __call__(
        self, denoise: BoundDenoise, x: Tensor, sigmas: Sigmas, eta: float | None = None, noise: Noise = None
    ) -> Iterator[Step]:
        if self.eta is None and eta is not None and eta != 0:
            others = ", ".join(name for name, row in SAMPLERS.items() if row.eta is not None)
            raise ValueError(f"this sampler adds no noise: eta must be 0, got {eta}; samplers with eta: {others}")
        eta = self.eta if eta is None else eta
        return sample(denoise, x, sigmas, self.step, 0.0 if eta is None else eta, noise)


SAMPLERS = {
    "ddim": Sampler(euler),
    "ddpm": Sampler(ddpm, eta=1.0),
    "ddpm_large": Sampler(ddpm_large, eta=1.0),
    "euler": Sampler(euler),  # the same as ddim, and euler_a as ddpm, under the names of k-diffusion
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


def sampler_named(name: str) -> tuple[str, str | None]:
    """Return the table's name of a sampler, and the spacing in the given one: "DPM++ 2M Karras" is dpmpp_2m, karras.

    It reads the names of AUTOMATIC1111's web UI, ComfyUI and k-diffusion; an unknown name comes back as it is.
    """
    if name in SAMPLERS or name == AUTO:
        return name, None
    from ldm.diffusion.sampling.names import other_name  # only other programs' names need it

    key, spacing = other_name(name)
    return (key, spacing) if key in SAMPLERS or key == AUTO else (name, None)


def get_sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose from {', '.join((*SAMPLERS, AUTO))}")
    return SAMPLERS[name]


def choose_sampler(name: str, steps: int, T: int) -> str:
    """Return the table's name, where "auto" means ddpm for all T denoising steps of a schedule and ddim for fewer.

    DDPM's ancestral chain is the process that the model was trained to reverse, and needs all of its steps.
    """
    name, _ = sampler_named(name)
    return name if name != AUTO else "ddim" if steps < T else "ddpm"
