"""What the benchmarks of generators share: how often they call their network, one row of figures, and matplotlib."""

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ldm.cli import check_writable
from ldm.evaluation.networks import Measuring, classify, features_of
from ldm.evaluation.reference import Reference
from ldm.evaluation.report import report_distribution
from ldm.generation import plan_sampling


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


def import_pyplot() -> ModuleType:
    """ValueError where matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    return pyplot


def check_plot(path: Path | None) -> None:
    """Raise ValueError or OSError where a plot is asked for and cannot be made, before minutes of work."""
    if path is not None:
        import_pyplot()
        check_writable(path)
