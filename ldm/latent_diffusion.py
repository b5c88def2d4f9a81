"""LatentDiffusion: first stage + text + UNet + schedule (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

pixels [-1, 1] --encode--> latents (unit variance) --noise, denoise under text--> latents --decode--> pixels
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.diffusion import guidance
from ldm.diffusion.denoiser import Denoise, from_vp, make_denoiser, target, to_vp
from ldm.diffusion.sampling import Step, get_sampler
from ldm.diffusion.sampling.noise import PictureNoise
from ldm.diffusion.schedule import Schedule, make_schedule, q_sample, sampling_sigmas
from ldm.images import to_pil
from ldm.util import instantiate_network

Conditioning = dict[str, Tensor]
# What a model without settings of its own is drawn with; spacing None is the sampler's, interval None everywhere.
DEFAULTS = {
    "height": 512,
    "width": 512,
    "steps": 50,
    "scale": 7.5,
    "sampler": "ddim",
    "spacing": None,
    "interval": None,
}


class DiffusionWrapper(nn.Module):
    """Hands the conditioning dict to the UNet, which checkpoints know as `model.diffusion_model`."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        if c_concat is not None:
            x = torch.cat([x, c_concat], dim=1)
        return self.diffusion_model(x, t, context=c_crossattn, y=c_adm)


class LatentDiffusion(nn.Module):
    """A text-to-image model.

    Args:
        unet_config, first_stage_config, cond_stage_config: `{"target": class, "params": {...}}` of the three networks.
        schedule: arguments of `make_schedule`, e.g. `{"name": "cosine"}`.
        prediction: what the UNet predicts: "eps", "x0" or "v".
        scale_factor: latents are multiplied by it after encoding, so that they have unit variance.
        defaults: this model's own sampling settings: height, width (pixels), steps, scale, sampler, spacing, interval.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        schedule: Mapping[str, Any] | None = None,
        prediction: str = "eps",
        scale_factor: float = 1.0,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(defaults or ()) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"defaults has unknown settings {unknown}: a model's own settings are {list(DEFAULTS)}")
        self.model = DiffusionWrapper(instantiate_network(unet_config))
        self.first_stage_model = instantiate_network(first_stage_config)
        self.cond_stage_model = instantiate_network(cond_stage_config)
        self.schedule_params = dict(schedule or {"name": "scaled_linear"})
        self.prediction = prediction
        self.scale_factor = scale_factor
        self.path: Path | None = None  # the file it was loaded from
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.channels = self.first_stage_model.embed_dim
        self.downsampling = self.first_stage_model.downsampling  # pixels per latent
        self.config = {  # what a checkpoint stores to rebuild this object
            "unet_config": unet_config,
            "first_stage_config": first_stage_config,
            "cond_stage_config": cond_stage_config,
            "schedule": self.schedule_params,
            "prediction": prediction,
            "scale_factor": scale_factor,
            "defaults": self.defaults,
        }

    @cached_property
    def schedule(self) -> Schedule:
        return make_schedule(**self.schedule_params)  # on first use: a model may be built on the meta device

    @cached_property
    def hash(self) -> str:
        """The first ten hexadecimal digits of the checkpoint's SHA-256, as A1111's users know models; "" if unsaved."""
        if self.path is None:
            return ""
        with open(self.path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()[:10]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (b, c, h, w) in [-1, 1] -> scaled latents (b, z, h/f, w/f), sampled from the posterior."""
        return self.scale_factor * self.first_stage_model.encode(images).sample(generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, z, h/f, w/f) -> pixels (b, c, h, w), nominally in [-1, 1]."""
        dtype = next(self.first_stage_model.parameters()).dtype
        return self.first_stage_model.decode((latents / self.scale_factor).to(dtype)).float()

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> the conditioning dict; the empty prompt is the unconditional one."""
        return self.cond_stage_model(prompts)

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The UNet's own prediction (eps, x0 or v) for noised latents x (b, z, h, w) at timesteps t (b,) in 0..T-1."""
        return self.model(x, t, **cond)

    def loss(self, z: Tensor, cond: Conditioning, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each prediction (Rombach et al. 2022, eq. 3): z (b, c, h, w), t (b,) -> (b,)."""
        wanted = target(self.prediction, z, noise, self.schedule.alphas_cumprod[t.cpu()])
        predicted = self.apply_model(q_sample(z, t, noise, self.schedule), t, cond)
        return (predicted.float() - wanted).square().flatten(1).mean(1)

    def denoiser(self) -> Denoise:
        """`denoise(x, sigma, cond) -> Prediction`, in the frame x = x0 + sigma * noise."""
        return make_denoiser(self.apply_model, self.schedule, self.prediction, next(self.model.parameters()).dtype)

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """(z, h, w) of the latents of a picture of that size in pixels; ValueError if the model cannot make it."""
        multiple = self.downsampling * self.model.diffusion_model.downsampling
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                raise ValueError(f"{name} {size} cannot be made by this model: use a positive multiple of {multiple}")
        return self.channels, height // self.downsampling, width // self.downsampling

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None = None,
        steps: int | None = None,
        scale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        fixed_code: bool = False,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        callback: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture per prompt; what is None is the model's own default.

        Args:
            negative: what to steer away from: one prompt, or one per picture.
            scale: of classifier-free guidance; 1 is none and halves the work.
            eta: share of fresh noise in each step, 0 to 1.
            seed, seeds: picture i is drawn with the noise of seed + i, or of seeds[i]: the same alone and in any batch.
            height, width: in pixels.
            batch_size: pictures at a time; bounds memory and changes nothing else.
            fixed_code: every picture starts from picture 0's noise.
            interval: (low, high) in sigma outside which guidance is off.
            rescale: phi of guidance rescale, 0 to 1.
            callback: is given every `Step` (index, sigma, x, x0: latents of the current batch) as it is made.

        Raises ValueError for a setting that is out of range or a size that the model cannot make.
        """
        own = self.defaults
        row = get_sampler(given(sampler, own["sampler"]))
        spacing = given(given(spacing, own["spacing"]), row.spacing)
        sigmas = sampling_sigmas(self.schedule, given(steps, own["steps"]), spacing, row.final_sigma).tolist()
        size = self.latent_size(given(height, own["height"]), given(width, own["width"]))
        scale = given(scale, own["scale"])
        interval = tuple(given(given(interval, own["interval"]), (0.0, math.inf)))
        seeds = list(range(seed, seed + len(prompts)) if seeds is None else seeds)
        negatives = [given(negative, "")] * len(prompts) if negative is None or isinstance(negative, str) else negative
        if batch_size < 1 or not len(prompts) == len(seeds) == len(negatives):
            raise ValueError(
                f"{len(prompts)} prompts need as many seeds and negative prompts, and batches of at least 1; "
                f"got {len(seeds)} seeds, {len(negatives)} negative prompts, batch_size {batch_size}"
            )
        images = []
        for first in range(0, len(prompts), batch_size):
            batch = slice(first, first + batch_size)
            cond = self.condition(prompts[batch])
            uncond = None if scale == 1 else self.condition(negatives[batch])
            denoise = guidance.classifier_free(self.denoiser(), cond, uncond, scale, interval, rescale, self.prediction)
            noise = PictureNoise(seeds[batch], size)
            start = noise()
            if fixed_code:
                start = PictureNoise(seeds[:1], size)().expand_as(start)
            x = from_vp(start.to(self.device), sigmas[0])
            for step in row(denoise, x, sigmas, eta, noise):
                if callback is not None:
                    callback(step)
            images += to_pil(self.decode(to_vp(step.x, sigmas[-1])))
        return images


def given(value: Any, default: Any) -> Any:
    """`value`, or the default where it is None (0 and "" are values)."""
    return default if value is None else value
