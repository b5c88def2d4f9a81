"""Guidance: each function turns a denoise into another denoise(x, sigma), so that no sampler hears of prompts."""

import math

import torch
from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise, Cond, Denoise, Prediction, check_prediction, skip_and_out


def classifier_free(
    denoise: Denoise,
    cond: Cond,
    uncond: Cond | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
    prediction: str | None = None,
) -> BoundDenoise:
    """Bind the conditioning: x0 = x0_uncond + scale (x0_cond - x0_uncond) (Ho & Salimans 2022, eq. 6; scale = 1 + w).

    Guiding x0 is guiding eps or v: at one (x, sigma) each is the same affine function of the other. Both halves go
    through the network in ONE call, uncond first; at scale 1 and outside the interval it is called on cond alone.

    cond, uncond: {"c_crossattn": (b, n, d), ...}, the same keys and shapes. A negative prompt is an uncond.
    interval: guide where low < sigma <= high (Kynkäänniemi et al. 2024).
    rescale: phi in [0, 1] of Lin et al. 2024, section 3.4, on the network's own output, so `prediction` must say which.

    Raises ValueError for a missing or mismatched uncond, an interval or rescale out of range, an unknown prediction.
    """
    low, high = interval
    if not 0 <= low <= high:
        raise ValueError(f"the guidance interval must be 0 <= low <= high in sigma, got {low} to {high}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be from 0 to 1, got {rescale}")
    if rescale > 0:
        check_prediction(prediction)
    if scale == 1:
        return lambda x, sigma: denoise(x, sigma, cond)
    if uncond is None:
        raise ValueError(f"guidance scale {scale} needs an unconditional or negative conditioning, got none")
    both = _concatenate(uncond, cond)

    def guided(x: Tensor, sigma: float) -> Prediction:
        if not low < sigma <= high:
            return denoise(x, sigma, cond)
        x0, log_variance = denoise(torch.cat([x, x]), sigma, both)  # (2b, ...)
        x0_uncond, x0_cond = x0.chunk(2)
        x0 = torch.lerp(x0_uncond, x0_cond, scale)
        if rescale > 0:
            x0 = _rescaled(x, x0, x0_cond, sigma, rescale, prediction)
        return Prediction(x0, None if log_variance is None else log_variance.chunk(2)[1])

    return guided


def _concatenate(uncond: Cond, cond: Cond) -> Cond:
    """Both conditionings on the batch axis, uncond first: (b, ...) and (b, ...) -> (2b, ...)."""
    shapes = [{key: tuple(value.shape) for key, value in c.items()} for c in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the two conditionings must have the same keys and shapes, got {shapes[0]} and {shapes[1]}")
    return {key: torch.cat([uncond[key], cond[key]]) for key in cond}


def _rescaled(x: Tensor, x0: Tensor, x0_cond: Tensor, sigma: float, phi: float, prediction: str) -> Tensor:
    """x0 of the network output phi (std_cond / std_guided) output + (1 - phi) output (Lin et al. 2024, eq. 15 and 16).

    The outputs are recovered from x0 = c_skip x + c_out output; std is over all axes but the batch. All (b, ...).
    """
    c_skip, c_out = skip_and_out(prediction, sigma)
    skipped = c_skip * x
    output, output_cond = (x0 - skipped) / c_out, (x0_cond - skipped) / c_out
    axes = tuple(range(1, x.ndim))
    ratio = output_cond.std(axes, keepdim=True) / output.std(axes, keepdim=True)  # (b, 1, ...)
    return skipped + c_out * (phi * ratio + (1 - phi)) * output


def keep(denoise: BoundDenoise, known: Tensor, mask: Tensor) -> BoundDenoise:
    """Inpainting with any model: x0 is `known` where the mask is 0, and what the network draws where it is 1.

    A sampler then carries the known part along known + sigma noise, with one and the same noise for eta = 0, so that it
    has the right noise at every level (in the end none) without being noised anew, as in CompVis's mask blending.
    known: (b, c, h, w). mask: broadcast to it, in [0, 1].
    """

    def kept(x: Tensor, sigma: float) -> Prediction:
        x0, log_variance = denoise(x, sigma)
        return Prediction(torch.lerp(known, x0, mask), log_variance)

    return kept


def clip_x0(denoise: BoundDenoise, limit: float = 1.0) -> BoundDenoise:
    """Clamp x0 to [-limit, limit]: for models of pixels in [-1, 1] (the clipping of Ho et al. 2020's code)."""
    if not limit > 0:
        raise ValueError(f"the limit of x0 must be above 0, got {limit}")

    def clipped(x: Tensor, sigma: float) -> Prediction:
        x0, log_variance = denoise(x, sigma)
        return Prediction(x0.clamp(-limit, limit), log_variance)

    return clipped


def dynamic_threshold(denoise: BoundDenoise, percentile: float = 0.995) -> BoundDenoise:
    """Clamp x0 to [-s, s] and divide by s (Saharia et al. 2022, section 2.3).

    s: that percentile (a fraction in (0, 1]) of |x0| within each picture, and at least 1. For pixels in [-1, 1].
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"the percentile must be above 0 and at most 1, got {percentile}")

    def thresholded(x: Tensor, sigma: float) -> Prediction:
        x0, log_variance = denoise(x, sigma)
        s = x0.abs().flatten(1).quantile(percentile, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))  # (b, 1, ...)
        return Prediction(x0.clamp(-s, s) / s, log_variance)

    return thresholded
