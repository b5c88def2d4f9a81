"""The part that all stages share in which a network learns to denoise."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.diffusion.schedule import Schedule
from ldm.generation import check_defaults
from ldm.latent_diffusion import Conditioning, require
from ldm.training.conditions import try_condition
from ldm.training.contract import checked_output
from ldm.training.objective import Objective, loss_mask
from ldm.training.stage import Loss, Stage
from ldm.util import progress_bar

BINS, TRIPLES = 5, 260  # of validation: ranges of timesteps, and at least so many (image, timestep, noise)
MAX_TERMINAL_SIGNAL = 0.05  # sqrt(alpha-bar) at the last noise level, above which a note is printed


class DenoisingStage(Stage):
    """Trains the network of a model to denoise at random noise levels; its first stage is frozen.

    Args:
        objective: the loss, with its model.
        preview_prompts: a prompt or class for each preview image.
    """

    masked = True

    def __init__(self, objective: Objective, preview_prompts: Sequence[Any], preview_columns: int, **adam: Any) -> None:
        super().__init__(preview_columns, **adam)
        self.objective, self.latent_diffusion, self.model = objective, objective.model, objective.model.model
        self.preview_prompts = list(preview_prompts)
        self.networks["model"] = self.model.to(memory_format=torch.channels_last)  # in which convolutions are faster
        self.freeze(first_stage=self.latent_diffusion.first_stage_model)
        self._check()

    def _check(self) -> None:
        """Raise ValueError for mistakes that would otherwise show in the first batch, or in the first preview."""
        model = self.latent_diffusion
        require("network", model.model.diffusion_model, "downsampling")
        if model.cond_stage_model is not None:
            require("conditioner", model.cond_stage_model, "null")
        size, unet = check_defaults(model), model.model.diffusion_model
        factors = [2**i for i in range(len(getattr(unet, "channel_mult", ())))]  # none of a network of another kind
        if factors and (lost := sorted({*getattr(unet, "attention_resolutions", ())} - {*factors})):
            raise ValueError(f"attention_resolutions {lost} would have no effect: this UNet downsamples by {factors}")
        if not self.preview_prompts:
            raise ValueError("previews need at least one image: name a prompt, or set `previews` to at least 1")
        self.train(False)  # batch statistics need more than one image
        try:
            with torch.no_grad(), checked_output(unet, size[0]):
                model.denoiser([0])(torch.zeros(1, *size), 1.0, try_condition(model, self.preview_prompts))
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the network does not fit latents {size} or the conditioner's widths (a UNet's context_dim, "
                f"adm_in_channels and num_classes): {error}"
            ) from None
        warn_nonzero_terminal_snr(model.schedule)

    def compiles(self) -> list[nn.Module]:
        # a conditioner would be compiled anew for each list of labels, and R1 has gradients of gradients: torch cannot
        return [self.model]

    def check_size(self, dataset: Any) -> None:
        """Raise ValueError for images of another size than the model's own, or, in buckets, of one it cannot make."""
        model, found = self.latent_diffusion, tuple(dataset[0]["image"].shape)
        size = model.image_channels, model.defaults["height"], model.defaults["width"]
        groups = getattr(dataset, "groups", None)
        for width, height in () if groups is None else sorted(set(groups)):
            model.latent_size(height, width)
        if found != size and (groups is None or found[0] != size[0]):
            raise ValueError(
                f"the images of {type(dataset).__name__} are {found} and the model's, by its channels and its "
                f"defaults' height and width, {size}: make them equal"
            )

    def try_preview(self) -> None:
        """Generate one image in two denoising steps."""
        self.latent_diffusion.generate(self.preview_prompts[:1], steps=min(2, self.latent_diffusion.schedule.T))

    def data(self, batch: Mapping[str, Any], training: bool = True) -> tuple[Tensor, Conditioning]:
        """Return the latents (or pixels) (b, c, h, w) of a batch and their conditioning.

        training: sample the latents, and drop conditions for classifier-free guidance; otherwise nothing is random.
        """
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        z, cond = self.data(batch)
        t, noise = self.objective.sample_timesteps(z, self.share), self.objective.sample_noise(z, self.share)
        loss = self.objective.losses(z, cond, t, noise, self.share, loss_mask(batch, z)).mean()
        return loss, {"loss": loss}

    def validation_count(self, images: int) -> int:
        """Return a multiple of BINS, so that all ranges of timesteps have equal shares."""
        return max(-(-images // BINS) * BINS, TRIPLES)

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the mean squared error of the prediction, over all timesteps and in BINS ranges of them.

        Timesteps are uniform and errors not weighted, whatever the objective: runs that differ in it compare. Masks
        are of the data, not of the objective: images that have them are measured where their masks say.
        """
        z, cond = self.data(batch, training=False)
        T, bins = self.objective.model.schedule.T, min(BINS, self.objective.model.schedule.T)
        t = (places * T).long()
        eps = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in noise])
        losses = self.latent_diffusion.loss(z, cond, t.to(z.device), eps.to(z), mask=loss_mask(batch, z))
        values, nan = {"loss": losses}, losses.new_tensor(torch.nan)
        for k in range(bins):
            low, high = -(-k * T // bins), -(-(k + 1) * T // bins)
            inside = ((low <= t) & (t < high)).to(z.device)
            values[f"loss_t{low}-{high - 1}"] = torch.where(inside, losses, nan)
        return values

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return an image for each preview prompt, sampled with seeds from 0 on and the model's own settings."""
        with progress_bar(desc="sampling a preview", unit="step", delay=2) as bar:
            options = {"batch_size": 64, "callback": lambda step: bar.update()}
            return self.latent_diffusion.generate(self.preview_prompts, **options)

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        model = self.latent_diffusion
        return {"target": model.target, "params": model.config}, model.state_dict()


def warn_nonzero_terminal_snr(schedule: Schedule) -> None:
    """Print a note if the last noise level still contains much of the image.

    Sampling starts from pure noise, which such a schedule never shows the network in training (Lin et al. 2024, section
    3.1): betas from 1e-4 to 0.02 over 300 steps, for example, end at sqrt(alpha-bar) = 0.22.
    """
    signal = math.sqrt(schedule.alphas_cumprod[-1])
    if signal > MAX_TERMINAL_SIGNAL:
        print(
            f"note: the last noise level of this schedule, {schedule.T - 1}, still has signal level {signal:.3f} "
            "(sqrt(alpha-bar)), but sampling starts from pure noise: use more steps or larger betas, or "
            "zero_terminal_snr with prediction v or x0",
            file=sys.stderr,
        )
