"""A conditioner that trains with the network: it is built on what the data set names, its classes or words."""

from typing import Any

import torch

from ldm.checks import few
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.conditions import condition_values
from ldm.training.denoising import DenoisingStage


def train_conditioner(stage: DenoisingStage) -> None:
    """Let a stage train the weights of its model's conditioner, such as class embeddings, if it has any."""
    conditioner = stage.latent_diffusion.cond_stage_model
    if conditioner is not None and any(True for _ in conditioner.parameters()):
        stage.networks["cond_stage"] = conditioner


def rebuild_conditioner(stage: DenoisingStage, **params: Any) -> None:
    """Build a stage's conditioner anew, with these arguments instead of its configuration's or besides them."""
    model = stage.latent_diffusion
    config: Any = model.cond_stage_config
    model.cond_stage_config = {**config, "params": {**(config.get("params") or {}), **params}}
    model.instantiate_cond_stage(model.cond_stage_config)
    train_conditioner(stage)


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
    rebuild_conditioner(stage, n_classes=len(names) + null, names=list(map(str, names)))


def take_words(stage: DenoisingStage, dataset: Any) -> None:
    """Build a stage's text encoder, which has no vocabulary yet, on the words of the data set's captions.

    A checkpoint then has them. An encoder of another kind stays as it is.
    """
    from ldm.conditioning.bert import WordPieceEncoder, vocabulary_of  # only where a text encoder trains
    from ldm.training.cache import captions_of

    if isinstance(stage.latent_diffusion.cond_stage_model, WordPieceEncoder):
        stage.vocabulary = vocab = vocabulary_of(captions_of(dataset))
        rebuild_conditioner(stage, vocab=vocab, vocab_size=len(vocab))


def shown_conditions(model: LatentDiffusion, part: str | None, count: int, dataset: Any) -> list[Any]:
    """Return what `shown_prompts` does for a model that is conditioned on that part of a sample, other than text."""
    if part is None or hasattr(model.cond_stage_model, "n_classes"):
        return shown_classes(model.cond_stage_model, count)
    if dataset is not None:
        return [condition_values(model, dataset[i % len(dataset)]) for i in range(count)]
    if model.null is None and part not in ("image", "map"):
        raise ValueError(
            f"the conditioner {type(model.cond_stage_model).__name__} reads {part!r} and has no null condition to be "
            "tried with: give it one, `null`, or the stage conditions, stage.params.preview_prompts"
        )
    size = model.defaults["height"], model.defaults["width"]
    blank = {"image": torch.zeros(model.image_channels, *size), "map": torch.zeros(size, dtype=torch.int64)}
    return [model.null if model.null is not None else condition_values(model, blank)] * count


def shown_classes(conditioner: Any, count: int) -> list[Any]:
    """Return `count` classes for previews, each in turn but the null class; empty prompts without a conditioner."""
    # the null class is the last; an embedder of one class has no other to show
    classes = [""] if conditioner is None else range(conditioner.null or conditioner.n_classes)
    return [classes[i % len(classes)] for i in range(count)]
