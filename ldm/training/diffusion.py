"""The last stage: a UNet learns to denoise latents, conditioned on whatever a sample has (Rombach et al. 2022)."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoint.file import checkpoint_at
from ldm.checks import Betas, Count, Probability, Rate
from ldm.data.part import first_images
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.conditions import batch_condition, dropout_of, read_by, shown_prompts, take_names
from ldm.training.contract import note_noise
from ldm.training.denoising import DenoisingStage
from ldm.training.frozen import RecentTexts, match_pooled, read_first_stage, read_text_stage
from ldm.training.latents import LatentDataset, encode_dataset, encode_texts, latents_scale, posterior
from ldm.training.objective import Objective

Posterior = Literal["sample", "mean"]


class LatentStage(DenoisingStage):
    """Trains the UNet of a latent diffusion model, on latents and conditions that are encoded once or anew.

    Args:
        frozen: whether the model's conditioner is; if not, it trains with the UNet.
        caption_dropout, cache_latents, cache_dir, posterior, preview_prompts: of `DiffusionStage`.
    """

    def __init__(
        self,
        objective: Objective,
        frozen: bool,
        caption_dropout: Probability | None,
        cache_latents: bool,
        cache_dir: str | None,
        posterior: Posterior,
        preview_prompts: Sequence[str | int] | None,
        preview_columns: Count,
        **adam: Any,
    ) -> None:
        model, conditioner = objective.model, objective.model.cond_stage_model
        if hasattr(conditioner, "with_sizes"):
            raise ValueError("Stable Diffusion XL is tuned by DreamBooth and LoRA alone (ldm dreambooth)")
        self.reads, self.own_previews = ("image", *read_by(model)), preview_prompts is None
        shown = shown_prompts(model, preview_columns) if preview_prompts is None else preview_prompts
        super().__init__(objective, shown, preview_columns, **adam)
        if not frozen:
            from ldm.training.conditioner import train_conditioner  # only such conditioners need it

            train_conditioner(self)
        elif conditioner is not None:
            self.freeze(cond_stage=conditioner)
        self.caption_dropout = dropout_of(conditioner, caption_dropout)
        self.cache_latents, self.cache_dir, self.posterior = cache_latents, cache_dir, posterior
        self.condition: Any = partial(model.condition, plain=True)  # conditions -> conditioning
        if frozen and model.tokenizer is not None:
            self.condition = RecentTexts(partial(encode_texts, conditioner))

    def prepare(self, dataset: Any) -> Dataset:
        """Cache the latents' mean and deviation."""
        self.check_size(dataset)
        if self.own_previews:
            self.preview_prompts = shown_prompts(self.latent_diffusion, self.preview_columns, dataset)
        if self.cache_latents and getattr(dataset, "augments", False):
            raise ValueError(
                f"{type(dataset).__name__} crops or mirrors its images anew in every epoch, so their latents "
                "cannot be cached: train with stage.params.cache_latents=false"
            )
        return self.cached(dataset)

    def encoded(self, dataset: Any) -> tuple[Any, Any]:
        """Return mean and deviation of all latents."""
        return encode_dataset(self.latent_diffusion.first_stage_model, dataset, self.share, self.workers)

    def cached(self, dataset: Any) -> Any:
        folder, model = self.cache_dir, self.latent_diffusion
        if folder is not None:
            from ldm.training.cache import CachedTexts, cached_latents

            if isinstance(self.condition, RecentTexts):
                self.condition = RecentTexts(CachedTexts(folder, model, dataset))
        if not self.cache_latents or getattr(dataset, "augments", False):
            return dataset
        latents = self.encoded(dataset) if folder is None else cached_latents(folder, model, dataset, self.workers)
        return LatentDataset(dataset, *latents, self.reads[1:])

    def data(self, batch: Mapping[str, Any], training: bool = True) -> tuple[Tensor, Conditioning]:
        model, cached = self.latent_diffusion, "mean" in batch
        z, std = (batch["mean"], batch["std"]) if cached else posterior(model.first_stage_model, batch["image"])
        if training and self.posterior == "sample":
            z = z + std * self.share.randn(z)
        z = model.scale_factor * z
        dropout = self.caption_dropout if training else None
        return z, batch_condition(model, self.condition, batch, z, dropout, self.share)


class DiffusionStage(LatentStage):
    """Trains the UNet of a latent diffusion model (Rombach et al. 2022, eq. 3).

    Its autoencoder is trained before and frozen, and so is a text encoder from a checkpoint, unless `train_text`. Any
    other conditioner trains with it: of classes, boxes, maps, small images, or text.

    Args:
        unet_config: the UNet; its context_dim and adm_in_channels must fit the text encoder's or the class embeddings'.
        first_stage: checkpoint of the autoencoder, or any file or folder that has one, such as Stable Diffusion's.
        cond_stage: checkpoint of the text encoder, or of a model that has one, or the folder of a CLIP as transformers
            saves it; or `{"target", "params"}` of a conditioner to train, of classes without `n_classes` where the
            data set names them, as the sub-folders of a `Folder` do, of text without `vocab`, for the words of the
            captions; or None for an unconditional model.
        concat: "latents_mask" or "mask_latents" trains the UNet to inpaint under random masks (`LatentDiffusion`).
        schedule, prediction, defaults: of `LatentDiffusion`.
        start: checkpoint of a complete model to train on: its UNet, scale factor, and conditioner if that trains.
        train_text: whether a text encoder from a checkpoint trains, too.
        pooled: whether the UNet takes the text encoder's pooled text, as its num_classes and adm_in_channels say; None
            is true. False leaves these two out; the encoder must have been trained with the same choice.
        caption_dropout: probability of the null condition (the empty prompt, the null class ...) instead of the
            sample's, for classifier-free guidance; None is 0.1, or 0 where there is none.
        cache_latents: encode the data set once; not for data sets that augment their images.
        cache_dir: a folder that keeps the latents, if they are cached, and the embeddings of the captions, for this and
            other runs, also at the same time.
        posterior: "sample" trains on samples of the autoencoder's posteriors, as latent diffusion does; "mean" on their
            means, so that the UNet need not learn to make the noise of wide ones, which a large kl_weight gives.
        error, weight, noise, timesteps: of `Objective`.
        preview_prompts: prompts or classes of a preview's images; None is the empty prompt, each class in turn, or the
            conditions of the first samples.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage: str | Path,
        cond_stage: str | Path | Mapping[str, Any] | None,
        learning_rate: Rate,
        schedule: Mapping[str, Any],
        prediction: str = "v",
        concat: str | None = None,
        start: str | Path | None = None,
        train_text: bool = False,
        pooled: bool | None = None,
        defaults: Mapping[str, Any] | None = None,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.01,
        optimizer: str | Mapping[str, Any] = "adamw",
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        caption_dropout: Probability | None = None,
        cache_latents: bool = True,
        cache_dir: str | None = None,
        posterior: Posterior = "sample",
        preview_prompts: Sequence[str | int] | None = None,
        preview_columns: Count = 10,
    ) -> None:
        if cache_dir is not None and os.path.isfile(cache_dir):
            raise ValueError(f"cache_dir {cache_dir!r} is a file: name a folder")
        first, weights = read_first_stage(first_stage)
        cond: Any = cond_stage
        if text := isinstance(cond_stage, str | Path):
            cond, text_weights = read_text_stage(cond_stage)
            unet_config = match_pooled(unet_config, pooled, cond_stage, cond["params"].get("pooled", False))
        model = LatentDiffusion(unet_config, first, cond, schedule, prediction, defaults=defaults, concat=concat)
        model.first_stage_model.load_state_dict(weights)
        if text:
            model.cond_stage_model.load_state_dict(text_weights)
        elif pooled is not None or train_text:
            raise ValueError("pooled and train_text are for a text encoder from a checkpoint: leave them out")
        self.start = None if start is None else checkpoint_at(start)
        objective = Objective(model, error, weight, noise, timesteps)
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        latents, previews = (cache_latents, cache_dir, posterior), (preview_prompts, preview_columns)
        super().__init__(objective, text and not train_text, caption_dropout, *latents, *previews, **adam)

    def prepare(self, dataset: Any) -> Dataset:
        """Measure the scale factor (1 / standard deviation) and cache the latents' mean and deviation."""
        self.check_size(dataset)
        take_names(self, dataset)
        if self.start is not None:
            from ldm.training.start import start_from  # only there

            start_from(self.latent_diffusion, self.start, conditioner="cond_stage" in self.networks)
        prepared: Any = super().prepare(dataset)
        latents = (prepared.mean, prepared.std) if self.cache_latents else self.encoded(first_images(dataset, 256))
        if self.start is None:
            self.latent_diffusion.scale_factor, noise = latents_scale(*latents, self.posterior == "sample")
            note_noise(noise)
        return prepared
