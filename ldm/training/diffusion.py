"""Second stage: the UNet learns to denoise latents under text (Rombach et al. 2022, eq. 3), for eps, x0 or v."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.checkpoint.file import load_file
from ldm.diffusion.denoiser import check_prediction
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.schedule import training_timesteps
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.stage import Stage, adamw


class DiffusionStage(Stage):
    """Mean squared error between the UNet's prediction and its target at random timesteps.

    Args:
        unet_config: the UNet; its context_dim and adm_in_channels must fit the text encoder's.
        first_stage, cond_stage: checkpoints of the two stages before this one; both stay frozen.
        schedule, prediction, defaults: of `LatentDiffusion`.
        learning_rate, betas, weight_decay: of AdamW.
        timesteps: arguments of `training_timesteps`: how the levels to train on are drawn.
        caption_dropout: share of captions replaced by the empty prompt, for classifier-free guidance.
        cache_latents: encode the data set once; only for data sets that show every picture always alike.
        preview_prompts: what the previews draw.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage: str,
        cond_stage: str,
        learning_rate: float,
        schedule: Mapping[str, Any],
        prediction: str = "v",
        defaults: Mapping[str, Any] | None = None,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        timesteps: Mapping[str, Any] | None = None,
        caption_dropout: float = 0.1,
        cache_latents: bool = True,
        preview_prompts: Sequence[str] = ("",),
        preview_columns: int = 10,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout {caption_dropout} is not a share: it must be from 0 to 1")
        configs, weights = zip(*(load_file(path) for path in (first_stage, cond_stage)), strict=True)
        whole = LatentDiffusion(unet_config, *configs, schedule=schedule, prediction=prediction, defaults=defaults)
        whole.first_stage_model.load_state_dict(weights[0])
        whole.cond_stage_model.load_state_dict(weights[1])
        self.model = whole.model  # the only network that trains
        self.exclude_from_modules(first_stage=whole.first_stage_model, cond_stage=whole.cond_stage_model)
        object.__setattr__(self, "latent_diffusion", whole)
        self.learning_rate, self.betas, self.weight_decay = learning_rate, tuple(betas), weight_decay
        self.timesteps, self.caption_dropout = dict(timesteps or {"name": "uniform"}), caption_dropout
        self.cache_latents, self.preview_columns = cache_latents, preview_columns
        self.preview_prompts = list(preview_prompts)
        self._check()

    def _check(self) -> None:
        """Show mistakes now that would otherwise show in the first batch or, after many, in the first preview."""
        whole = self.latent_diffusion
        check_prediction(whole.prediction)
        training_timesteps(batch=1, T=whole.schedule.T, generator=torch.Generator(), **self.timesteps)
        get_sampler(whole.defaults["sampler"])
        size = whole.latent_size(whole.defaults["height"], whole.defaults["width"])
        try:
            with torch.no_grad():
                whole.apply_model(torch.zeros(1, *size), torch.zeros(1), whole.condition([""]))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"the UNet does not fit latents {size} or the text encoder's context_dim and adm_in_channels: {error}"
            ) from None

    @torch.no_grad()
    def prepare(self, dataset: Dataset, device: torch.device) -> Dataset:
        """Measure the scale factor (1 / deviation of the latents) and cache the latents' mean and deviation."""
        if self.cache_latents and getattr(dataset, "augments", False):
            raise ValueError(
                f"{type(dataset).__name__} crops or mirrors its pictures anew in every epoch, so that their latents "
                "cannot be cached: train with stage.params.cache_latents=false"
            )
        self.to(device)
        means, stds = [], []
        for batch in self.iterate(dataset, 256, "encoding latents"):
            posterior = self.first_stage.encode(batch["image"].to(device))
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
            if not self.cache_latents:
                break  # one batch is enough to measure
        mean, std = torch.cat(means), torch.cat(stds)
        variance = mean.double().var() + (std.double() ** 2).mean()
        self.latent_diffusion.scale_factor = self.latent_diffusion.config["scale_factor"] = float(variance**-0.5)
        return LatentDataset(dataset, mean, std) if self.cache_latents else dataset

    def optimizers(self) -> list[Optimizer]:
        return [adamw(self.model.parameters(), self.learning_rate, betas=self.betas, weight_decay=self.weight_decay)]

    def forward(self, batch: Mapping[str, Any], k: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.latent_diffusion
        with torch.no_grad():
            if "mean" in batch:
                z = model.scale_factor * (batch["mean"] + batch["std"] * torch.randn_like(batch["mean"]))
            else:
                z = model.encode(batch["image"])
            dropped = torch.rand(len(z)) < self.caption_dropout
            captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["caption"], strict=True)]
            cond = model.cond_stage_model(captions)  # literally, and cut to one length
            t = training_timesteps(batch=len(z), T=model.schedule.T, **self.timesteps).to(z.device)
        loss = model.loss(z, cond, t, torch.randn_like(z)).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """The preview prompts, drawn with seeds from 0 on and the model's own settings."""
        return self.latent_diffusion.generate(self.preview_prompts, batch_size=64)

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": self.latent_diffusion.config}
        return config, self.latent_diffusion.state_dict()


class LatentDataset(Dataset):
    """A data set with its pictures replaced by the mean and standard deviation of their latents."""

    def __init__(self, dataset: Dataset, mean: Tensor, std: Tensor) -> None:
        self.dataset, self.mean, self.std = dataset, mean, std

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{"caption": self._caption(i), "mean": self.mean[i], "std": self.std[i]} for i in indices]

    def _caption(self, index: int) -> str:
        """A data set of ours tells a caption without reading the picture; any other has it in its samples."""
        if hasattr(self.dataset, "caption"):
            return self.dataset.caption(index).text
        return self.dataset[index]["caption"]
