"""Networks that are given their own previous x0 of the same images (Chen et al. 2022, arXiv 2208.04202)."""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Cond, Denoise, Prediction


def self_conditioned(denoise: Denoise, images: int = 0) -> Denoise:
    """Give a network its previous x0 of the same images as `c_concat`.

    The first call gets zeros; x0 is clamped as in training (`self_cond_input`). Wrap again for every batch.

    Args:
        images: The batch size b, or 0 where all calls have the same. Classifier-free guidance calls with 2b,
            unconditional first, or with b, conditional only: each half gets its own previous x0 where there was one,
            else the conditional one.
    """
    last: list[Tensor] = []  # the previous x0, (b or 2b, ...)

    def denoise_again(x: Tensor, sigma: float, cond: Cond) -> Prediction:
        previous = last.pop() if last else torch.zeros_like(x)
        if (len(previous), len(x)) == (images, 2 * images):
            previous = torch.cat([previous, previous])
        elif (len(previous), len(x)) == (2 * images, images):
            previous = previous[images:]
        found = denoise(x, sigma, {**cond, "c_concat": previous})
        last.append(self_cond_input(found.x0))
        return found

    return denoise_again


def self_cond_input(x0: Tensor) -> Tensor:
    """Return a predicted x0 as a self-conditioned network's input: without gradient, clamped to [-1, 1].

    Without the clamp it would be x / sqrt(ab) for an untrained eps network: thousands at the highest noise levels.
    """
    return x0.detach().clamp(-1, 1)
