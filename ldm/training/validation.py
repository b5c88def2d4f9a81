"""Validation: what a stage reaches on images that it is not trained on, on the same ones with the same noise each time.

A validation leaves no trace in the training: it has random states of its own, and weights are as they were.
"""

import os
import sys
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from ldm.checks import few
from ldm.data.part import first_images, part
from ldm.training.contract import build_dataset
from ldm.training.ema import EMA
from ldm.training.loader import loader_of
from ldm.training.loop_settings import LoopSettings
from ldm.training.order import mix_seed
from ldm.training.shapes import alike_batches
from ldm.training.stage import Stage
from ldm.util import instantiate_from_config, progress_bar


def hold_out(
    stage: Stage, config: Mapping[str, Any], dataset: Any, chosen: float | Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return what is trained on of a data set, and what is not; chosen: see `DataSettings.validation`."""
    if type(stage).validate is Stage.validate:
        raise ValueError(f"{type(stage).__name__} cannot be validated: leave out data.validation")
    if not isinstance(chosen, Mapping):
        held, order = round(chosen * len(dataset)), torch.randperm(len(dataset), generator=_generator(0)).tolist()
        if not 0 < held < len(dataset):
            raise ValueError(f"data.validation {chosen} of {len(dataset)} images leaves none on one of the two sides")
        return part(dataset, sorted(order[held:])), part(copy(dataset), sorted(order[:held]))  # with an epoch each
    params = dict(config.get("params") or {})
    if params | dict(chosen) == params:
        raise ValueError(f"data.validation {dict(chosen)} changes nothing: these are the images that are trained on")
    other = build_dataset(stage, {**config, "params": params | dict(chosen)})
    shapes = [tuple(images[0]["image"].shape) for images in (dataset, other)]
    if shapes[0] != shapes[1] and getattr(dataset, "groups", None) is None:
        raise ValueError(f"the images of data.validation are {shapes[1]}, and those to train on {shapes[0]}")
    classes = [list(getattr(images, "classes", ())) for images in (dataset, other)]
    if classes[0] != classes[1]:
        raise ValueError(
            f"data.validation has the classes {few(classes[1])}, and the data to train on {few(classes[0])}"
        )
    files = [set(map(os.path.realpath, getattr(images, "paths", ()))) for images in (dataset, other)]
    if both := sorted(files[0] & files[1]):
        raise ValueError(f"{len(both)} files of data.validation are also trained on: {both[0]}; use others")
    return dataset, other


class Validation:
    """The validation of a stage on a data set. Images whose "loss" is not finite are counted, and left out of means.

    Args:
        batch_size: of images at a time, on which results do not depend, up to rounding.
        workers: processes that load data.
        both: also validate the weights that train, not only their average.
    """

    def __init__(self, stage: Stage, dataset: Any, batch_size: int, workers: int = 0, both: bool = False) -> None:
        count = stage.validation_count(len(dataset))
        self.stage, self.workers, self.both = stage, workers, both
        self.dataset = part(stage.cached(dataset), [i % len(dataset) for i in range(count)])
        self.places = (torch.randperm(count, generator=_generator(1)).double() + 0.5) / count
        self.batches = alike_batches(self.dataset, stage.validation_batch or batch_size)

    def report(self, average: EMA, accelerator: Any) -> dict[str, float]:
        """Return the means for the averaged weights, and for those that train if `both`, by their names."""
        self.stage.train(False)
        with average.applied():
            found = {f"validation/{k}": v for k, v in self.measure(accelerator).items()}
        if self.both:
            found |= {f"validation_training_weights/{k}": v for k, v in self.measure(accelerator).items()}
        self.stage.train()
        return found

    @torch.no_grad()
    def measure(self, accelerator: Any = None, batches: int | None = None) -> dict[str, float]:
        """Return the means over the data set, or over its first batches, which the processes share out."""
        from accelerate.utils import gather_object, send_to_device

        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        device, own, found = self.stage.device, self.batches[rank:batches:count], []
        loader = loader_of(self.dataset, self.workers, batch_sampler=own)
        with _own_random_state(device):
            bar = progress_bar(loader, desc="validating", unit="batch", delay=2)
            for number, (images, batch) in enumerate(zip(own, bar, strict=True)):
                torch.manual_seed(mix_seed(2, rank + number * count))  # of what a network or data set may take besides
                noise = [_generator(3, i) for i in images]
                values = self.stage.validate(send_to_device(batch, device), self.places[images], noise)
                found.append((rank + number * count, {name: value.double().cpu() for name, value in values.items()}))
        found = sorted(gather_object(found) if count > 1 else found, key=lambda pair: pair[0])
        values = {name: torch.cat([values[name] for _, values in found]) for name in found[0][1]}
        lost = ~values["loss"].isfinite()
        if lost.any() and rank == 0:
            which = f"the loss of {int(lost.sum())} of {len(lost)} images is not finite"
            print(f"note: validation: {which}: they are left out of the means", file=sys.stderr)
        means = {name: torch.where(lost, torch.nan, value).nanmean().item() for name, value in values.items()}
        return means | ({"not_finite": int(lost.sum())} if lost.any() else {})


def make_validation(stage: Stage, dataset: Any | None, settings: Any) -> Validation | None:
    """Return the validation on a data set; None without one, and ValueError if the settings, of the loop, need it."""
    if dataset is not None:
        return Validation(stage, dataset, settings.batch_size, settings.workers, settings.validate_both)
    if settings.validate_every is not None or settings.validate_both:
        raise ValueError("loop.validate_every and loop.validate_both need data.validation: a share, or a folder's root")
    return None


def make_quality(stage: Stage, dataset: Any, settings: Any) -> Any:
    """Return what the settings of the loop name to measure generated images by, beside those of a data set, or None."""
    if settings.quality is None:
        if settings.quality_every is not None:
            raise ValueError("loop.quality_every needs loop.quality: what to measure generated images by")
        return None
    model = getattr(stage, "latent_diffusion", None)
    if model is None:
        raise ValueError(f"{type(stage).__name__} trains no model that generates images: leave out loop.quality")
    quality = instantiate_from_config(settings.quality, model=model, dataset=copy(dataset))
    if not hasattr(quality, "measure"):
        raise ValueError(
            f"loop.quality {settings.quality['target']} measures no images: use ldm.evaluation.quality.Quality"
        )
    return quality


def measurements(
    stage: Stage, dataset: Any, held_out: Any | None, settings: Any, accelerator: Any
) -> list[tuple[int, Callable[[EMA], dict[str, float]]]]:
    """Return what `make_measurements` does."""
    found = []
    if validation := make_validation(stage, held_out, settings):
        every = settings.validate_every or settings.preview_every
        found.append((every, lambda average: validation.report(average, accelerator)))
    quality = make_quality(stage, dataset if held_out is None else held_out, settings)
    if quality is not None and accelerator.is_main_process:
        every = settings.quality_every or settings.preview_every
        found.append((every, lambda average: quality_of(quality, stage, average)))
    return found


def try_measurements(stage: Any, dataset: Any, held_out: Any | None, settings: LoopSettings) -> None:
    """Measure once on two images what the settings of the loop ask for."""
    some = None if held_out is None else first_images(held_out, 2)
    if validation := make_validation(stage, some, replace(settings, batch_size=2, workers=0)):
        validation.measure(batches=1)
    if quality := make_quality(stage, dataset if held_out is None else held_out, settings):
        quality.measure(2, steps=min(2, stage.latent_diffusion.schedule.T))


def quality_of(quality: Any, stage: Stage, average: EMA) -> dict[str, float]:
    """Return the figures of images that the averaged weights generate, by their names."""
    stage.train(False)
    with average.applied(), _own_random_state(stage.device):
        found = {f"quality/{name}": value for name, value in quality.measure().items()}
    stage.train()
    return found


def _own_random_state(device: torch.device) -> Any:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seed(*numbers))
