"""The folder of a run: configuration, metrics, previews, the state to resume from, and the finished checkpoint.

OUTDIR/STAGE/config.yaml  left_out.txt  metrics.jsonl  events.out.tfevents...  previews/000500.png  resume.pt
             model-000500.safetensors  model.safetensors
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ldm.checkpoint.atomic import Lock, explained, sweep, write_png, write_text
from ldm.checkpoint.file import STEP_KEY, checkpoint_at, file_hash, newest_checkpoint
from ldm.checkpoint.writing import save_file, save_torch
from ldm.checks import shorten
from ldm.images import image_grid
from ldm.input_files import escaped
from ldm.labels import Row, labelled_rows

# Settings that name files whose weights a run is built on: they must hold the same when it goes on.
BUILT_ON = re.compile(r"stage\.params\.(first_stage|cond_stage|start|perceptual|ckpt|loading\.(vae|unet|config|vocab))")

SNAPSHOTS = "ema"  # the folder of `ldm.training.snapshots`'s

# Names of what a run's folder holds, in which another run may have its folder.
TAKEN = re.compile(
    r"\.lock|\..*\.tmp|config\.yaml|left_out\.txt|metrics\.jsonl|events\..*|wandb|previews|ema|resume\.pt|model.*\.safetensors"
)


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name of a run's folder."""
    if not name.strip(" .") or any(letter in "/\\" or not letter.isprintable() for letter in name):
        raise ValueError(f"the name {shorten(repr(name))} must be that of one folder, to be made in outdir")
    if TAKEN.fullmatch(name):
        raise ValueError(f"the name {name!r} is that of a file or folder which each run has: use another")


class RunFolder:
    """A run's files, locked while it trains; refuses a folder that holds another run, or this one without `resume`.

    Attributes:
        finished: whether the result is there, of as many steps as the configuration asks for.
        before: hashes of the files that the saved state is built on, by their settings.
        built_on: the same now, which is saved.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool, writes: bool) -> None:
        """`writes`: False in all but the main process of a distributed run."""
        check_name(path.name)
        self.path, self.writes, self.trackers = path, writes, []
        self.model, self.state, self.metrics = path / "model.safetensors", path / "resume.pt", path / "metrics.jsonl"
        refusal = f"{str(path)!r} is being trained in by another process: wait for its end, or choose another folder"
        self.lock = Lock(path, refusal) if writes else None
        try:
            self.finished, self.before = False, {}
            if self.state.exists() or newest_checkpoint(path) is not None:  # else it is new, or was killed before that
                from ldm.training.resuming import built_on, is_finished  # only a run that goes on needs it

                self.finished, self.before = is_finished(self, config, resume), built_on(self)
            self.built_on = self._checked_files(config) if writes or self.before else {}
        except BaseException:
            self.close()
            raise

    def _checked_files(self, config: dict[str, Any]) -> dict[str, str]:
        """Return the hashes of the files that the run is built on; ValueError if one has changed since it began."""
        files = files_of(config)
        found = {key: file_hash(path) for key, path in files.items()}
        for key, now in found.items():
            if (before := self.before.get(key, now)) != now:
                raise ValueError(
                    f"{str(self.path)!r} was started with other weights of {key}: {str(files[key])!r} is not the file "
                    f"that it was then (its SHA-256 begins with {now}, and began with {before}): resume with that "
                    "file, or choose another output folder"
                )
        return found

    def begin(self, config: dict[str, Any], step: int, accelerator: Any, *datasets: Any) -> None:
        """Write the configuration, and what data sets leave out, once all is built: a mistake leaves no run behind."""
        if not self.writes:
            return
        latest = self.path / "wandb" / "latest-run"  # a link to run-DATE-ID
        known = {"id": latest.resolve().name.rpartition("-")[2]} if step > 0 and latest.exists() else {}
        options = {
            "tensorboard": {"purge_step": step + 1},  # drops what an interrupted run wrote later
            "wandb": {"name": config["outdir"], "dir": str(self.path), "config": config, "resume": "allow", **known},
        }
        try:
            accelerator.init_trackers(config["name"], init_kwargs=options)
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            raise ValueError(
                f"wandb does not start ({error}): run `wandb login`, set WANDB_MODE=offline, or change loop.report_to"
            ) from None
        self.trackers = accelerator.trackers
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(escaped(config))))
        for folder in (self.path, self.path / "previews"):
            sweep(folder)
        path = self.path / "left_out.txt"
        if lines := dict.fromkeys(line for data in datasets for line in getattr(data, "left_out", ())):
            write_text(path, "\n".join([*lines, ""]))
            print(f"note: {path} lists all that is left out", file=sys.stderr)
        else:
            path.unlink(missing_ok=True)  # of an earlier start

    @property
    def has_remains(self) -> bool:
        """Whether an earlier start left a state, or what is to be cut back to one."""
        return any(path.exists() for path in (self.state, self.metrics, self.path / SNAPSHOTS))

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state, atomically."""
        if not self.writes:
            return
        save_torch(self.state, {"built_on": self.built_on} | state)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a JSON line, and a point of each tracker for each value."""
        if not self.writes:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        with explained(self.metrics, len(line)), open(self.metrics, "a") as file:
            file.write(line)
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def preview(self, step: int, images: list[Image.Image], columns: int, labels: Sequence[str] = ()) -> None:
        """Write the images on a grid, each row under its label if there are any, as a PNG and to the trackers."""
        if not self.writes:
            return
        path = self.path / "previews" / f"{step:06d}.png"
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        labelled = [Row(*both) for both in zip(labels, rows, strict=True)] if labels else []
        grid = labelled_rows(labelled) if labelled else image_grid(images, columns)
        write_png(path, grid)
        for tracker in self.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"preview": numpy.array(grid.convert("RGB"))[None]}, step=step, **options)

    def save_model(self, path: Path, step: int, config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint of the run, the result or one on the way."""
        if self.writes:
            save_file(path, tensors, config, metadata={STEP_KEY: str(step)})

    def remove_state(self) -> None:
        """Remove the state of a finished run."""
        if self.writes:
            self.state.unlink(missing_ok=True)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        if self.lock is not None:
            self.lock.release()


def files_of(config: dict[str, Any]) -> dict[str, Path]:
    """Return the files that a run is built on by their settings, in BUILT_ON, as far as they exist."""
    named = {k: v for k, v in flatten(config).items() if BUILT_ON.fullmatch(k) and isinstance(v, str) and v}
    files = {key: checkpoint_at(text) for key, text in named.items()}
    return {key: path for key, path in files.items() if path.exists()}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists to {"a.b.0": value}."""
    if not isinstance(config, dict | list) or not config:
        return {prefix: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
