"""LatentDiffusion: first stage + text + UNet + schedule (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

pixels [-1, 1] --encode--> latents (unit variance) --noise, denoise under text--> latents --decode--> pixels
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.batching import batches
from ldm.checkpoint.file import file_hash
from ldm.conditioning.prompt import count_chunks, encode_prompts
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import BoundDenoise, Denoise, from_vp, make_denoiser, target, to_vp
from ldm.diffusion.sampling import Step, get_sampler
from ldm.diffusion.sampling.noise import PictureNoise
from ldm.diffusion.schedule import Schedule, make_schedule, q_sample, sampling_sigmas
from ldm.images import to_pil
from ldm.source import Pictures, Source, steps_taken
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
        if c_concat is not None and c_concat.shape[-2:] != x.shape[-2:]:
            sizes = [f"{t.shape[-1]} x {t.shape[-2]}" for t in (c_concat, x)]
            raise ValueError(
                f"the picture that the model is given is {sizes[0]} latents in size, and it draws {sizes[1]}"
            )
        if c_concat is not None:
            x = torch.cat([x, c_concat.to(x.dtype)], dim=1)
        return self.diffusion_model(x, t, context=c_crossattn, y=c_adm)


# What a UNet's input holds beside the noised latents: see `LatentDiffusion.concat_picture`.
CONCATS = (None, "mask_latents", "latents_mask", "latents")


class LatentDiffusion(nn.Module):
    """A text-to-image model, or one conditioned on classes or pictures, or on nothing.

    Args:
        unet_config, first_stage_config, cond_stage_config: `{"target": class, "params": {...}}` of the three networks;
            no cond_stage_config for an unconditional model.
        schedule: arguments of `make_schedule`, e.g. `{"name": "cosine"}`.
        prediction: what the UNet predicts: "eps", "x0" or "v".
        scale_factor: latents are multiplied by it after encoding, so that they have unit variance.
        defaults: this model's own sampling settings: height, width (pixels), steps, scale, sampler, spacing, interval.
        concat: what the UNet is given of a picture to change, in its input channels: "mask_latents" (Stable Diffusion's
            inpainting), "latents_mask" (that of Rombach et al. 2022), "latents" (InstructPix2Pix), or nothing.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | None,
        schedule: Mapping[str, Any] | None = None,
        prediction: str = "eps",
        scale_factor: float = 1.0,
        defaults: Mapping[str, Any] | None = None,
        concat: str | None = None,
    ) -> None:
        super().__init__()
        if concat not in CONCATS:
            raise ValueError(f"concat {concat!r} is unknown: it is one of {', '.join(map(str, CONCATS))}")
        unknown = sorted(set(defaults or ()) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"defaults has unknown settings {unknown}: a model's own settings are {list(DEFAULTS)}")
        self.model = DiffusionWrapper(instantiate_network(unet_config))
        self.first_stage_model = instantiate_network(first_stage_config)
        self.cond_stage_model = None if cond_stage_config is None else instantiate_network(cond_stage_config)
        self.concat = concat
        self.schedule_params = dict(schedule or {"name": "scaled_linear"})
        self.prediction = prediction
        self.scale_factor = scale_factor
        self.path: Path | None = None  # the file or folder it was loaded from
        self.notes: list[str] = []  # what loading recognised in that file, or had to assume
        self.guide: guidance.Guide | None = None  # for `generate`, where it is given none
        self.changes: list[str] = []  # parts and settings other than that file's, LoRAs, learned words
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.channels = self.first_stage_model.embed_dim
        self.image_channels = self.first_stage_model.encoder.conv_in.in_channels
        self.downsampling = self.first_stage_model.downsampling  # pixels per latent
        self.config = {  # what a checkpoint stores to rebuild this object
            "unet_config": unet_config,
            "first_stage_config": first_stage_config,
            "cond_stage_config": cond_stage_config,
            "schedule": self.schedule_params,
            "prediction": prediction,
            "scale_factor": scale_factor,
            "defaults": self.defaults,
            "concat": concat,
        }

    @cached_property
    def schedule(self) -> Schedule:
        return make_schedule(**self.schedule_params)  # on first use: a model may be built on the meta device

    @cached_property
    def hash(self) -> str:
        """The first ten hexadecimal digits of the checkpoint's SHA-256 (`file_hash`); "" if unsaved."""
        return "" if self.path is None else file_hash(self.path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, images: Tensor, generator: torch.Generator | None = None, mode: bool = False) -> Tensor:
        """Pixels (b, c, h, w) in [-1, 1] -> scaled latents (b, z, h/f, w/f): a sample of the posterior, or its mode."""
        code = self.first_stage_model.encode(images.to(self.device))
        if isinstance(code, Tensor):  # a VQ autoencoder's latents, which have no posterior
            return self.scale_factor * code
        return self.scale_factor * (code.mode() if mode else code.sample(generator))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, z, h/f, w/f) -> pixels (b, c, h, w), nominally in [-1, 1]."""
        dtype = next(self.first_stage_model.parameters()).dtype
        return self.first_stage_model.decode((latents / self.scale_factor).to(dtype)).float()

    @property
    def null(self) -> Any:
        """The prompt (or class ...) that says nothing, which guidance steers away from; None if there is none."""
        return None if self.cond_stage_model is None else self.cond_stage_model.null

    def condition(
        self, prompts: Sequence[Any], chunks: int | None = None, clip_skip: int = 1, plain: bool = False
    ) -> Conditioning:
        """Prompts, or whatever else the model is conditioned on, -> the conditioning dict; empty if unconditional.

        The other arguments are those of `conditioning.prompt.encode_prompts`, which reads long and weighted prompts.
        """
        if self.cond_stage_model is None:
            return {}
        prompts = prompts.to(self.device) if isinstance(prompts, Tensor) else prompts
        return encode_prompts(self.cond_stage_model, prompts, chunks, clip_skip, plain)

    def concat_picture(self, images: Tensor, mask: Tensor) -> Conditioning:
        """A picture to change, as a model with `concat` is given it.

        images: (b, c, h, w) in [-1, 1]. mask: (b, 1, h, w), 1 where something new is to be drawn and 0 where the
        picture is to stay; InstructPix2Pix has none and ignores it. Returns {"c_concat": (b, channels, h/f, w/f)}: the
        latents (posterior mode) of the picture without its masked pixels, and the mask at their size, nearest pixel.
        """
        if self.concat == "latents":
            return {"c_concat": self.encode(images, mode=True) / self.scale_factor}  # as Brooks et al. 2023 trained it
        blank = 0.0 if self.concat == "mask_latents" else -1.0  # grey in Stable Diffusion, black before it
        latents = self.encode(torch.where(mask < 0.5, images, blank), mode=True)
        mask = nn.functional.interpolate((mask >= 0.5).to(latents), size=latents.shape[-2:])  # (b, 1, h/f, w/f)
        parts = [mask, latents] if self.concat == "mask_latents" else [latents, 2 * mask - 1]
        return {"c_concat": torch.cat(parts, dim=1)}

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

    @property
    def multiple(self) -> int:
        """Height and width of pictures, in pixels, are multiples of this."""
        return self.downsampling * self.model.diffusion_model.downsampling

    def latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        """(z, h, w) of the latents of a picture of that size in pixels; ValueError if the model cannot make it."""
        for name, size in (("height", height), ("width", width)):
            if size < self.multiple or size % self.multiple:
                raise ValueError(
                    f"{name} {size} cannot be made by this model: use a positive multiple of {self.multiple}"
                )
        return self.channels, height // self.downsampling, width // self.downsampling

    def usual_strength(self, masked: bool) -> float:
        """The strength with which `generate` draws over a picture: 1 where it is told which parts to keep, or how."""
        return 1.0 if masked or self.concat == "latents" else 0.75

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Any],
        negative: Any = None,
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
        clip_skip: int = 1,
        plain: bool = False,
        image: Pictures | None = None,
        mask: Pictures | None = None,
        strength: float | None = None,
        guide: guidance.Guide | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture per prompt; what is None is the model's own default.

        Args:
            prompts: texts; classes or pictures for models conditioned on those.
            negative: what to steer away from: one prompt, or one per picture.
            scale: of classifier-free guidance; 1 is none and halves the work.
            eta: share of fresh noise in each step, 0 to 1.
            seed, seeds: picture i is drawn with the noise of seed + i, or of seeds[i]: the same alone and in any batch.
            height, width: in pixels; with an `image`, its own.
            batch_size: pictures at a time; bounds memory and changes nothing else.
            fixed_code: every picture starts from picture 0's noise.
            interval: (low, high) in sigma outside which all guidance is off.
            rescale: phi of guidance rescale, 0 to 1.
            clip_skip: which of CLIP's layers is read, counted back from the model's own, 1.
            plain: take prompts literally; otherwise brackets in them are weights (`ldm.conditioning.prompt`).
            image, mask: draw over this picture, or one for each prompt; only where the mask is white, if there is one
                (`ldm.source.Source`).
            strength: share of the steps that are taken (`steps_taken`), from the `image` noised to the first of their
                levels; 0 gives it back through the first stage, 1 takes all. Its default is `usual_strength`.
            guide: guidance besides the classifier-free one (`ldm.inference.guides`): guide(denoise, cond) -> denoise;
                the model's `guide` if not given.
            callback: is given every `Step` (index, sigma, x, x0: latents of the current batch) as it is made.

        Raises ValueError for a setting that is out of range or a size that the model cannot make.
        """
        own = self.defaults
        row = get_sampler(given(sampler, own["sampler"]))
        spacing = given(given(spacing, own["spacing"]), row.spacing)
        sigmas = sampling_sigmas(self.schedule, given(steps, own["steps"]), spacing, row.final_sigma).tolist()
        source = None
        if image is not None:
            source = Source(image, mask, len(prompts), self.image_channels, self.multiple)
            strength = given(strength, self.usual_strength(mask is not None))
            sigmas = sigmas[len(sigmas) - 1 - steps_taken(strength, len(sigmas) - 1) :]
            for name, asked, own_size in (("height", height, source.height), ("width", width, source.width)):
                if asked not in (None, own_size):
                    raise ValueError(f"{name} {asked} is not that of the picture, {own_size}: resize the picture first")
            height, width = source.pixels.shape[-2:]
        elif mask is not None or strength is not None:
            raise ValueError("a mask and a strength are for drawing over a picture, and no image is given")
        seeds = list(range(seed, seed + len(prompts)) if seeds is None else seeds)
        scale, negative = given(scale, own["scale"]), given(negative, self.null)
        if scale != 1 and (negative is None or self.cond_stage_model is None):
            raise ValueError(f"scale {scale} has nothing to steer away from: this model is drawn with scale 1")
        negatives = negative if isinstance(negative, list | tuple | Tensor) else [negative] * len(prompts)
        if batch_size < 1 or not len(prompts) == len(seeds) == len(negatives):
            raise ValueError(
                f"{len(prompts)} prompts need as many seeds and negative prompts, and batches of at least 1; "
                f"got {len(seeds)} seeds, {len(negatives)} negative prompts, batch_size {batch_size}"
            )
        run = _Run(
            sampler=partial(row, sigmas=sigmas, eta=eta),
            sigmas=sigmas,
            strength=strength,
            size=self.latent_size(given(height, own["height"]), given(width, own["width"])),
            scale=scale,
            interval=tuple(given(given(interval, own["interval"]), guidance.EVERYWHERE)),
            rescale=rescale,
            start_seed=seeds[0] if fixed_code and seeds else None,
            guide=given(guide, self.guide),
            callback=callback,
        )
        lengths = count_chunks(self.cond_stage_model, prompts, plain)
        if scale != 1:
            lengths = list(map(max, lengths, count_chunks(self.cond_stage_model, negatives, plain)))
        images = []
        for batch in batches(lengths, batch_size):
            part = None if source is None else source[batch]
            encode = partial(self.condition, chunks=lengths[batch.start], clip_skip=clip_skip, plain=plain)
            cond, uncond = encode(prompts[batch]), None if scale == 1 else encode(negatives[batch])
            images += to_pil(self._draw(run, cond, uncond, seeds[batch], part))
        return images

    def _draw(
        self, run: "_Run", cond: Conditioning, uncond: Conditioning | None, seeds: list[int], source: Source | None
    ) -> Tensor:
        """One batch of `generate`: its pixels (b, c, h, w) in [-1, 1], or uint8 where there is a source."""
        noise = PictureNoise(seeds, run.size)
        start = noise()
        if run.start_seed is not None:
            start = PictureNoise([run.start_seed], run.size)().expand_as(start)
        start = start.to(self.device)
        if self.concat is not None:
            picture = self._concat(source, run.size, len(seeds))
            cond, uncond = cond | picture, None if uncond is None else uncond | picture
        denoise = guidance.classifier_free(
            self.denoiser(), cond, uncond, run.scale, run.interval, run.rescale, self.prediction
        )
        if run.guide is not None:
            denoise = guidance.within(run.interval, run.guide(denoise, cond), denoise)
        x = from_vp(start, run.sigmas[0])
        if source is not None:
            x, denoise = self._over(source, x, start, run, denoise)
        for step in run.sampler(denoise, x, noise=noise) if len(run.sigmas) > 1 else ():
            if run.callback is not None:
                run.callback(step)
            x = step.x
        pixels = self.decode(to_vp(x, run.sigmas[-1]))
        return pixels if source is None else source.finish(pixels)

    def _concat(self, source: Source | None, size: tuple[int, int, int], count: int) -> Conditioning:
        """What a model with `concat` is given of the source; with text alone, that there is none of it."""
        if source is None and self.concat == "latents":
            return {"c_concat": torch.zeros(count, *size, device=self.device)}
        if source is None:
            height, width = (self.downsampling * side for side in size[1:])
            images, mask = torch.zeros(1, self.image_channels, height, width), None
        else:
            images, mask = source.pixels, source.mask
        picture = self.concat_picture(images, torch.ones_like(images[:, :1]) if mask is None else mask)
        return {key: value.expand(count, -1, -1, -1) for key, value in picture.items()}

    def _over(
        self, source: Source, x: Tensor, start: Tensor, run: "_Run", denoise: BoundDenoise
    ) -> tuple[Tensor, BoundDenoise]:
        """(x, denoise) for drawing over a source, where x is the source at the first level that is denoised.

        With all steps to take, nothing of it is in the x of what is drawn anew: x stays noise alone under a mask, and
        where the model is given the whole picture in its input.
        """
        known, mask = self.encode(source.pixels, mode=True).float(), source.mask
        noised = known + run.sigmas[0] * start
        if mask is not None:
            mask = nn.functional.adaptive_max_pool2d(mask, run.size[1:]).to(x)  # a latent is new if any pixel of it is
            if self.concat in (None, "latents"):  # the others are told of the mask
                denoise = guidance.keep(denoise, known, mask)
        if run.strength < 1:
            return noised, denoise
        if mask is None:
            return x if self.concat == "latents" else noised, denoise
        return torch.lerp(noised, x, mask), denoise


class _Run(NamedTuple):
    """What all batches of a `generate` have in common."""

    sampler: Callable[..., Iterator[Step]]
    sigmas: list[float]
    strength: float | None
    size: tuple[int, int, int]
    scale: float
    interval: tuple[float, float]
    rescale: float
    start_seed: int | None  # of the start noise that all pictures share
    guide: guidance.Guide | None
    callback: Callable[[Step], None] | None


def given(value: Any, default: Any) -> Any:
    """`value`, or the default where it is None (0 and "" are values)."""
    return default if value is None else value
