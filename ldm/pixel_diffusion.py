"""Diffusion in pixels (Ho et al. 2020, https://arxiv.org/abs/2006.11239): latent diffusion without a first stage."""

from collections.abc import Mapping
from typing import Any

from ldm.latent_diffusion import LatentDiffusion


class PixelDiffusion(LatentDiffusion):
    """A LatentDiffusion whose latents are the pixels, conditioned on classes or on nothing.

    Args:
        unet_config: the network: (x_t (b, c, h, w), t (b,), and y or context where there is conditioning) -> eps, x0 or
            v of x's shape; with a `downsampling` of which sizes must be multiples.
        channels: of a picture.
        cond_stage_config, schedule, prediction, defaults: as in LatentDiffusion.
        clip: keep x0 within [-1, 1] while drawing, as pixels are (Ho et al. 2020, in their code).
    """

    target = "ldm.pixel_diffusion.PixelDiffusion"

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        channels: int,
        cond_stage_config: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        prediction: str = "eps",
        defaults: Mapping[str, Any] | None = None,
        clip: bool = True,
    ) -> None:
        first_stage = {"target": "ldm.models.identity.IdentityFirstStage", "params": {"channels": channels}}
        super().__init__(unet_config, first_stage, cond_stage_config, schedule, prediction, defaults=defaults)
        self.clip = 1.0 if clip else None
        self.config = {
            "unet_config": unet_config,
            "channels": channels,
            "cond_stage_config": cond_stage_config,
            "schedule": self.schedule_params,
            "prediction": prediction,
            "defaults": self.defaults,
            "clip": clip,
        }
