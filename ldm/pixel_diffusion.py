"""Diffusion in pixels (Ho et al. 2020, https://arxiv.org/abs/2006.11239): latent diffusion without a first stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.checks import Width
from ldm.diffusion.bound import step_bits
from ldm.diffusion.denoiser import (
    Denoise,
    make_denoiser,
    network_input,
    predicted_x0,
    split_variance,
)
from ldm.diffusion.loss import prediction_loss
from ldm.diffusion.schedule import q_sample
from ldm.diffusion.self_conditioning import self_cond_input, self_conditioned
from ldm.latent_diffusion import Conditioning, LatentDiffusion

SELF_COND_PROB = 0.5  # share of training steps in which a network is given its own first x0 (Chen et al. 2022)


class PixelDiffusion(LatentDiffusion):
    """A LatentDiffusion whose latents are the pixels, conditioned on classes or on nothing.

    Args:
        unet_config: the network: (x_t (b, c, h, w), t (b,), and y or context where there is conditioning) -> eps, x0,
            v or flow, of x's shape; with a `downsampling` of which sizes must be multiples.
        channels: of the images.
        clip: clamp x0 to [-1, 1] in sampling (Ho et al. 2020, in their code); a number is another limit.
        learned_variance: the network also predicts the variance of `ddpm`'s steps, in as many output channels again
            (Nichol & Dhariwal 2021, section 3.1).
        self_condition: the network also takes its last x0, in as many input channels again (Chen et al. 2022,
            section 3).
    """

    target = "ldm.pixel_diffusion.PixelDiffusion"
    clip: float | None = None  # the limit of |x0|

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        channels: Width,
        cond_stage_config: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        prediction: str = "eps",
        defaults: Mapping[str, Any] | None = None,
        clip: bool | float = True,
        learned_variance: bool = False,
        self_condition: bool = False,
    ) -> None:
        first_stage = {"target": "ldm.models.identity.IdentityFirstStage", "params": {"channels": channels}}
        super().__init__(unet_config, first_stage, cond_stage_config, schedule, prediction, defaults=defaults)
        self.clip = float(clip) or None
        self.learned_variance, self.self_condition = learned_variance, self_condition

    @property
    def config(self) -> dict[str, Any]:
        config = self._config_without(first_stage_config=self.first_stage_config, scale_factor=1.0, concat=None)
        return config | {
            "channels": self.channels,
            "clip": True if self.clip == 1 else self.clip or False,
            "learned_variance": self.learned_variance,
            "self_condition": self.self_condition,
        }

    def _config_without(self, **fixed: Any) -> dict[str, Any]:
        """Return LatentDiffusion's `config` without arguments that are fixed here. ValueError where one was changed."""
        config = super().config
        for name, value in fixed.items():
            if config.pop(name) != value:
                raise ValueError(f"a {type(self).__name__} always has {name} {value}: set it back to save the model")
        return config

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Return the network's prediction (b, c, h, w) for x_vp at timesteps t, and the variance's share."""
        output = self.apply_model(*network_input(self.prediction, x, t, self.schedule), cond).float()
        return split_variance(output, x.shape[1]) if self.learned_variance else (output, None)

    def loss(
        self,
        z: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        bound_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss as LatentDiffusion does: (b,).

        Where the variance is learned, this is L_hybrid = L_simple + bound_weight L_vlb (Nichol & Dhariwal 2021, eq. 16)
        with T times the bound's term of one noise level for L_vlb, through which the prediction gets no gradient.
        """
        x = q_sample(z, t, noise, self.schedule)
        if self.self_condition:
            cond = {**cond, "c_concat": self.self_cond_x0(x, t, cond, generator)}
        predicted, share = self.predict(x, t, cond)
        ab = self.schedule.alphas_cumprod[t.cpu()]
        losses = prediction_loss(self.prediction, predicted, z, noise, ab, error, weight, mask)
        if share is not None:
            x0 = predicted_x0(self.prediction, predicted.detach(), x, self.schedule.sigmas[t.cpu()])
            bits = step_bits(z, x, t, x0, share, self.schedule, mask)
            losses = losses + bound_weight * self.schedule.T * bits
        return losses

    @torch.no_grad()
    def self_cond_x0(
        self, x: Tensor, t: Tensor, cond: Conditioning, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the x0 that a training step is conditioned on: the network's own with SELF_COND_PROB, else zeros."""
        zeros = torch.zeros_like(x)
        if torch.rand((), generator=generator) >= SELF_COND_PROB:
            return zeros
        predicted, _ = self.predict(x, t, {**cond, "c_concat": zeros})
        return self_cond_input(predicted_x0(self.prediction, predicted, x, self.schedule.sigmas[t.cpu()]))

    def denoiser(self, seeds: Sequence[int] | None = None) -> Denoise:
        """Return `denoise` as LatentDiffusion does. seeds: as many as images; a self-conditioned network needs them."""
        dtype = next(self.model.parameters()).dtype
        denoise = make_denoiser(self.apply_model, self.schedule, self.prediction, dtype, self.learned_variance)
        return self_conditioned(denoise, len(seeds or ())) if self.self_condition else denoise
