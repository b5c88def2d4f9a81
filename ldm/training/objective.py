"""The options with which every stage trains a denoiser, checked in one place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.loss import loss_weight, mean_error
from ldm.diffusion.schedule import training_timesteps
from ldm.diffusion.training_noise import training_noise
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.share import BatchShare
from ldm.util import call_with


class Objective:
    """A model's loss with the options of a configuration, and the noise levels and noise that it is taken at.

    Args:
        model: its `loss` is what a training step minimises.
        error: of the prediction, l2 or l1.
        weight: arguments of `loss_weight`, such as `{"name": "min_snr"}`; None weighs all noise levels alike.
        noise: arguments of `training_noise`: offset, immiscible. None is plain noise.
        timesteps: arguments of `training_timesteps`: the distribution of noise levels. None is uniform.
        extras: further arguments of the model's `loss`, such as `bound_weight`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> None:
        self.model, self.error, self.extras = model, error, extras
        self.weight = weight or {"name": "none"}
        self.noise = {} if noise is None else noise
        self.timesteps = timestep_settings(timesteps, model.schedule.T)
        mean_error(error, torch.zeros(1, 1), torch.zeros(1, 1))  # raises for an unknown name
        ab = model.schedule.alphas_cumprod[:1]
        call_with("weight", loss_weight, self.weight, prediction=model.prediction, alphas_cumprod_t=ab)
        call_with("noise", training_noise, self.noise, x0=torch.zeros(2, 1, 1, 1))

    def sample_timesteps(self, z: Tensor, share: BatchShare, parts: int = 1) -> Tensor:
        """Return the timesteps that latents z (b, ...) are trained at: int64 (b,).

        parts: batches that z consists of, such as one of the subject's and one of class images.
        """
        options: dict[str, Any] = {
            "batch": len(z) * share.count,
            "T": self.model.schedule.T,
            "generator": share.generator(),
        }
        return share.cut(training_timesteps(**options, **self.timesteps), parts).to(z.device)

    def sample_noise(self, z: Tensor, share: BatchShare, parts: int = 1) -> Tensor:
        """Return the noise for latents z, of so many batches: (b, ...)."""
        noise = training_noise(share.joined(z, parts), generator=share.generator(z.device), **self.noise)
        return share.cut(noise, parts)

    def losses(
        self, z: Tensor, cond: Conditioning, t: Tensor, noise: Tensor, share: BatchShare, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of each of the latents z (b, ...), noised by `noise` at timesteps t (b,): (b,)."""
        random = {"generator": share.generator()} if getattr(self.model, "self_condition", False) else {}
        return self.model.loss(z, cond, t, noise, self.error, self.weight, mask, **self.extras, **random)


def loss_mask(batch: Mapping[str, Any], z: Tensor) -> Tensor | None:
    """Return the weights of latents z (b, c, h, w) by their images' masks, (b, 1, h, w); None where they have none.

    A weight is the mean of the mask over a latent's part of the image.
    """
    mask = batch.get("mask")
    return None if mask is None else F.interpolate(mask, z.shape[-2:], mode="area")


def timestep_settings(given: Mapping[str, Any] | None, T: int) -> dict[str, Any]:
    """Return the checked arguments of `training_timesteps` for T noise levels; `uniform` for None."""
    settings = {"name": "uniform"} if given is None else given
    call_with("timesteps", training_timesteps, settings, batch=1, T=T, generator=torch.Generator())
    return dict(settings)
