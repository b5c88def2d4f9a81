"""Try all stages on two images before the first one trains: a mistake in the last should not show after hours."""

import io
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader

from ldm.checkpoint.writing import save_file
from ldm.cli import check_writable
from ldm.data.part import first_images
from ldm.training.datasets import build_datasets
from ldm.training.loop_settings import LoopSettings
from ldm.training.optimizers import average_of
from ldm.training.order import EpochBatches
from ldm.training.processes import mixed_precision
from ldm.training.run_folder import RunFolder, files_of, flatten
from ldm.training.stage import Stage
from ldm.util import get_obj_from_str, instantiate_from_config

# (configuration, stage, data set, that to validate on or None, device)
Inspect = Callable[[Mapping[str, Any], Stage, Any, Any, torch.device], None]


def rehearse(
    configs: Sequence[Mapping[str, Any]], resume: bool, device: torch.device, inspect: Inspect | None = None
) -> None:
    """Do everything that training does once, and one batch of it; raise ValueError for what does not work.

    Every stage is built with its real networks, tried, and thrown away. Where a later stage reads the checkpoint of an
    earlier one, that of the trial takes its place; a temporary folder stands for that of each stage. Finished stages
    are not tried, nor those that load a model to tune it (`Stage.rehearses`). inspect: is called with each that was.
    """
    with TemporaryDirectory(prefix="ldm-rehearsal-") as temporary:
        tried: dict[str, str] = {}  # folder of a stage -> that of its trial
        for number, config in enumerate(configs):
            LoopSettings.of(config)
            get_obj_from_str(config["data"]["target"])
            kind = get_obj_from_str(config["stage"]["target"])
            if not issubclass(kind, Stage):
                raise ValueError(f"{config['name']}: {config['stage']['target']} is not a stage of training")
            with redirect_stdout(io.StringIO()):  # its notes are training's
                folder = RunFolder(Path(config["outdir"]) / config["name"], dict(config), resume, writes=False)
            for path in (str(path) for path in (files_of(dict(config)).values() if folder.before else ())):
                if _moved(path, tried) != path:
                    raise ValueError(
                        f"{str(folder.path)!r} was started with the weights in {path!r}, and this command would train "
                        f"that stage on: give more steps to the later one only ({config['name']}.loop.steps=N), or "
                        "choose another output folder"
                    )
            if folder.finished or not kind.rehearses:
                continue
            tried[os.path.normpath(folder.path)] = trial = os.path.join(temporary, str(number))
            stage = _try({**config, "stage": _moved(config["stage"], tried)}, device, trial, inspect)
            later = flatten([other["stage"] for other in configs[number + 1 :]]).values()
            if os.path.normpath(folder.model) in (os.path.normpath(text) for text in later if isinstance(text, str)):
                made, state = stage.export()
                save_file(os.path.join(trial, folder.model.name), state, made)


def _try(config: Mapping[str, Any], device: torch.device, folder: str, inspect: Inspect | None) -> Stage:
    """Build a stage and its data, compute the loss of a batch, a preview and what is done at the end."""
    from accelerate.utils import send_to_device

    settings, name = LoopSettings.of(config), config["name"]
    mixed_precision(settings.precision, device)
    torch.manual_seed(config["seed"])
    try:
        with redirect_stderr(io.StringIO()):  # notes and bars are training's, which begins anew
            stage = instantiate_from_config(config["stage"]).to(device).train(False)
            if stage.cache_dir is not None:
                check_writable(Path(stage.cache_dir, "shard"))
            dataset, held_out = build_datasets(stage, config["data"])
            if stage.cache_dir is not None:
                stage.cache_dir = folder  # what an untrained network makes is of no use to others
            groups = getattr(dataset, "groups", None)
            EpochBatches(len(dataset), settings.batch_size, 0, groups=groups)
            prepared = stage.prepare(first_images(dataset, 2))
            stage.to(device)
            if settings.gradient_checkpointing:
                stage.checkpoint_blocks()
            alike = [i for i in range(min(2, len(dataset))) if groups is None or groups[i] == groups[0]]
            batch = send_to_device(next(iter(DataLoader(prepared, batch_sampler=[alike]))), device)
            shared = None
            optimizers = stage.optimizers()
            average_of(stage.networks, optimizers, settings.ema, settings.ema_device)
            if settings.ema_snapshots:
                from ldm.training.snapshots import ProfileAverages  # only this option needs it

                ProfileAverages(stage, settings.ema_snapshots)
            for k, _ in enumerate(optimizers):
                _, _, shared = stage.turn(batch, k, 0, shared)
            with torch.no_grad():
                stage.try_preview()
                if held_out is not None or settings.measures:
                    from ldm.training.validation import try_measurements  # only where it is asked for

                    try_measurements(stage, dataset, held_out, settings)
                stage.finish(prepared)
            if inspect is not None:
                inspect(config, stage, dataset, held_out, device)
            return stage
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # of a network that does not fit, or of the user's own module
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}"
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"{name}: does not train: {type(error).__name__}: {text} ({where})") from error


def _moved(value: Any, folders: Mapping[str, str]) -> Any:
    """Return a configuration with the paths within these folders moved into others."""
    if isinstance(value, Mapping):
        return {key: _moved(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, folders) for item in value]
    for folder, other in folders.items() if isinstance(value, str) else ():
        if os.path.normpath(value).startswith(folder + os.sep):
            return other + os.path.normpath(value)[len(folder) :]
    return value
