"""What a denoising model is conditioned on in training: a part of each sample, its dropout and its previews.

A conditioner says by `reads` which part of a data set's sample its condition is: "caption", "label", "boxes" or "map";
"image" for the sample's own image, made as small as its latents. A model with `concat` also has the image without a
part of it, under a random mask.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.share import BatchShare

if TYPE_CHECKING:  # which imports this file
    from ldm.training.denoising import DenoisingStage


def read_by(model: LatentDiffusion) -> tuple[str, ...]:
    """Return the parts of a sample that a model's conditioning is made of, the conditioner's first."""
    conditioner = model.cond_stage_model
    if model.concat == "latents":
        raise ValueError("concat 'latents' cannot be trained: no data set here has pairs of images, before and after")
    own = getattr(conditioner, "reads", "label" if hasattr(conditioner, "n_classes") else "caption")
    return (*([] if conditioner is None else [own]), *([] if model.concat is None else ["image"]))


def condition_values(model: LatentDiffusion, batch: Mapping[str, Any]) -> Any:
    """Return what a model's conditioner takes of a batch, or of one sample; "" where there is none."""
    if model.cond_stage_model is None:
        return ""
    part = batch[(name := read_by(model)[0])]
    return F.avg_pool2d(part, model.downsampling) if name == "image" else part


def batch_condition(
    model: LatentDiffusion,
    encode: Callable[[Any], Conditioning],
    batch: Mapping[str, Any],
    z: Tensor,
    dropout: float | None,
    share: BatchShare,
) -> Conditioning:
    """Return the conditioning of a batch.

    Args:
        encode: a condition for each image -> conditioning, of the model's conditioner.
        z: the latents (b, c, h, w).
        dropout: probability of the null condition; None outside training, where nothing is random and the masks are the
            middle of the images.
    """
    cond: Conditioning = {}
    if model.cond_stage_model is not None:
        cond = encode(drop(condition_values(model, batch), model.null, dropout or 0.0, share))
    if model.concat is not None:
        from ldm.init_image import concat_condition  # only models that inpaint need both
        from ldm.training.masks import middle_masks, random_masks

        size = batch["image"].shape[-2:]
        masks = middle_masks(len(z), *size) if dropout is None else random_masks(len(z), *size, share)
        cond = cond | concat_condition(model, batch["image"], masks.to(z))
    return cond


def try_condition(model: LatentDiffusion, prompts: Any) -> Conditioning:
    """Return the conditioning of one image to try a network with: of the null condition, or else of the last prompt.

    The null class has the largest number, which shows an embedding that is too small.
    """
    cond = model.condition(prompts[-1:] if model.null is None else [model.null])
    if model.concat is None:
        return cond
    z, height, width = model.latent_size(model.defaults["height"], model.defaults["width"])
    return cond | {"c_concat": torch.zeros(1, z + (model.concat != "latents"), height, width, device=model.device)}


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


def take_names(stage: "DenoisingStage", dataset: Any) -> None:
    """Build a stage's conditioner on what the data set names: its classes, or the words of its captions."""
    if "label" in stage.reads:
        from ldm.training.conditioner import take_classes  # only such conditioners need it

        take_classes(stage, dataset)
    if "caption" in stage.reads and stage.latent_diffusion.tokenizer is None:
        from ldm.training.conditioner import take_words  # only where a text encoder trains

        take_words(stage, dataset)


def shown_prompts(model: LatentDiffusion, count: int, dataset: Any = None) -> list[Any]:
    """Return prompts for previews: `shown_classes`, one empty text, or the conditions of the first `count` samples.

    Without the data set they are blank.
    """
    part = None if model.cond_stage_model is None else read_by(model)[0]
    if part == "caption":
        return [""]
    from ldm.training.conditioner import shown_conditions  # only other conditions need it

    return shown_conditions(model, part, count, dataset)


def drop(values: Any, null: Any, probability: float, share: BatchShare) -> Any:
    """Return a batch's conditions, a list or a tensor (b, ...), each replaced by the null one with that probability."""
    if probability == 0:
        return values
    dropped = (share.rand(len(values)) < probability).tolist()
    rows = values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else values
    return [null if gone else row for row, gone in zip(rows, dropped, strict=True)]
