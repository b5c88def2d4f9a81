"""The third stage: a UNet learns to denoise latents, conditioned on text (Rombach et al. 2022, eq. 3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoint.file import load_file
from ldm.checks import Betas, Count, Probability, Rate
from ldm.data.part import first_images
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.denoising import DenoisingStage
from ldm.training.latents import LatentDataset, encode_dataset
from ldm.training.objective import Objective


class DiffusionStage(DenoisingStage):
    """Trains the UNet of a latent diffusion model; its autoencoder and text encoder are trained before and frozen.

    Args:
        unet_config: the UNet; its context_dim and adm_in_channels must fit the text encoder's.
        first_stage, cond_stage: checkpoints of the autoencoder and the text encoder.
        schedule, prediction, defaults: of `LatentDiffusion`.
        pooled: whether the UNet takes the text encoder's pooled text, as its num_classes and adm_in_channels say. False
            leaves these two out; the encoder must have been trained with the same choice.
        caption_dropout: probability of the empty prompt instead of the caption, for classifier-free guidance.
        cache_latents: encode the data set once; not for data sets that augment their images.
        error, weight, noise, timesteps: of `Objective`.
    """

    reads = ("image", "caption")
    takes_shapes = True

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage: str,
        cond_stage: str,
        learning_rate: Rate,
        schedule: Mapping[str, Any],
        prediction: str = "v",
        pooled: bool = True,
        defaults: Mapping[str, Any] | None = None,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.01,
        optimizer: str | Mapping[str, Any] = "adamw",
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        caption_dropout: Probability = 0.1,
        cache_latents: bool = True,
        preview_prompts: Sequence[str] = ("",),
        preview_columns: Count = 10,
    ) -> None:
        configs, weights = zip(*(load_file(path) for path in (first_stage, cond_stage)), strict=True)
        params = {
            k: v for k, v in unet_config["params"].items() if pooled or k not in ("num_classes", "adm_in_channels")
        }
        if configs[1]["params"].get("pooled", False) != ("num_classes" in params):
            raise ValueError(
                f"the text encoder {str(cond_stage)!r} and the UNet differ about pooled text: train both stages with "
                "the same stage.params.pooled (false leaves num_classes and adm_in_channels out)"
            )
        unet_config = {**unet_config, "params": params}
        model = LatentDiffusion(unet_config, *configs, schedule=schedule, prediction=prediction, defaults=defaults)
        model.first_stage_model.load_state_dict(weights[0])
        model.cond_stage_model.load_state_dict(weights[1])
        objective = Objective(model, error, weight, noise, timesteps)
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        super().__init__(objective, preview_prompts, preview_columns, **adam)
        self.freeze(cond_stage=model.cond_stage_model)
        self.caption_dropout, self.cache_latents = caption_dropout, cache_latents

    def prepare(self, dataset: Any) -> Dataset:
        """Measure the scale factor (1 / standard deviation) and cache the latents' mean and deviation."""
        self.check_size(dataset)
        if self.cache_latents and getattr(dataset, "augments", False):
            raise ValueError(
                f"{type(dataset).__name__} crops or mirrors its images anew in every epoch, so their latents "
                "cannot be cached: train with stage.params.cache_latents=false"
            )
        some = dataset if self.cache_latents else first_images(dataset, 256)  # enough to measure
        mean, std = encode_dataset(self.latent_diffusion.first_stage_model, some, 256)
        means, stds = (torch.cat([z.flatten() for z in part]).double() for part in (mean, std))
        variance = means.var() + stds.square().mean()
        self.latent_diffusion.scale_factor = float(variance**-0.5)
        return LatentDataset(dataset, mean, std) if self.cache_latents else dataset

    def data(self, batch: Mapping[str, Any], training: bool = True) -> tuple[Tensor, Conditioning]:
        model = self.latent_diffusion
        if "mean" in batch:
            z = model.scale_factor * (batch["mean"] + batch["std"] * torch.randn_like(batch["mean"]))
        else:
            z = model.encode(batch["image"], mode=not training)
        dropped = torch.rand(len(z)) < (self.caption_dropout if training else 0.0)
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["caption"], strict=True)]
        return z, model.cond_stage_model(captions)  # taken literally, and cut to the context length
