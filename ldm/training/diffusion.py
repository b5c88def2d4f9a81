"""The third stage: a UNet learns to denoise latents, conditioned on text (Rombach et al. 2022, eq. 3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoint.file import load_file
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.denoising import DenoisingStage, check_probability
from ldm.training.objective import Objective
from ldm.training.order import in_batches


class DiffusionStage(DenoisingStage):
    """Trains the UNet of a latent diffusion model; its autoencoder and text encoder are trained before and frozen.

    Args:
        unet_config: the UNet; its context_dim and adm_in_channels must fit the text encoder's.
        first_stage, cond_stage: checkpoints of the autoencoder and the text encoder.
        learning_rate: of AdamW.
        schedule, prediction, defaults: of `LatentDiffusion`.
        caption_dropout: probability of the empty prompt instead of the caption, for classifier-free guidance.
        cache_latents: encode the data set once; not for data sets that augment their images.
        error, weight, noise, timesteps: of `Objective`.
        betas, weight_decay, preview_prompts, preview_columns: of `DenoisingStage`.
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
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        caption_dropout: float = 0.1,
        cache_latents: bool = True,
        preview_prompts: Sequence[str] = ("",),
        preview_columns: int = 10,
    ) -> None:
        configs, weights = zip(*(load_file(path) for path in (first_stage, cond_stage)), strict=True)
        model = LatentDiffusion(unet_config, *configs, schedule=schedule, prediction=prediction, defaults=defaults)
        model.first_stage_model.load_state_dict(weights[0])
        model.cond_stage_model.load_state_dict(weights[1])
        objective = Objective(model, error, weight, noise, timesteps)
        super().__init__(objective, learning_rate, betas, weight_decay, preview_prompts, preview_columns)
        self.freeze(cond_stage=model.cond_stage_model)
        self.caption_dropout = check_probability("caption_dropout", caption_dropout)
        self.cache_latents = cache_latents

    @torch.no_grad()
    def prepare(self, dataset: Dataset) -> Dataset:
        """Measure the scale factor (1 / standard deviation) and cache the latents' mean and deviation."""
        if self.cache_latents and getattr(dataset, "augments", False):
            raise ValueError(
                f"{type(dataset).__name__} crops or mirrors its images anew in every epoch, so their latents "
                "cannot be cached: train with stage.params.cache_latents=false"
            )
        means, stds = [], []
        for batch in in_batches(dataset, 256, "encoding latents"):
            posterior = self.latent_diffusion.first_stage_model.encode(batch["image"].to(self.device))
            means.append(posterior.mean.cpu())
            stds.append(posterior.std.cpu())
            if not self.cache_latents:
                break  # one batch is enough to measure
        mean, std = torch.cat(means), torch.cat(stds)
        variance = mean.double().var() + (std.double() ** 2).mean()
        self.latent_diffusion.scale_factor = float(variance**-0.5)
        return LatentDataset(dataset, mean, std) if self.cache_latents else dataset

    def data(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        model = self.latent_diffusion
        if "mean" in batch:
            z = model.scale_factor * (batch["mean"] + batch["std"] * torch.randn_like(batch["mean"]))
        else:
            z = model.encode(batch["image"])
        dropped = torch.rand(len(z)) < self.caption_dropout
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["caption"], strict=True)]
        return z, model.cond_stage_model(captions)  # taken literally, and cut to the context length


class LatentDataset(Dataset):
    """A data set with its images replaced by the mean and standard deviation of their latents, (z, h, w) each."""

    def __init__(self, dataset: Dataset, mean: Sequence[Tensor], std: Sequence[Tensor]) -> None:
        self.dataset, self.mean, self.std = dataset, mean, std

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{"caption": self._caption(i), "mean": self.mean[i], "std": self.std[i]} for i in indices]

    def _caption(self, index: int) -> str:
        """Return a caption; our own data sets have a method for it, which does not read the image."""
        if hasattr(self.dataset, "caption"):
            return self.dataset.caption(index).text
        return self.dataset[index]["caption"]
