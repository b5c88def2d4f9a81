"""What all stages have in common in which a network learns to denoise."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from ldm.diffusion.schedule import Schedule
from ldm.generation import plan_guidance, plan_sampling
from ldm.latent_diffusion import Conditioning
from ldm.training.objective import Objective
from ldm.training.stage import Stage, adamw

MAX_TERMINAL_SIGNAL = 0.05  # above it, sampling suffers from starting at pure noise, which training never shows


class DenoisingStage(Stage):
    """The network of a model learns its prediction at random levels.

    Args:
        objective: the loss, with its model; the model's network is what trains.
        learning_rate, betas, weight_decay: of AdamW.
        preview_prompts: prompts or classes, one for each preview image.
    """

    def __init__(
        self,
        objective: Objective,
        learning_rate: float,
        betas: Sequence[float],
        weight_decay: float,
        preview_prompts: Sequence[Any],
        preview_columns: int,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.model = objective.model.model  # the only network that trains
        object.__setattr__(self, "latent_diffusion", objective.model)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, tuple(betas), weight_decay
        self.preview_prompts, self.preview_columns = list(preview_prompts), preview_columns
        self._check()

    def _check(self) -> None:
        """Show mistakes now that would otherwise show in the first batch or, after many, in the first preview."""
        whole = self.latent_diffusion
        plan_sampling(whole)
        try:
            plan_guidance(whole)
        except ValueError as error:
            raise ValueError(f"the model's defaults: {error}") from None
        if not self.preview_prompts:
            raise ValueError("previews have nothing to draw: name at least one prompt, or at least 1 of `previews`")
        size = whole.latent_size(whole.defaults["height"], whole.defaults["width"])
        state = self.model.training
        try:
            with torch.no_grad():  # and without batch statistics, which want more than one image
                denoise = self.eval().latent_diffusion.denoiser([0])
                denoise(torch.zeros(1, *size), 1.0, self.dummy_conditioning())
        except (RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(
                f"the network does not fit latents {size} or the conditioner's widths (a UNet's context_dim, "
                f"adm_in_channels and num_classes): {error}"
            ) from None
        self.train(state)
        warn_nonzero_terminal_snr(whole.schedule)

    def dummy_conditioning(self) -> Conditioning:
        """Conditioning to try a network with: nothing said, which of classes has the largest number, or the last's."""
        whole = self.latent_diffusion
        return whole.condition(self.preview_prompts[-1:] if whole.null is None else [whole.null])

    def data(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        """The latents (or pixels) (b, c, h, w) of a batch, and what the network is told of them; without gradients."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any], k: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            z, cond = self.data(batch)
            t, noise = self.objective.sample_timesteps(z), self.objective.sample_noise(z)
        loss = self.objective.losses(z, cond, t, noise).mean()
        return loss, {"loss": loss}

    def optimizers(self) -> list[Optimizer]:
        return [adamw(self.model.parameters(), self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)]

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """The preview prompts, drawn with seeds from 0 on and the model's own settings."""
        with tqdm(desc="drawing a preview", unit="step", delay=2, leave=False) as bar:
            return self.latent_diffusion.generate(
                self.preview_prompts, batch_size=64, callback=lambda step: bar.update()
            )

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        whole = self.latent_diffusion
        return {"target": whole.target, "params": whole.config}, whole.state_dict()


def check_share(name: str, value: float) -> float:
    """The value, if it is one from 0 to 1; else ValueError."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is not a share: it must be from 0 to 1")
    return value


def warn_nonzero_terminal_snr(schedule: Schedule) -> None:
    """Say on stderr when the schedule's last level is far from pure noise, from which every image is drawn.

    Training then never shows a network what it starts from (Lin et al. 2024, section 3.1): betas from 1e-4 to 0.02 over
    300 steps, say, leave sqrt(alpha-bar) = 0.22 of the image.
    """
    left = math.sqrt(schedule.alphas_cumprod[-1])
    if left > MAX_TERMINAL_SIGNAL:
        print(
            f"note: at its last level, {schedule.T - 1}, this schedule leaves {left:.3f} of the image "
            "(sqrt(alpha-bar)), and images are drawn from noise alone: more steps or larger betas would take it "
            "away, or zero_terminal_snr with prediction v or x0",
            file=sys.stderr,
        )
