"""What the stages of class-conditional models share: the classes, their dropout and their previews."""

from typing import Any

import torch
from torch import Tensor

from ldm.checks import few
from ldm.training.denoising import DenoisingStage
from ldm.training.share import BatchShare


def dropout_of(conditioner: Any, probability: float | None) -> float:
    """Return the probability of the null condition: as given, or by default 0.1 for a model that has one, else 0.

    Raises ValueError for one that is given to a model without a null condition.
    """
    null = conditioner is not None and conditioner.null is not None
    if probability is None:
        return 0.1 if null else 0.0
    if probability > 0 and not null:
        raise ValueError(
            f"dropout {probability} needs a null condition, which this model lacks: leave it out, or give a "
            "conditioner of classes null: true and one more class"
        )
    return probability


def train_conditioner(stage: DenoisingStage) -> None:
    """Let a stage train the weights of its model's conditioner, such as class embeddings, if it has any."""
    conditioner = stage.latent_diffusion.cond_stage_model
    if conditioner is not None and any(True for _ in conditioner.parameters()):
        stage.networks["cond_stage"] = conditioner


def take_classes(stage: DenoisingStage, dataset: Any) -> None:
    """Build a stage's conditioner for the classes of the data set, whose names a checkpoint then has.

    The `n_classes` of the configuration is how many they are, the null class included, or absent. Raises ValueError
    where it differs, or is absent and the data set has no `classes`.
    """
    model, names = stage.latent_diffusion, getattr(dataset, "classes", None)
    if model.cond_stage_model is None:
        return
    config: Any = model.cond_stage_config
    stated = (config.get("params") or {}).get("n_classes")
    if names is None:
        if stated is None:
            raise ValueError(
                f"{type(dataset).__name__} has no names of classes: set n_classes, the null class included"
            )
        return
    null = int(model.null is not None)
    if stated not in (None, len(names) + null):
        raise ValueError(
            f"{type(dataset).__name__} has {len(names)} classes ({few(names)}): n_classes must be {len(names) + null}"
            f"{' with the null class' * null}, not {stated}"
        )
    params = {**config["params"], "n_classes": len(names) + null, "names": list(map(str, names))}
    model.cond_stage_config = {**config, "params": params}
    model.instantiate_cond_stage(model.cond_stage_config)
    train_conditioner(stage)


def shown_classes(conditioner: Any, count: int) -> list[Any]:
    """Return `count` classes for previews, each in turn but the null class; empty prompts without a conditioner."""
    # the null class is the last; an embedder of one class has no other to show
    classes = [""] if conditioner is None else range(conditioner.null or conditioner.n_classes)
    return [classes[i % len(classes)] for i in range(count)]


def drop_classes(labels: Tensor, null: int | None, probability: float, share: BatchShare) -> Tensor:
    """Return class numbers (b,), each replaced by the null class with that probability."""
    if probability == 0:
        return labels
    dropped = share.rand(len(labels)) < probability
    return torch.where(dropped.to(labels.device), torch.as_tensor(null), labels)
