"""What the benchmarks of generators measure: how often they evaluate their network, and one row of figures."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.sampling import Sampler
from ldm.evaluation.networks import Measuring, classify, features_of
from ldm.evaluation.reference import Reference
from ldm.evaluation.report import report_distribution, report_model
from ldm.evaluation.samples import sample_images
from ldm.generation import plan_sampling


def evaluations(model: Any, **settings: Any) -> int:
    """Return how often the network is evaluated for an image, by the settings of `plan_sampling`."""
    return sum(evaluations_by_step(*plan_sampling(model, **settings)))


def evaluations_by_step(row: Sampler, sigmas: Sequence[float]) -> list[int]:
    """Return how often each denoising step on these sigmas evaluates it, counted by sampling a single number."""
    calls = [0]

    def denoise(x: Tensor, sigma: float) -> Prediction:
        calls[-1] += 1
        return Prediction(x)

    for _ in row(denoise, torch.zeros(1), sigmas, noise=lambda: torch.zeros(1)):
        calls.append(0)
    return calls[:-1]


def measure_prompts(
    model: Any, n: int, reference: Reference, networks: Measuring, batch_size: int, **settings: Any
) -> dict[str, Any]:
    """Generate n captions of the reference with these settings; return a row of what `evaluate.py model` reports."""
    start, captions = time.perf_counter(), reference.captions(n, "train")
    images = sample_images(model, [caption.text for caption in captions], 0, batch_size, **settings)
    seconds = time.perf_counter() - start
    report = report_model(images, captions, "train", reference, networks, None)
    return {
        "accuracy": report["prompt_accuracy"]["accuracy"],
        "ratio": report["frechet"]["ratio"],
        "recall": report["precision_recall"]["recall"],
        "precision": report["precision_recall"]["precision"],
        "diversity": report["diversity"]["ratio"],
        "n": n,
        "seconds": seconds,
    }


def measure(
    name: str,
    calls: int,
    generate: Callable[[], Tensor],
    reference: Reference,
    networks: Measuring,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """Return a row: the three axes, precision, class accuracy, and CPU seconds, which vary less on a busy machine.

    Args:
        generate: returns uint8 images (n, 28, 28).
        labels: (n,), the digits asked for; None for an unconditional generator, whose accuracy is None.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    images = generate()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = report_distribution(features_of(networks.features, images), reference)
    return {
        "name": name,
        "evaluations": calls,
        "ratio": found["frechet"]["ratio"],
        "recall": found["precision_recall"]["recall"],
        "precision": found["precision_recall"]["precision"],
        "accuracy": None if labels is None else (classify(networks.judge, images) == labels).double().mean().item(),
        "seconds": wall / len(images),
        "cpu_seconds": cpu / len(images),
        "n": len(images),
    }
