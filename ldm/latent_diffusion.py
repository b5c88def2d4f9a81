"""LatentDiffusion: first stage + text + UNet + schedule (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

pixels [-1, 1] --encode--> latents (unit variance) --noise, denoise under text--> latents --decode--> pixels
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.file import file_hash
from ldm.conditioning.prompt import encode_prompts
from ldm.diffusion.denoiser import Denoise, make_denoiser, network_input
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.schedule import Schedule, make_schedule, q_sample
from ldm.generation import generate, latent_size
from ldm.settings import of_model
from ldm.util import call_with, instantiate_network

if TYPE_CHECKING:
    from ldm.conditioning.sizes import Sizes
    from ldm.init_image import Images

Conditioning = dict[str, Tensor]
DECODED_ALONE = 128**2  # pixels of an image from which on a CPU decodes one at a time, as fast, in the memory of one
# What a UNet has in its input channels beside the noised latents: see `ldm.init_image.concat_condition`.
CONCATS = (None, "mask_latents", "latents_mask", "latents")


class DiffusionWrapper(nn.Module):
    """Pass the conditioning dict to the UNet, whose name in checkpoints is `model.diffusion_model`."""

    def __init__(self, diffusion_model: Any) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.autocast = False  # compute in `torch.autocast`'s precision, and the text encoder with it

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
            raise ValueError(f"c_concat is {sizes[0]} latents in size, and x is {sizes[1]}: they must have one size")
        if c_concat is not None:
            x = torch.cat([x, c_concat.to(x.dtype)], dim=1)
        given = {name: value for name, value in (("context", c_crossattn), ("y", c_adm)) if value is not None}
        with torch.autocast(x.device.type) if self.autocast else nullcontext():
            return self.diffusion_model(x, t, **given)


def require(part: str, found: Any, *names: str) -> None:
    """Raise ValueError if a part of a model lacks what the rest uses of it (docs/how-to/own_modules.md)."""
    if lacking := [name for name in names if not hasattr(found, name)]:
        raise ValueError(f"the {part} {type(found).__name__} lacks {', '.join(lacking)}, which every {part} has")
    if not isinstance(factor := getattr(found, "downsampling", 1), int) or factor < 1:
        raise ValueError(f"the {part} {type(found).__name__} has the downsampling {factor!r}: it must be an integer")


class LatentDiffusion(nn.Module):
    """A text-to-image model, or one conditioned on classes or images, or on nothing.

    Args:
        unet_config, first_stage_config, cond_stage_config: `{"target": class, "params": {...}}` of the three networks;
            cond_stage_config is None for an unconditional model.
        schedule: arguments of `make_schedule`, e.g. `{"name": "cosine"}`.
        prediction: what the UNet predicts: "eps", "x0", "v" or "flow".
        scale_factor: factor of the latents after encoding, which gives them unit variance.
        defaults: this model's own sampling settings: height, width (pixels), steps, scale, sampler, spacing, interval,
            final_sigma.
        concat: what the UNet has of an init image in its input channels: "mask_latents" (Stable Diffusion's
            inpainting), "latents_mask" (that of Rombach et al. 2022), "latents" (InstructPix2Pix), or None.
    """

    first_stage_model: Any  # of the classes that the configurations name
    cond_stage_model: Any
    target = "ldm.latent_diffusion.LatentDiffusion"  # the class that a checkpoint names
    random_x0 = False  # whether the network has noise of its own, so that two predictions differ by it

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
        self.model = DiffusionWrapper(instantiate_network(unet_config))
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        require("first stage", self.first_stage_model, "embed_dim", "image_channels", "downsampling")
        self.unet_config, self.first_stage_config = unet_config, first_stage_config
        self.cond_stage_config = cond_stage_config
        self.schedule_params = schedule or {"name": "scaled_linear"}
        self._schedule: tuple[Mapping[str, Any], Schedule] | None = None  # the parameters that it was made of, and it
        if not 0 < float(scale_factor) < float("inf"):
            raise ValueError(f"scale_factor {scale_factor} must be a number above 0: latents are divided by it")
        self.prediction, self.scale_factor, self.concat = prediction, scale_factor, concat
        self.path: Path | None = None  # the file or folder it was loaded from
        self.notes: list[str] = []  # what loading recognised in that file, or had to assume
        self.changes: list[Any] = []  # to it since that file, each recorded by what made it: see `ldm.changes`
        self.loaded_settings: dict[str, Any] | None = None  # `ldm.changes.settings_of_model` of that file
        self.defaults = of_model(defaults or {})
        self.channels = self.first_stage_model.embed_dim
        self.image_channels = self.first_stage_model.image_channels
        self.downsampling = self.first_stage_model.downsampling  # pixels per latent

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        self.first_stage_model = instantiate_network(config)

    def instantiate_cond_stage(self, config: Any) -> None:
        self.cond_stage_model = None if config is None else instantiate_network(config)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, from the attributes as they are now: what a checkpoint stores."""
        return {
            "unet_config": self.unet_config,
            "first_stage_config": self.first_stage_config,
            "cond_stage_config": None if self.cond_stage_model is None else self.cond_stage_config,
            "schedule": self.schedule_params,
            "prediction": self.prediction,
            "scale_factor": float(self.scale_factor),
            "defaults": self.defaults,
            "concat": self.concat,
        }

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of `schedule_params`, made on first use: a model may be built on the meta device."""
        if self._schedule is None or self._schedule[0] != self.schedule_params:
            self._schedule = deepcopy(self.schedule_params), call_with("schedule", make_schedule, self.schedule_params)
        return self._schedule[1]

    @cached_property
    def hash(self) -> str:
        """The first ten hexadecimal digits of the checkpoint's SHA-256 (`file_hash`); "" if unsaved."""
        return "" if self.path is None else file_hash(self.path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def clip(self) -> float | None:
        """The limit of |x0| in sampling; None, as latents have no limit."""
        return None

    @property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer; None for a model without one."""
        return getattr(self.cond_stage_model, "tokenizer", None)

    def encode(self, images: "Tensor | Images", generator: torch.Generator | None = None, mode: bool = False) -> Tensor:
        """Encode images to scaled latents (b, z, h/f, w/f): a posterior sample, or its mode.

        images: pixels (b, c, h, w) in [-1, 1], or PIL images of one size; `pad_image` makes them multiples of f.
        """
        from ldm.init_image import InitImages, pad_image  # which sampling from noise does not need

        if not isinstance(images, Tensor):
            count = len(images) if isinstance(images, Sequence) else 1
            images = InitImages(images, None, count, self.image_channels, self.downsampling).pixels
        _check_shape("pixels in [-1, 1]", images, self.image_channels)
        code = self.first_stage_model.encode(pad_image(images, self.downsampling).to(self.device))
        if isinstance(code, Tensor):  # of a VQ autoencoder, or pixels: there is no posterior
            return code.to(self.device) * self.scale_factor  # it may have been offloaded
        return (code.mode() if mode else code.sample(generator)).to(self.device) * self.scale_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (b, z, h/f, w/f) to pixels (b, c, h, w), nominally in [-1, 1]."""
        _check_shape("latents", latents, self.channels)
        alone = latents.is_cpu and latents[:1, 0].numel() * self.downsampling**2 >= DECODED_ALONE
        parts = (latents / self.scale_factor).split(1 if alone else len(latents))
        return torch.cat([self.first_stage_model.decode(part) for part in parts]).to(self.device).float()

    @property
    def null(self) -> Any:
        """The null condition (a prompt, a class ...), which guidance leads away from; None if there is none."""
        return None if self.cond_stage_model is None else self.cond_stage_model.null

    def condition(
        self,
        prompts: Sequence[Any] | Tensor,
        chunks: int | None = None,
        clip_skip: int = 1,
        plain: bool = False,
        sizes: "Sizes | None" = None,
        negative: bool = False,
    ) -> Conditioning:
        """Encode prompts (or classes or images) as `encode_prompts` does; {} for an unconditional model.

        For models with a `SizedTextEncoder`:
        sizes: None: the model's own size, not cropped.
        negative: the prompts are negative ones, of which the empty one is zeros, if the model says so.
        """
        if self.cond_stage_model is None:
            return {}
        prompts = prompts.to(self.device) if isinstance(prompts, Tensor) else prompts
        with ExitStack() as contexts:
            if self.model.autocast:  # on either device: the text encoder may be offloaded to the CPU
                for device_type in {"cpu", self.device.type}:
                    contexts.enter_context(torch.autocast(device_type))
            cond = encode_prompts(self.cond_stage_model, prompts, chunks, clip_skip, plain)
        if hasattr(self.cond_stage_model, "completed"):
            cond = self.cond_stage_model.completed(cond, prompts, sizes, negative, self.defaults)
        return {key: value.to(self.device) for key, value in cond.items()}

    def apply_model(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the UNet's output for its input x (b, z, h, w) at timesteps t (b,): see `network_input`."""
        return self.model(x, t, **cond)

    def loss(
        self,
        z: Tensor,
        cond: Conditioning,
        t: Tensor,
        noise: Tensor,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the `prediction_loss` of each latent z (b, c, h, w) at its timestep t (b,): (b,)."""
        from ldm.diffusion.loss import prediction_loss  # only training needs it

        x = q_sample(z, t, noise, self.schedule)
        output = self.apply_model(*network_input(self.prediction, x, t, self.schedule), cond).float()
        ab = self.schedule.alphas_cumprod[t.cpu()]
        return prediction_loss(self.prediction, output, z, noise, ab, error, weight, mask)

    def denoiser(self, seeds: Sequence[int] | None = None) -> Denoise:
        """Return `denoise(x, sigma, cond) -> Prediction`. seeds: the images', for networks with noise of their own."""
        return make_denoiser(self.apply_model, self.schedule, self.prediction, next(self.model.parameters()).dtype)

    @property
    def multiple(self) -> int:
        """Return the number of which height and width in pixels must be multiples."""
        return self.downsampling * self.model.diffusion_model.downsampling

    def default_strength(self, masked: bool) -> float:
        """Return the strength that `generate` uses: 1 with a mask or for an instruction model, else 0.75."""
        return 1.0 if masked or self.concat == "latents" else 0.75

    latent_size = latent_size  # (height, width) in pixels -> (z, h, w)
    seeded_noise = SeededNoise  # (seeds, size of a latent) -> the source of their noise
    generate = torch.inference_mode()(generate)  # prompts -> images: see there for its arguments


def _check_shape(what: str, x: Any, channels: int) -> None:
    """Raise ValueError unless x is a tensor of floats (b, channels, h, w)."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{what} are a tensor (b, {channels}, h, w), got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"{what} are floats (b, {channels}, h, w), got {x.dtype} {tuple(x.shape)}")
