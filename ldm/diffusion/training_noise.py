"""The noise of training: plain, with an offset, or assigned to the nearest images of the batch."""

from typing import Any

import torch
from torch import Tensor


def training_noise(
    x0: Tensor, offset: float = 0.0, immiscible: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Sample noise for images or latents x0 (b, c, h, w), from torch's global generator.

    Args:
        offset: Standard deviation of further noise, constant over each channel of an image, so that the overall
            brightness is destroyed as details are, and learned (Guttenberg 2023, "Diffusion with offset noise"; 0.1).
        immiscible: Assign the noise to the images of the batch so that the sum of squared distances is minimal (Li et
            al. 2024, arXiv 2406.12303, algorithm 1): the noise of a batch stays normal, and paths cross less.
        generator: On their device, instead of that one.
    """
    if not offset >= 0:
        raise ValueError(f"noise offset {offset} must not be below 0")
    options: dict[str, Any] = {"dtype": x0.dtype, "device": x0.device, "generator": generator}
    noise = torch.randn(x0.shape, **options)
    if offset:
        noise += offset * torch.randn(x0[:, :, :1, :1].shape, **options)
    return noise[assign_noise(x0, noise)] if immiscible else noise


def assign_noise(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the index of each image's noise, int64 (b,), in the assignment of minimal total squared distance."""
    from scipy.optimize import linear_sum_assignment  # only here: it takes half a second to import

    # |x0 - noise|^2 = |x0|^2 - 2 <x0, noise> + |noise|^2; the outer terms have the same sum for any assignment
    with torch.autocast(x0.device.type, enabled=False):  # half precision would compare rounded distances
        products = x0.flatten(1).float() @ noise.flatten(1).float().T  # (b, b)
    _, chosen = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(chosen).to(x0.device)
