"""Guidance: functions that turn a denoise into another denoise(x, sigma), so that samplers know nothing of prompts.

    denoise = classifier_free(model.denoiser(), cond, uncond, scale)     first: binds the conditioning
    denoise = autoguidance(denoise, weak, scale)                         then those of `further_guidance.py`, in any
    denoise = perturbed_attention(denoise, perturbed, scale)             order: they add up
    denoise = classifier(denoise, log_prob, scale)
    denoise = dynamic_threshold(denoise)                                 last: these limit or replace the result
    denoise = inpaint(denoise, known, mask)

With D(cond) for the denoised prediction under a conditioning, and for each guidance a scale of its own, together

    x0 = D(cond) + (scale - 1) (D(cond) - D(uncond))                     classifier_free
                 + (scale - 1) (D(cond) - D_weak(cond))                  autoguidance
                 + scale (D(cond) - D_perturbed(cond))                   perturbed_attention
                 + scale sigma^2 grad log p(y | x)                       classifier

D(cond) is evaluated once: `Prediction.unguided` hands it on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ldm.arrays import Tensor, library
from ldm.diffusion.denoiser import BoundDenoise, Cond, Denoise, Prediction, check_prediction, scalings

# (denoise, cond, prompts) -> denoise: guidance to add, given the conditioning of these prompts (texts or classes)
Guide = Callable[[BoundDenoise, Cond, Sequence[Any]], BoundDenoise]


def classifier_free(
    denoise: Denoise,
    cond: Cond,
    uncond: Cond | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
    prediction: str | None = None,
) -> BoundDenoise:
    """Bind the conditioning: x0 = D(uncond) + scale (D(cond) - D(uncond)) (Ho & Salimans 2022, eq. 6; scale = 1 + w).

    Guiding x0 is guiding eps or v, because at one (x, sigma) each is the same affine function of the other. Both
    predictions come from one network call on a batch of 2b, unconditional first. At scale 1 and outside the interval
    the network is called on cond only.

    Args:
        cond: The conditioning of b images, {"c_crossattn": (b, n, d), ...}.
        uncond: The null condition, or that of a negative prompt: the same keys and shapes.
        scale: 0 is unconditional, 1 conditional.
        interval: (low, high) in sigma; guidance is on where low < sigma <= high, see `in_interval`.
        rescale: phi in [0, 1] of Lin et al. 2024, section 3.4. It acts on the network's own output.
        prediction: What that output is: eps, x0, v or flow; needed for rescale only.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be from 0 to 1, got {rescale}")
    if rescale > 0:
        check_prediction(prediction)

    def conditional(x: Tensor, sigma: float) -> Prediction:
        return denoise(x, sigma, cond)

    if scale == 1:
        return in_interval(interval, conditional, conditional)
    if uncond is None:
        raise ValueError(f"guidance scale {scale:g} needs a null or negative condition; use scale 1")
    both = _concatenate(uncond, cond)

    def guided(x: Tensor, sigma: float) -> Prediction:
        found, b = denoise(library(x).concatenate([x, x]), sigma, both), len(x)  # (2b, ...)
        x0_uncond, x0_cond = found.x0[:b], found.x0[b:]
        x0 = x0_cond + (scale - 1) * (x0_cond - x0_uncond)
        if rescale > 0:
            x0 = _rescaled(x, x0, x0_cond, sigma, rescale, prediction)
        share = None if found.variance_share is None else found.variance_share[b:]
        return Prediction(x0, share, x0_cond)

    return in_interval(interval, guided, conditional)


def _concatenate(uncond: Cond, cond: Cond) -> Cond:
    """Join two conditionings on the batch axis, uncond first: (b, ...) and (b, ...) -> (2b, ...)."""
    shapes = [{key: tuple(value.shape) for key, value in c.items()} for c in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cond and uncond must have the same keys and shapes, got {shapes[0]} and {shapes[1]}")
    return {key: library(cond[key]).concatenate([uncond[key], cond[key]]) for key in cond}


def _rescaled(x: Tensor, x0: Tensor, x0_cond: Tensor, sigma: float, phi: float, prediction: str | None) -> Tensor:
    """Return the x0 of phi (std_cond / std_guided) output + (1 - phi) output (Lin et al. 2024, eq. 15 and 16).

    The network's outputs are recovered from x0 = c_skip x + c_out output; std is over all axes but the batch's.
    """
    c_skip, c_out = scalings(prediction, sigma)
    skipped = c_skip * x
    output, output_cond = (x0 - skipped) / c_out, (x0_cond - skipped) / c_out
    axes, std = tuple(range(1, x.ndim)), library(x).std
    ratio = std(output_cond, axes, keepdims=True, correction=1) / std(output, axes, keepdims=True, correction=1)
    return skipped + c_out * (phi * ratio + (1 - phi)) * output


def in_interval(interval: tuple[float, float], inside: BoundDenoise, outside: BoundDenoise) -> BoundDenoise:
    """Call `inside` where low < sigma <= high, `outside` elsewhere: guidance interval (Kynkäänniemi et al. 2024)."""
    low, high = interval
    if not 0 <= low <= high:
        raise ValueError(f"the guidance interval must be 0 <= low <= high in sigma, got {low} to {high}")

    def chosen(x: Tensor, sigma: float) -> Prediction:
        return (inside if low < sigma <= high else outside)(x, sigma)

    return chosen


def clip_x0(denoise: BoundDenoise, limit: float = 1.0) -> BoundDenoise:
    """Clamp x0 to [-limit, limit], for models of pixels in [-1, 1] (as in Ho et al. 2020's code)."""
    if not limit > 0:
        raise ValueError(f"the limit of x0 must be above 0, got {limit}")

    def clipped(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        return found._replace(x0=found.x0.clip(-limit, limit))

    return clipped
