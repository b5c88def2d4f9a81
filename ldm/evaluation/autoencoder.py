"""What a first stage loses: reconstruction error in decibels, and what its latents are like."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.evaluation.samples import pad, quantise, to_unit
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import SHIPPED, load_network


def psnr(reconstruction: Tensor, images: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, (n,), of pictures (n, c, h, w); the peak of pixels in [-1, 1] is 2.

    10 log10(peak^2 / mean squared error) of each picture; infinite for an exact copy.
    """
    error = (reconstruction.double() - images.double()).square().flatten(1).mean(dim=1)
    return 10 * (peak**2 / error).log10()


def pooled_psnr(reconstruction: Tensor, images: Tensor, peak: float = 2.0) -> float:
    """The same from the mean squared error over all pictures, which is lower than the mean of their ratios."""
    error = (reconstruction.double() - images.double()).square().mean().item()
    return 10 * math.log10(peak**2 / error) if error else math.inf


def load_autoencoder(path: str | Path | None, device: str = "auto") -> tuple[nn.Module, float]:
    """(first stage, scale factor of its latents) of a whole model or an autoencoder's own file; None is what ships.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds neither.
    """
    path = SHIPPED if path is None else path
    module = load_network(path, device)
    if isinstance(module, LatentDiffusion):
        return module.first_stage_model, module.scale_factor
    if not (hasattr(module, "encode") and hasattr(module, "decode")):
        raise ValueError(
            f"checkpoint {str(path)!r} holds a {type(module).__name__}: give a whole model or an autoencoder"
        )
    return module, 1.0


class Reconstruction(NamedTuple):
    """Reconstructed pictures, from the mean of each posterior, and what the latents are like."""

    pictures: Tensor  # uint8 (n, 28, 28)
    kl_per_dimension: float  # KL(posterior || N(0, 1)) in nats, mean over pictures and latent dimensions
    latent_std: list[float]  # of sampled latents as the UNet sees them (scaled), each channel


@torch.inference_mode()
def reconstruct(autoencoder: nn.Module, pictures: Tensor, batch_size: int, scale_factor: float = 1.0) -> Reconstruction:
    """Encode and decode uint8 pictures (n, 28, 28), padded to the 32 x 32 that the digit sets have.

    Args:
        autoencoder: with `encode(x) -> DiagonalGaussianDistribution` and `decode(z) -> x`, x in [-1, 1].
        scale_factor: what latents are multiplied by for the UNet.
    """
    device = next(autoencoder.parameters()).device
    decoded, kl = [], []
    sums, squares = 0.0, 0.0
    with tqdm(total=len(pictures), desc="reconstructing", unit="picture", mininterval=1) as bar:
        for batch in pictures.split(batch_size):
            posterior = autoencoder.encode(to_unit(pad(batch)).to(device))
            decoded.append(quantise(autoencoder.decode(posterior.mode()).cpu()))
            kl.append(posterior.kl().cpu().double() / posterior.mean[0].numel())
            mean, variance = posterior.mean.double(), posterior.var.double()  # (b, z, h, w)
            sums = sums + mean.mean(dim=(2, 3)).sum(dim=0)  # (z,)
            squares = squares + (mean.square() + variance).mean(dim=(2, 3)).sum(dim=0)
            bar.update(len(batch))
    n = len(pictures)
    deviation = (squares / n - (sums / n).square()).sqrt()
    return Reconstruction(torch.cat(decoded), torch.cat(kl).mean().item(), (scale_factor * deviation).tolist())
