"""Guidance: each function turns a denoise into another denoise(x, sigma), so that no sampler hears of prompts.

    denoise = classifier_free(model.denoiser(), cond, uncond, scale)     binds the conditioning; first
    denoise = autoguidance(denoise, weak, scale)                         these add up, in any order
    denoise = perturbed_attention(denoise, perturbed, scale)
    denoise = classifier(denoise, log_prob, scale)
    denoise = dynamic_threshold(denoise)                                 these limit what came of it; last
    denoise = keep(denoise, known, mask)

With all of them x0 = c + (scale - 1) (c - uncond) + (scale - 1) (c - weak) + scale (c - perturbed) + scale sigma^2 grad
log p(y | x), each scale its own and c what the network says under the conditioning, which is evaluated once: Prediction
carries it as `unguided`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise, Cond, Denoise, Prediction, check_prediction, skip_and_out, to_vp
from ldm.diffusion.schedule import Schedule

EVERYWHERE = (0.0, math.inf)  # the interval that leaves nothing out

# (denoise, cond, prompts): more guidance, for that conditioning of those prompts (texts, classes ...)
Guide = Callable[[BoundDenoise, Cond, Sequence[Any]], BoundDenoise]
LogProb = Callable[[Tensor, float], Tensor]  # (x, sigma) -> log p(y | x) of each image, (b,), differentiable in x


def classifier_free(
    denoise: Denoise,
    cond: Cond,
    uncond: Cond | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    rescale: float = 0.0,
    prediction: str | None = None,
) -> BoundDenoise:
    """Bind the conditioning: x0 = x0_uncond + scale (x0_cond - x0_uncond) (Ho & Salimans 2022, eq. 6; scale = 1 + w).

    Guiding x0 is guiding eps or v: at one (x, sigma) each is the same affine function of the other. Both halves go
    through the network in ONE call, uncond first; at scale 1 and outside the interval it is called on cond alone.

    cond, uncond: {"c_crossattn": (b, n, d), ...}, the same keys and shapes. A negative prompt is an uncond.
    interval: as for `within`.
    rescale: phi in [0, 1] of Lin et al. 2024, section 3.4, on the network's own output, so `prediction` must say which.

    Raises ValueError for a missing or mismatched uncond, an interval or rescale out of range, an unknown prediction.
    """
    _check_interval(interval)
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale must be from 0 to 1, got {rescale}")
    if rescale > 0:
        check_prediction(prediction)

    def plain(x: Tensor, sigma: float) -> Prediction:
        return denoise(x, sigma, cond)

    if scale == 1:
        return plain
    if uncond is None:
        raise ValueError(f"guidance scale {scale} needs an unconditional or negative conditioning, got none")
    both = _concatenate(uncond, cond)

    def guided(x: Tensor, sigma: float) -> Prediction:
        found = denoise(torch.cat([x, x]), sigma, both)  # (2b, ...)
        x0_uncond, x0_cond = found.x0.chunk(2)
        x0 = torch.lerp(x0_uncond, x0_cond, scale)
        if rescale > 0:
            x0 = _rescaled(x, x0, x0_cond, sigma, rescale, prediction)
        share = None if found.variance_share is None else found.variance_share.chunk(2)[1]
        return Prediction(x0, share, x0_cond)

    return within(interval, guided, plain)


def _concatenate(uncond: Cond, cond: Cond) -> Cond:
    """Both conditionings on the batch axis, uncond first: (b, ...) and (b, ...) -> (2b, ...)."""
    shapes = [{key: tuple(value.shape) for key, value in c.items()} for c in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the two conditionings must have the same keys and shapes, got {shapes[0]} and {shapes[1]}")
    return {key: torch.cat([uncond[key], cond[key]]) for key in cond}


def _rescaled(x: Tensor, x0: Tensor, x0_cond: Tensor, sigma: float, phi: float, prediction: str | None) -> Tensor:
    """x0 of the network output phi (std_cond / std_guided) output + (1 - phi) output (Lin et al. 2024, eq. 15 and 16).

    The outputs are recovered from x0 = c_skip x + c_out output; std is over all axes but the batch. All (b, ...).
    """
    c_skip, c_out = skip_and_out(prediction, sigma)
    skipped = c_skip * x
    output, output_cond = (x0 - skipped) / c_out, (x0_cond - skipped) / c_out
    axes = tuple(range(1, x.ndim))
    ratio = output_cond.std(axes, keepdim=True) / output.std(axes, keepdim=True)  # (b, 1, ...)
    return skipped + c_out * (phi * ratio + (1 - phi)) * output


def autoguidance(denoise: BoundDenoise, weak: BoundDenoise, scale: float) -> BoundDenoise:
    """Away from a weaker model: x0 + (scale - 1) (x0_cond - x0_weak) (Karras et al. 2024, arXiv 2406.02507: their w).

    weak: a model of the same x0 under the same conditioning, with the same faults in a higher degree: smaller, trained
    more shortly. It is called once, on x; at scale 1 not at all.
    """
    if scale == 1:
        return denoise

    def guided(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        unguided = found.x0 if found.unguided is None else found.unguided
        x0 = found.x0 + (scale - 1) * (unguided - weak(x, sigma).x0)
        return found._replace(x0=x0, unguided=unguided)

    return guided


def perturbed_attention(denoise: BoundDenoise, perturbed: BoundDenoise, scale: float) -> BoundDenoise:
    """Away from the network without self-attention: x0 + scale (x0_cond - x0_perturbed) (Ahn et al. 2024).

    perturbed: the same network under the same conditioning, with the identity as the attention map of some layers
    (`inference.guides`). arXiv 2403.17377, whose eps + s (eps - eps_perturbed) this is; autoguidance from scale 1 on.
    """
    return autoguidance(denoise, perturbed, 1 + scale)


def classifier(denoise: BoundDenoise, log_prob: LogProb, scale: float) -> BoundDenoise:
    """Towards what a classifier of noisy images takes for y: x0 + scale sigma^2 grad_x log p(y | x).

    Classifier guidance adds scale times the classifier's score to the model's own, (x0 - x) / sigma^2. In the
    variance-preserving frame that is eps - scale sqrt(1 - ab) grad log p(y | x_vp) (Dhariwal & Nichol 2021, algorithm
    2), so that every sampler is guided by it. An ancestral step's mean moves by scale beta_t / sqrt(alpha_t) grad log
    p(y | x_vp), with alpha_t = 1 - beta_t between the two levels visited: their algorithm 1 with the large variance
    beta_t for Sigma, but for 1 / sqrt(alpha_t), by which the next level's frame is the larger one.

    log_prob: (x, sigma) -> log p(y | x) of each image, (b,), for x = x0 + sigma noise; `noisy_log_prob` makes one.
    Gradients are computed even where they are off. At scale 0 the classifier is not called.
    """
    if scale == 0:
        return denoise

    def guided(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        unguided = found.x0 if found.unguided is None else found.unguided
        return found._replace(x0=found.x0 + (scale * sigma**2) * _slope(log_prob, x, sigma), unguided=unguided)

    return guided


def _slope(log_prob: LogProb, x: Tensor, sigma: float) -> Tensor:
    """The gradient of log_prob in x, each image's by its own: (b, ...)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # cloned: a tensor made in inference mode never has a gradient
        return torch.autograd.grad(log_prob(x, sigma).sum(), x)[0]


def noisy_log_prob(network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, classes: Tensor) -> LogProb:
    """log p(class | x) by network(x_vp, t) -> logits (b, n), trained on this schedule, be it another than the model's.

    classes: int64 (b,), one for each image, or () for all; n, which is none of them, says nothing: probability 1.
    """

    def log_prob(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(x),), schedule.t_at(sigma), dtype=x.dtype, device=x.device)
        logits = network(to_vp(x, sigma), t)
        chosen = classes.clone().to(x.device).expand(len(x))  # cloned: it may have been made in inference mode
        known = chosen < logits.shape[1]
        log_probs = logits.log_softmax(dim=1).gather(1, torch.where(known, chosen, 0)[:, None])[:, 0]
        return torch.where(known, log_probs, 0)

    return log_prob


def within(interval: tuple[float, float], inside: BoundDenoise, outside: BoundDenoise) -> BoundDenoise:
    """`inside` where low < sigma <= high, `outside` elsewhere: guidance in an interval (Kynkäänniemi et al. 2024).

    Raises ValueError for an interval (low, high) that is none.
    """
    _check_interval(interval)
    low, high = interval

    def chosen(x: Tensor, sigma: float) -> Prediction:
        return (inside if low < sigma <= high else outside)(x, sigma)

    return chosen


def _check_interval(interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low <= high:
        raise ValueError(f"the guidance interval must be 0 <= low <= high in sigma, got {low} to {high}")


def keep(denoise: BoundDenoise, known: Tensor, mask: Tensor) -> BoundDenoise:
    """Inpainting with any model: x0 is `known` where the mask is 0, and what the network draws where it is 1.

    A sampler then carries the known part along known + sigma noise, with one and the same noise for eta = 0, so that it
    has the right noise at every level (in the end none) without being noised anew, as in CompVis's mask blending.
    known: (b, c, h, w). mask: broadcast to it, in [0, 1].
    """

    def kept(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        return found._replace(x0=torch.lerp(known, found.x0, mask))

    return kept


def clip_x0(denoise: BoundDenoise, limit: float = 1.0) -> BoundDenoise:
    """Clamp x0 to [-limit, limit]: for models of pixels in [-1, 1] (the clipping of Ho et al. 2020's code)."""
    if not limit > 0:
        raise ValueError(f"the limit of x0 must be above 0, got {limit}")

    def clipped(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        return found._replace(x0=found.x0.clamp(-limit, limit))

    return clipped


def dynamic_threshold(denoise: BoundDenoise, percentile: float = 0.995, limit: float | None = 1.0) -> BoundDenoise:
    """Clamp x0 to [-s, s] and scale that to [-limit, limit] (Saharia et al. 2022, section 2.3).

    s: that percentile (a fraction in (0, 1]) of |x0| within each image, and at least the limit.
    limit: how far x0 reaches by nature: 1 for pixels in [-1, 1]. Latents have no such bound: with None the limit is the
    same percentile of each image's unguided x0, and what no guidance has moved stays as it is.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"the percentile must be above 0 and at most 1, got {percentile}")
    if limit is not None and not limit > 0:
        raise ValueError(f"the limit of x0 must be above 0, got {limit}")

    def reach(x0: Tensor) -> Tensor:
        return x0.abs().flatten(1).quantile(percentile, dim=1).view(-1, *[1] * (x0.ndim - 1))  # (b, 1, ...)

    def thresholded(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        own = reach(found.x0)
        if limit is not None:
            bound = torch.full_like(own, limit)
        elif found.unguided is not None:
            bound = reach(found.unguided)
        else:
            return found
        s = torch.maximum(own, bound).clamp(min=1e-8)  # all zeros stay zeros
        return found._replace(x0=found.x0.clamp(-s, s) * (bound / s))

    return thresholded
