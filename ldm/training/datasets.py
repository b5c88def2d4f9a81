"""The data sets of a configuration, and what is measured on them while a stage trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ldm.checks import Range
from ldm.training.contract import build_dataset
from ldm.training.ema import EMA
from ldm.training.loop_settings import LoopSettings
from ldm.training.stage import Stage
from ldm.util import call_with


@dataclass
class DataSettings:
    """The `data:` part of a configuration."""

    target: str  # class of the data set
    params: Mapping[str, Any] | None = None  # its arguments
    # What to validate on: a share of the images, which are then not trained on, or what the arguments of other images
    # are, such as {root: DIR}. None: nothing.
    validation: Annotated[float, Range(0, 1)] | Mapping[str, Any] | None = None


def build_datasets(stage: Stage, config: Mapping[str, Any]) -> tuple[Any, Any | None]:
    """Return the data set to train on and the one to validate on, or None; ValueError where they do not fit.

    A share is of the same images for every seed of the training, so that runs compare.
    """
    settings, dataset = call_with("data", DataSettings, config), build_dataset(stage, config)
    if settings.validation is None:
        return dataset, None
    from ldm.training.validation import hold_out  # only where it is asked for

    return hold_out(stage, config, dataset, settings.validation)


def make_measurements(
    stage: Stage, dataset: Any, held_out: Any | None, settings: LoopSettings, accelerator: Any
) -> list[tuple[int, Callable[[EMA], dict[str, float]]]]:
    """Return what the settings of the loop ask for: steps between measurements, and what gives the figures."""
    if held_out is None and not settings.measures:
        return []
    from ldm.training.validation import measurements  # only where it is asked for

    return measurements(stage, dataset, held_out, settings, accelerator)
