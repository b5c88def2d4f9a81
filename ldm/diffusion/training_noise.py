"""The noise that images are noised with in training: plain, with an offset, or dealt out to the nearest images."""

import torch
from torch import Tensor


def training_noise(x0: Tensor, offset: float = 0.0, immiscible: bool = False) -> Tensor:
    """Unit normal noise for images or latents (b, c, h, w), from torch's own random state: (b, c, h, w).

    offset: deviation of further noise that is the same all over a channel, so that overall brightness is lost in the
        noise as details are, and learnt anew (Guttenberg 2023, "Diffusion with offset noise"; 0.1 there).
    immiscible: which image of the batch gets which noise is chosen so that their squared distances add up to the
        least (Li et al. 2024, arXiv 2406.12303, algorithm 1): all of it is as normal as before, and paths cross less.
    Raises ValueError for an offset below 0.
    """
    if not offset >= 0:
        raise ValueError(f"the noise's offset {offset} must not be below 0")
    noise = torch.randn_like(x0)
    if offset:
        noise += offset * torch.randn_like(x0[:, :, :1, :1])
    return noise[nearest(x0, noise)] if immiscible else noise


def nearest(x0: Tensor, noise: Tensor) -> Tensor:
    """Which noise each image gets, int64 (b,) on their device: the assignment of least total squared distance."""
    from scipy.optimize import linear_sum_assignment  # here: half a second that plain noise does not need

    # |x0 - noise|^2 = |x0|^2 - 2 <x0, noise> + |noise|^2, whose outer terms add up to the same whatever is assigned
    with torch.autocast(x0.device.type, enabled=False):  # half precision would deal by rounded distances
        products = x0.flatten(1).float() @ noise.flatten(1).float().T  # (b, b)
    _, chosen = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(chosen).to(x0.device)
