"""Diffusion in pixels, class-conditional or unconditional."""

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor
from torch.utils.data import Dataset

from ldm.checks import Betas, Count, Probability, Range, Rate
from ldm.latent_diffusion import Conditioning
from ldm.pixel_diffusion import PixelDiffusion
from ldm.training.conditioner import shown_classes, take_classes, train_conditioner
from ldm.training.conditions import drop, dropout_of
from ldm.training.denoising import DenoisingStage
from ldm.training.objective import Objective
from ldm.util import instantiate_from_config


class PixelDiffusionStage(DenoisingStage):
    """Trains a PixelDiffusion from random weights, and the embeddings of its classes where it has some.

    Args:
        model: `{"target", "params"}` of a PixelDiffusion.
        class_dropout: probability of the null class instead of the label, for classifier-free guidance; None is 0.1, or
            0 without a null class.
        error, weight, noise, timesteps: of `Objective`.
        bound_weight: of the variational bound, for a model that learns the variance (Nichol & Dhariwal 2021, eq. 16).
        previews: images in a preview, of each class in turn for a class-conditional model.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        learning_rate: Rate,
        class_dropout: Probability | None = None,
        error: str = "l2",
        weight: Mapping[str, Any] | None = None,
        noise: Mapping[str, Any] | None = None,
        timesteps: Mapping[str, Any] | None = None,
        bound_weight: Annotated[float, Range(0)] = 0.001,
        betas: Betas = (0.9, 0.999),
        weight_decay: Rate = 0.01,
        optimizer: str | Mapping[str, Any] = "adamw",
        previews: Count = 20,
        preview_columns: Count = 10,
    ) -> None:
        built = instantiate_from_config(model)
        cond = getattr(built, "cond_stage_model", None)
        if not isinstance(built, PixelDiffusion) or (cond is not None and not hasattr(cond, "n_classes")):
            raise ValueError(
                f"this stage trains a class-conditional or unconditional PixelDiffusion, not a {model['target']} "
                f"conditioned by {type(cond).__name__}"
            )
        objective = Objective(built, error, weight, noise, timesteps, bound_weight=bound_weight)
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        super().__init__(objective, shown_classes(cond, previews), preview_columns, **adam)
        self.reads = ("image",) if cond is None else ("image", "label")
        train_conditioner(self)
        self.class_dropout = dropout_of(cond, class_dropout)

    def prepare(self, dataset: Any) -> Dataset:
        """Raise ValueError for images of another size than the model's, or other classes; take these classes' names."""
        self.check_size(dataset)
        take_classes(self, dataset)
        return dataset

    def data(self, batch: Mapping[str, Any], training: bool = True) -> tuple[Tensor, Conditioning]:
        model = self.latent_diffusion
        if model.cond_stage_model is None:
            return batch["image"], {}
        dropout = self.class_dropout if training else 0.0
        return batch["image"], model.condition(drop(batch["label"], model.null, dropout, self.share))
