"""The figures of `scripts/evaluate.py`, computed from images and a reference: dictionaries of plain numbers."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ldm.data.captions import Caption, frames_named
from ldm.data.measure import classify_styles
from ldm.evaluation.autoencoder import Reconstruction
from ldm.evaluation.distances import class_diversity, memorisation, nearest_training_distance, precision_recall
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.networks import Measuring, classify, features_of
from ldm.evaluation.prompt import accuracy, accuracy_by, style_accuracy
from ldm.evaluation.reference import Floor, Reference
from ldm.evaluation.samples import to_unit
from ldm.models.perceptual import psnr


def report_model(
    images: Tensor,
    captions: Sequence[Caption],
    frames: str,
    reference: Reference,
    networks: Measuring,
    training: Tensor | None,
) -> dict:
    """Return all figures of uint8 images (n, h, w), of the networks' size, of the reference's first n captions.

    `classes` are the shares of what the judge read. For an unconditional model they take the place of accuracy, and
    diversity is measured within them.

    Args:
        captions: what the model's conditions state (`samples.prompts_for`): digit and frame None where they do not.
        frames: "train" or "unseen", the list that the captions are from.
        training: uint8 (m, h, w) for the search for copies; None leaves it out.
    """
    features, answers = features_of(networks.features, images), classify(networks.judge, images)
    conditional = all(caption.digit is not None for caption in captions)
    report = {
        "prompt_accuracy": report_prompts(answers.tolist(), captions, frames, reference) if conditional else None,
        "classes": {str(i): count / len(answers) for i, count in enumerate(answers.bincount(minlength=10).tolist())},
        "style_accuracy": style_accuracy(images, captions, reference.thresholds),
        **report_distribution(features, reference, None if conditional else answers),
        "memorisation": None,
    }
    if training is not None:
        figures = memorisation(nearest_training_distance(images, training), *reference.nearest)
        report["memorisation"] = figures._asdict()
    return without_nan(report)


def report_prompts(answers: Sequence[int], captions: Sequence[Caption], frames: str, reference: Reference) -> dict:
    """Return how many of the judge's answers (n,) are the captions' digits; the ceiling is that of real images."""
    digits = [caption.digit for caption in captions]
    right = [answer == digit for answer, digit in zip(answers, digits, strict=True)]
    known = frames_named(frames)
    worded = {i: known[caption.frame] for i, caption in enumerate(captions) if caption.frame is not None}
    labels, real_right = reference.labels.tolist(), reference.right.tolist()
    return {
        **accuracy(right),
        "ceiling": accuracy(real_right),
        "per_digit": accuracy_by(digits, right),
        "ceiling_per_digit": accuracy_by(labels, real_right),
        "per_wording": accuracy_by(list(worded.values()), [right[i] for i in worded]),
    }


def report_distribution(features: Tensor, reference: Reference, labels: Tensor | None = None) -> dict:
    """Return how features (n, d) are distributed beside the real ones.

    Args:
        labels: (n,), the digit of each; None for the first n labels of the reference.
    """
    n = len(features)
    floor, real = reference.floor(n), reference.features[:n]
    labels = reference.labels[:n] if labels is None else labels
    distance = frechet_distance(*moments(features), reference.mean, reference.cov)
    spread, real_spread = class_diversity(features, labels), class_diversity(reference.features, reference.labels)
    return {
        "frechet": _over_floor(distance, floor) | {"real_trace": reference.cov.trace().item()},
        "precision_recall": precision_recall(real, features)._asdict()
        | {"real_precision": floor.precision, "real_recall": floor.recall},
        "diversity": {
            "ratio": sum(spread) / sum(real_spread),
            "per_digit": {str(i): a / b for i, (a, b) in enumerate(zip(spread, real_spread, strict=True))},
        },
    }


def _over_floor(distance: float, floor: Floor) -> dict[str, float]:
    """Return a Fréchet distance beside its floor."""
    return {"distance": distance, "floor": floor.frechet, "ratio": distance / floor.frechet}


def report_autoencoder(
    result: Reconstruction, images: Tensor, labels: Tensor, reference: Reference, networks: Measuring
) -> dict:
    """Return all figures of the reconstructions of real uint8 images (n, 28, 28) with their labels (n,).

    The Fréchet distance is to these very images, so it may be below its floor, which is of other real images.
    """
    made, original = to_unit(result.images), to_unit(images)
    ratios = psnr(made, original)
    style, real_style = (classify_styles(some, reference.thresholds) for some in (result.images, images))
    gaussians = [moments(features_of(networks.features, some)) for some in (result.images, images)]
    distance = frechet_distance(*gaussians[0], *gaussians[1])
    right, real_right = ((classify(networks.judge, some) == labels).tolist() for some in (result.images, images))
    report = {
        "psnr": {
            "of_mean_error": psnr(made[None], original[None]).item(),  # of the error over all images
            "mean": ratios.mean().item(),
            "first_percentile": ratios.quantile(0.01).item(),
        },
        "frechet": _over_floor(distance, reference.floor(len(images))),
        "judge_accuracy": {**accuracy(right), "ceiling": accuracy(real_right)},
        "style_kept": {
            "weight": (style.weight == real_style.weight).double().mean().item(),
            "slant": (style.slant == real_style.slant).double().mean().item(),
        },
        "kl_per_dimension": result.kl_per_dimension,
        "latent_std": result.latent_std,
    }
    return without_nan(report)


def without_nan(report: Any) -> Any:
    """Return a report with None for nan and infinity, which JSON lacks: figures of too few images."""
    if isinstance(report, dict):
        return {key: without_nan(value) for key, value in report.items()}
    if isinstance(report, list | tuple):
        return [without_nan(value) for value in report]
    return None if isinstance(report, float) and not math.isfinite(report) else report
