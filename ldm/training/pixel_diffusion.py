"""Training of diffusion in pixels: of classes, or of images alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.diffusion.weighting import loss_weight, mean_error
from ldm.latent_diffusion import Conditioning
from ldm.pixel_diffusion import PixelDiffusion
from ldm.training.denoising import DenoisingStage, check_share
from ldm.util import call_with, instantiate_from_config


class PixelDiffusionStage(DenoisingStage):
    """A PixelDiffusion, from nothing.

    Args:
        model: `{"target", "params"}` of a PixelDiffusion.
        learning_rate: of AdamW.
        class_dropout: share of labels replaced by the class that says nothing, for classifier-free guidance.
        error: l2 or l1, of the prediction.
        weight: arguments of `loss_weight`, `{"name": "min_snr"}` say.
        bound_weight: of the variational bound, where the model learns the variance (Nichol & Dhariwal 2021, eq. 16).
        betas, weight_decay, timesteps, noise, preview_columns: of `DenoisingStage`.
        previews: how many images previews draw; of each class in turn, where there are classes.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        learning_rate: float,
        class_dropout: float = 0.1,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        bound_weight: float = 0.001,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        timesteps: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        previews: int = 20,
        preview_columns: int = 10,
    ) -> None:
        whole = instantiate_from_config(model)
        cond = getattr(whole, "cond_stage_model", None)
        if not isinstance(whole, PixelDiffusion) or (cond is not None and not hasattr(cond, "n_classes")):
            raise ValueError(
                f"{model['target']} conditioned by {type(cond).__name__} is not what this stage trains: it takes a "
                "PixelDiffusion of classes or of nothing"
            )
        # all but the last, if that one says nothing; an embedder of one class has no other to draw
        classes = [""] if cond is None else range(cond.null or cond.n_classes)
        if cond is not None and cond.null is None and class_dropout != 0:
            raise ValueError(
                f"class_dropout {class_dropout} needs a class that says nothing, and the model has none: set it to 0, "
                "or give the model's cond_stage_config null: true and one class more"
            )
        shown = [classes[i % len(classes)] for i in range(previews)]
        super().__init__(whole, learning_rate, betas, weight_decay, timesteps, shown, preview_columns, noise)
        self.class_dropout = check_share("class_dropout", class_dropout)
        if not bound_weight >= 0:
            raise ValueError(f"bound_weight {bound_weight} must not be below 0 (the paper takes 0.001)")
        self.error, self.weight, self.bound_weight = error, weight or {"name": "none"}, bound_weight
        mean_error(error, torch.zeros(1, 1), torch.zeros(1, 1))  # raises for an unknown name, as does the other
        ab = whole.schedule.alphas_cumprod[:1]
        call_with("weight", loss_weight, self.weight, prediction=whole.prediction, alphas_cumprod_t=ab)

    def prepare(self, dataset: Dataset, device: torch.device) -> Dataset:
        """Checks that the data set has what the model is told of, in its size."""
        whole, sample = self.latent_diffusion, dataset[0]
        size = whole.latent_size(whole.defaults["height"], whole.defaults["width"])
        if tuple(sample["image"].shape) != size:
            raise ValueError(
                f"the images of {type(dataset).__name__} are {tuple(sample['image'].shape)} and the model's, by its "
                f"channels and its defaults' height and width, {size}: make them equal"
            )
        if whole.cond_stage_model is not None and "label" not in sample:
            raise ValueError(f"{type(dataset).__name__} has no labels: use one of the digit sets")
        return dataset

    def data(self, batch: Mapping[str, Any]) -> tuple[Tensor, Conditioning]:
        model = self.latent_diffusion
        if model.cond_stage_model is None:
            return batch["image"], {}
        if self.class_dropout == 0:
            return batch["image"], model.condition(batch["label"])
        dropped = torch.rand(len(batch["label"])) < self.class_dropout
        labels = torch.where(dropped.to(batch["label"].device), model.null, batch["label"])
        return batch["image"], model.condition(labels)

    def losses(self, z: Tensor, cond: Conditioning, t: Tensor, noise: Tensor) -> Tensor:
        return self.latent_diffusion.loss(z, cond, t, noise, self.error, self.weight, self.bound_weight)
