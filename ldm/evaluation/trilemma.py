"""The generative learning trilemma (Xiao et al. 2022, figure 1): quality, coverage and speed of several generators.

Quality is the Fréchet distance over that of as many real images, coverage the recall, speed the seconds an image.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.data.captions import Caption
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.evaluation.draw import ask, draw
from ldm.evaluation.networks import Measuring, classify, features_of
from ldm.evaluation.reference import Reference
from ldm.evaluation.report import report_distribution
from ldm.evaluation.samples import quantise
from ldm.generation import plan_sampling


@torch.inference_mode()
def draw_prior(model: Any, n: int, batch_size: int, seed: int = 0) -> Tensor:
    """uint8 (n, 28, 28): a model's first stage as a VAE (Kingma & Welling 2014), unit normal latents decoded.

    Its scaled latents have unit variance, so that the unit normal is the prior that suits them best.
    """
    size = model.latent_size(model.defaults["height"], model.defaults["width"])
    images = []
    for first in range(0, n, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, n))
        images.append(quantise(model.decode(SeededNoise(seeds, size)().to(model.device)).cpu()))
    return torch.cat(images)


def draw_asked(model: Any, captions: Sequence[Caption], batch_size: int, seed: int = 0, **settings: Any) -> Tensor:
    """uint8 (n, 28, 28): an image for what the model takes of each caption."""
    return draw(model, ask(model, captions)[0], seed, batch_size, **settings)


def evaluations(model: Any, **settings: Any) -> int:
    """How often an image's drawing calls the network. settings: of `plan_sampling`: steps, sampler, spacing."""
    row, sigmas = plan_sampling(model, **settings)
    return sum(row.evaluations(sigmas))


def measure(
    name: str,
    calls: int,
    draw_images: Callable[[], Tensor],
    reference: Reference,
    networks: Measuring,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """A row: the three axes, precision, class accuracy, and CPU seconds, in which a busy machine counts less.

    labels: (n,), the digits asked for; None where none can be, and then the accuracy is None.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    images = draw_images()
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
