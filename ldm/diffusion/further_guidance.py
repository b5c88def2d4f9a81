"""Guidance besides the classifier-free one, and a limit of the result; `guidance.py` says how they add up."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.denoiser import BoundDenoise, Prediction, to_vp
from ldm.diffusion.schedule import Schedule

LogProb = Callable[[Tensor, float], Tensor]  # (x, sigma) -> log p(y | x) of each image, (b,), differentiable in x


def autoguidance(denoise: BoundDenoise, weak: BoundDenoise, scale: float) -> BoundDenoise:
    """Guide away from a weaker model: x0 + (scale - 1) (D(cond) - D_weak(cond)) (Karras et al. 2024, arXiv 2406.02507).

    `weak` is of a model with the same faults to a higher degree (smaller, or trained for fewer steps), under the same
    conditioning. Scale 1 means no guidance, and does not call it.
    """
    if scale == 1:
        return denoise

    return _add(denoise, lambda unguided, x, sigma: (scale - 1) * (unguided - weak(x, sigma).x0))


def _add(denoise: BoundDenoise, guidance: Callable[[Tensor, Tensor, float], Tensor]) -> BoundDenoise:
    """Add guidance(unguided x0, x, sigma) to x0."""

    def guided(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        unguided = found.x0 if found.unguided is None else found.unguided
        return found._replace(x0=found.x0 + guidance(unguided, x, sigma), unguided=unguided)

    return guided


def perturbed_attention(denoise: BoundDenoise, perturbed: BoundDenoise, scale: float) -> BoundDenoise:
    """Guide away from the network without self-attention: x0 + scale (D(cond) - D_perturbed(cond)).

    The paper's eps + s (eps - eps_perturbed) (Ahn et al. 2024, arXiv 2403.17377). `perturbed` is the same network under
    the same conditioning, with the identity as the attention map of some layers (`inference.guiders`). Scale 0 is off.
    """
    return autoguidance(denoise, perturbed, 1 + scale)


def classifier(denoise: BoundDenoise, log_prob: LogProb, scale: float) -> BoundDenoise:
    """Guide towards what a classifier of noisy images recognises as y: x0 + scale sigma^2 grad_x log p(y | x).

    This adds scale times the classifier's score to the model's own, (x0 - x) / sigma^2. On eps it is Dhariwal & Nichol
    2021, algorithm 2: eps - scale sqrt(1 - ab) grad log p(y | x_vp), so it works with every sampler. An ancestral
    step's mean moves by scale beta_t / sqrt(alpha_t) grad log p(y | x_vp), where alpha_t = 1 - beta_t is that of
    the two noise levels visited: their algorithm 1 with the large variance beta_t, except for the factor
    1 / sqrt(alpha_t), which rescales to the next noise level.

    The gradient is computed even under no_grad and inference_mode. Scale 0 does not call the classifier.
    """
    if scale == 0:
        return denoise

    return _add(denoise, lambda unguided, x, sigma: (scale * sigma**2) * _gradient(log_prob, x, sigma))


def _gradient(log_prob: LogProb, x: Tensor, sigma: float) -> Tensor:
    """Return grad_x log_prob(x, sigma), for each image its own: (b, ...)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()  # cloned, because tensors made in inference mode have no gradient
        return torch.autograd.grad(log_prob(x, sigma).sum(), x)[0]


def noisy_log_prob(network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, classes: Tensor) -> LogProb:
    """Make log p(class | x) from a classifier of noisy images.

    Args:
        network: (x_vp (b, ...), t (b,)) -> logits (b, n).
        schedule: The classifier's own; the model's may be another.
        classes: int64 (b,), or () for all images; n stands for no class, whose log probability is 0.
    """

    def log_prob(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(x),), schedule.t_at(sigma), dtype=x.dtype, device=x.device)
        logits = network(to_vp(x, sigma), t)
        chosen = classes.clone().to(x.device).expand(len(x))  # cloned: it may have been made in inference mode
        known = chosen < logits.shape[1]
        log_probs = logits.log_softmax(dim=1).gather(1, torch.where(known, chosen, 0)[:, None])[:, 0]
        return torch.where(known, log_probs, 0)

    return log_prob


def dynamic_threshold(denoise: BoundDenoise, percentile: float = 0.995, limit: float | None = 1.0) -> BoundDenoise:
    """Clamp x0 to [-s, s] and scale the result to [-limit, limit] (Saharia et al. 2022, section 2.3).

    Args:
        percentile: s is this percentile (a fraction in (0, 1]) of each image's |x0|, and at least the limit.
        limit: The range of clean data: 1 for pixels in [-1, 1]. Latents have no fixed range: with None the limit is the
            same percentile of each image's unguided |x0|, and an x0 that no guidance has changed stays.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"the percentile must be above 0 and at most 1, got {percentile}")
    if limit is not None and not limit > 0:
        raise ValueError(f"the limit of x0 must be above 0, got {limit}")

    def range_of(x0: Tensor) -> Tensor:
        return x0.abs().flatten(1).quantile(percentile, dim=1).view(-1, *[1] * (x0.ndim - 1))  # (b, 1, ...)

    def thresholded(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        own = range_of(found.x0)
        if limit is not None:
            bound = torch.full_like(own, limit)
        elif found.unguided is not None:
            bound = range_of(found.unguided)
        else:
            return found
        s = torch.maximum(own, bound).clamp(min=1e-8)  # an x0 of zeros stays zero
        return found._replace(x0=found.x0.clamp(-s, s) * (bound / s))

    return thresholded


def inpaint(denoise: BoundDenoise, known: Tensor, mask: Tensor) -> BoundDenoise:
    """Inpaint with any model: x0 is `known` where the mask is 0, and the model's prediction where it is 1.

    A sampler then moves the known part along known + sigma noise, for eta = 0 with one fixed noise, so that it
    always has the right noise level and ends without noise. CompVis's mask blending adds new noise to it in every
    step instead. The mask is in [0, 1], broadcastable to `known` (b, c, h, w).
    """

    def inpainted(x: Tensor, sigma: float) -> Prediction:
        found = denoise(x, sigma)
        return found._replace(x0=torch.lerp(known, found.x0, mask))

    return inpainted
