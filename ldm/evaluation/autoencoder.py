"""What a first stage loses: the reconstruction error in decibels, and the statistics of its latents."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.evaluation.samples import pad, quantise, to_unit
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import SHIPPED, load_network
from ldm.util import progress_bar


def load_autoencoder(path: str | Path | None, device: str = "auto") -> tuple[Any, float]:
    """Load a first stage from a model's file or its own; return it and the scale factor of its latents.

    Args:
        path: None for the model that ships.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds neither a model nor a first stage.
    """
    path = SHIPPED if path is None else path
    module = load_network(path, device)
    if isinstance(module, LatentDiffusion):
        return module.first_stage_model, module.scale_factor
    if not (hasattr(module, "encode") and hasattr(module, "decode")):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(module).__name__}: give a model or an autoencoder")
    return module, 1.0


class Reconstruction(NamedTuple):
    """Images decoded from the mean of each posterior, and statistics of the latents."""

    images: Tensor  # uint8 (n, 28, 28)
    kl_per_dimension: float | None  # KL(posterior || N(0, 1)) in nats, mean over images and dimensions; None of a VQ
    latent_std: list[float]  # of sampled latents as the UNet sees them (scaled), for each channel


@torch.inference_mode()
def reconstruct(autoencoder: Any, images: Tensor, batch_size: int, scale_factor: float = 1.0) -> Reconstruction:
    """Encode and decode uint8 images (n, 28, 28), padded to the 32 x 32 of the digit sets.

    Args:
        autoencoder: with `encode(x) -> DiagonalGaussianDistribution`, or latents where it is a VQ autoencoder, and
            `decode(z) -> x`, x in [-1, 1].
        scale_factor: what latents are multiplied by for the UNet.
    """
    device = next(autoencoder.parameters()).device
    decoded, kl, moments = [], [], []
    with progress_bar(leave=True, total=len(images), desc="reconstructing", unit="image", mininterval=1) as bar:
        for batch in images.split(batch_size):
            code = autoencoder.encode(to_unit(pad(batch)).to(device))
            mean, variance = (code, torch.zeros_like(code)) if isinstance(code, Tensor) else (code.mean, code.var)
            decoded.append(quantise(autoencoder.decode(mean).cpu()))
            if code is not mean:
                kl.append(code.kl().cpu().double() / mean[0].numel())
            mean, variance = mean.double(), variance.double()  # (b, z, h, w)
            moments.append(torch.stack([mean, mean.square() + variance]).mean(dim=(3, 4)))  # (2, b, z)
            bar.update(len(batch))
    first, second = torch.cat(moments, dim=1).mean(dim=1)
    deviation = (second - first.square()).sqrt()
    mean_kl = torch.cat(kl).mean().item() if kl else None
    return Reconstruction(torch.cat(decoded), mean_kl, (scale_factor * deviation).tolist())
