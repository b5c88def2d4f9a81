"""The last stage: a UNet learns to denoise latents, conditioned on text, classes or nothing (Rombach et al. 2022)."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ldm.checks import Betas, Count, Probability, Rate
from ldm.data.part import first_images
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.classes import drop_classes, dropout_of, shown_classes, take_classes, train_conditioner
from ldm.training.denoising import DenoisingStage
from ldm.training.frozen import RecentTexts, read_first_stage, read_text_stage
from ldm.training.latents import LatentDataset, encode_dataset, encode_texts, posterior, scale_factor
from ldm.training.objective import Objective

POOLED = ("num_classes", "adm_in_channels")  # of a UNet that takes pooled text


class DiffusionStage(DenoisingStage):
    """Trains the UNet of a latent diffusion model (Rombach et al. 2022, eq. 3).

    Its autoencoder, and the text encoder if it has one, are trained before and frozen. Class embeddings train with it.

    Args:
        unet_config: the UNet; its context_dim and adm_in_channels must fit the text encoder's or the class embeddings'.
        first_stage: checkpoint of the autoencoder, or any file or folder that has one, such as Stable Diffusion's.
        cond_stage: checkpoint of the text encoder, or the folder of a CLIP as transformers saves it; or `{"target",
            "params"}` of a conditioner of classes, without `n_classes` where the data set names its classes, as the
            sub-folders of a `Folder` do; or None for an unconditional model.
        schedule, prediction, defaults: of `LatentDiffusion`.
        pooled: whether the UNet takes the text encoder's pooled text, as its num_classes and adm_in_channels say; None
            is true. False leaves these two out; the encoder must have been trained with the same choice.
        caption_dropout: probability of the empty prompt instead of the caption, or of the null class instead of the
            class, for classifier-free guidance; None is 0.1, or 0 where there is neither.
        cache_latents: encode the data set once; not for data sets that augment their images.
        cache_dir: a folder that keeps the latents, if they are cached, and the embeddings of the captions, for this and
            other runs, also at the same time.
        error, weight, noise, timesteps: of `Objective`.
        preview_prompts: prompts or classes of a preview's images; None is the empty prompt, or each class in turn.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        first_stage: str | Path,
        cond_stage: str | Path | Mapping[str, Any] | None,
        learning_rate: Rate,
        schedule: Mapping[str, Any],
        prediction: str = "v",
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
        preview_prompts: Sequence[str | int] | None = None,
        preview_columns: Count = 10,
    ) -> None:
        if cache_dir is not None and os.path.isfile(cache_dir):
            raise ValueError(f"cache_dir {cache_dir!r} is a file: name a folder")
        first, weights = read_first_stage(first_stage)
        cond: Any = cond_stage
        if text := isinstance(cond_stage, str | Path):
            cond, text_weights = read_text_stage(cond_stage)
            unet_config = _match_pooled(unet_config, pooled, cond_stage, cond["params"].get("pooled", False))
        model = LatentDiffusion(unet_config, first, cond, schedule=schedule, prediction=prediction, defaults=defaults)
        model.first_stage_model.load_state_dict(weights)
        conditioner = model.cond_stage_model
        if text:
            conditioner.load_state_dict(text_weights)
        elif conditioner is not None and not hasattr(conditioner, "n_classes"):
            raise ValueError(f"cond_stage {cond['target']} is not one of classes: name a text encoder's checkpoint")
        self.classes = conditioner is not None and not text  # whether the model is conditioned on them
        if not text and pooled is not None:
            raise ValueError("pooled is for a text encoder's pooled text: leave it out without one")
        self.reads = ("image", "caption") if text else ("image", "label") if self.classes else ("image",)
        objective = Objective(model, error, weight, noise, timesteps)
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        self.shows_each = preview_prompts is None and self.classes
        if preview_prompts is None:
            preview_prompts = [""] if text else shown_classes(conditioner, preview_columns)
        super().__init__(objective, preview_prompts, preview_columns, **adam)
        if text:
            self.freeze(cond_stage=conditioner)
        else:
            train_conditioner(self)
        self.caption_dropout = dropout_of(conditioner, caption_dropout)
        self.cache_latents, self.cache_dir = cache_latents, cache_dir
        self.texts = RecentTexts(partial(encode_texts, conditioner))  # captions -> conditioning

    def prepare(self, dataset: Any) -> Dataset:
        """Measure the scale factor (1 / standard deviation) and cache the latents' mean and deviation."""
        self.check_size(dataset)
        if self.classes:
            take_classes(self, dataset)
        if self.shows_each:  # of the classes that it now has
            self.preview_prompts = shown_classes(self.latent_diffusion.cond_stage_model, self.preview_columns)
        if self.cache_latents and getattr(dataset, "augments", False):
            raise ValueError(
                f"{type(dataset).__name__} crops or mirrors its images anew in every epoch, so their latents "
                "cannot be cached: train with stage.params.cache_latents=false"
            )
        prepared, some = self.cached(dataset), first_images(dataset, 256)  # enough to measure
        latents = (prepared.mean, prepared.std) if self.cache_latents else self._encoded(some)
        self.latent_diffusion.scale_factor = scale_factor(*latents)
        return prepared

    def _encoded(self, dataset: Any) -> tuple[Any, Any]:
        return encode_dataset(self.latent_diffusion.first_stage_model, dataset, self.share, self.workers)

    def cached(self, dataset: Any) -> Any:
        folder, model = self.cache_dir, self.latent_diffusion
        if folder is not None:
            from ldm.training.cache import CachedTexts, cached_latents

            if "caption" in self.reads:
                self.texts = RecentTexts(CachedTexts(folder, model, dataset))
        if not self.cache_latents or getattr(dataset, "augments", False):
            return dataset
        latents = self._encoded(dataset) if folder is None else cached_latents(folder, model, dataset, self.workers)
        return LatentDataset(dataset, *latents, self.reads[1:])

    def data(self, batch: Mapping[str, Any], training: bool = True) -> tuple[Tensor, Conditioning]:
        model, cached = self.latent_diffusion, "mean" in batch
        mean, std = (batch["mean"], batch["std"]) if cached else posterior(model.first_stage_model, batch["image"])
        z = model.scale_factor * (mean + std * self.share.randn(mean) if training else mean)
        dropout = self.caption_dropout if training else 0.0
        if self.classes:
            return z, model.condition(drop_classes(batch["label"], model.null, dropout, self.share))
        if model.cond_stage_model is None:
            return z, {}
        dropped = self.share.rand(len(z)) < dropout
        captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch["caption"], strict=True)]
        return z, self.texts(captions)


def _match_pooled(
    unet_config: Mapping[str, Any], pooled: bool | None, cond_stage: str | Path, given: bool
) -> dict[str, Any]:
    """Return the UNet's configuration, without pooled text unless wanted. ValueError where the encoder differs."""
    params = {k: v for k, v in unet_config["params"].items() if pooled is not False or k not in POOLED}
    if given != ("num_classes" in params):
        raise ValueError(
            f"the text encoder {str(cond_stage)!r} and the UNet differ about pooled text: train both stages with "
            "the same stage.params.pooled (false leaves num_classes and adm_in_channels out)"
        )
    return {**unet_config, "params": params}
