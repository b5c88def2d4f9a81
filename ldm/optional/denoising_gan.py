"""DenoisingGAN: a pixel diffusion model with few steps whose network predicts x0 from a latent z (Xiao et al. 2022).

Sampling uses the ancestral sampler, `ddpm`, at every timestep of a short schedule: x_{t-1} ~ q(. | x_t, G(x_t, t, z)),
with a fresh z at each step.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.batching import of_ends
from ldm.checks import Width
from ldm.diffusion.denoiser import Denoise, make_denoiser
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.latent_diffusion import Conditioning
from ldm.pixel_diffusion import PixelDiffusion


class DenoisingGAN(PixelDiffusion):
    """A `PixelDiffusion` that predicts x0 by a network that takes a latent, `ldm.optional.ddgan.Generator`.

    The arguments are PixelDiffusion's; the default schedule is the paper's, four steps of the VP SDE.
    """

    target = "ldm.optional.denoising_gan.DenoisingGAN"
    random_x0 = True

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        channels: Width,
        cond_stage_config: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        schedule = {"name": "vp", "T": 4} if schedule is None else schedule
        super().__init__(unet_config, channels, cond_stage_config, schedule, "x0", defaults, clip=False)

    @property
    def config(self) -> dict[str, Any]:
        config = self._config_without(
            first_stage_config=self.first_stage_config, scale_factor=1.0, concat=None, prediction="x0"
        )
        return config | {"channels": self.channels}

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning, z: Tensor | None = None) -> Tensor:
        """Return x0' (b, c, h, w) for noised images x at timesteps t (b,); z (b, latent_dim) is sampled by default."""
        if z is None:
            z = torch.randn(len(x), self.model.diffusion_model.latent_dim, device=x.device)
        return self.model(x, t, **cond, c_crossattn=z)

    def denoiser(self, seeds: Sequence[int] | None = None) -> Denoise:
        """Return the denoiser, which samples a fresh z at each call.

        Image i's z come from seeds[i] alone; by default all come from torch's global generator. Where guidance passes
        the same images under several conditions at once, each image has the same z in all.
        """
        noise = None
        if seeds is not None:
            noise = SeededNoise(
                [of_ends(latent_seed, seed) for seed in seeds], (self.model.diffusion_model.latent_dim,)
            )

        def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            if noise is None:
                return self.apply_model(x, t, cond)
            z = noise().to(x.device)
            return self.apply_model(x, t, cond, z.repeat(len(x) // len(z), 1))

        return make_denoiser(network, self.schedule, self.prediction, next(self.model.parameters()).dtype)


def latent_seed(seed: int) -> int:
    """Return the seed of an image's latents, whose stream differs from that of its noise, seeded with `seed` itself."""
    return int.from_bytes(hashlib.sha256(f"latent {seed}".encode()).digest()[:8], "big")
