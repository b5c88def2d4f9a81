"""The folder of a run: configuration, metrics, previews, the state to resume from, and the finished checkpoint.

OUTDIR/STAGE/config.yaml  metrics.jsonl  events.out.tfevents...  previews/000500.png  resume.pt  model.safetensors
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ldm.checkpoint.atomic import atomic, sweep
from ldm.checkpoint.file import save_file, save_torch
from ldm.images import Row, image_grid, labelled_rows
from ldm.util import escaped

# Settings that a resumed run may change: they affect the training that remains, not the past or the data.
FREE = tuple(f"loop.{name}" for name in ("steps", "precision", "clip", "lr_schedule", "log_every", "preview_every"))
FREE += ("loop.save_every", "loop.workers", "loop.tensorboard", "stage.params.learning_rate")


class RunFolder:
    """A run's files; refuses a folder that holds another run, or this one without `resume`."""

    def __init__(self, path: Path, config: dict[str, Any], resume: bool, writes: bool) -> None:
        """`writes`: False in all but the main process of a distributed run."""
        self.path, self.writes, self.writer = path, writes, None
        self.model, self.state, self.metrics = path / "model.safetensors", path / "resume.pt", path / "metrics.jsonl"
        self._check(config, resume)

    def _check(self, config: dict[str, Any], resume: bool) -> None:
        saved = self.path / "config.yaml"
        if not saved.exists():
            return
        if not resume:
            raise ValueError(
                f"{str(self.path)!r} already holds a run: continue it with --resume, or choose another output folder"
            )
        before, now = flatten(OmegaConf.to_container(OmegaConf.load(saved), resolve=True)), flatten(config)
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        fixed = [key for key in changed if not key.startswith(FREE)]
        if fixed:
            few = ", ".join(fixed[:5]) + (f" and {len(fixed) - 5} more" if len(fixed) > 5 else "")
            raise ValueError(
                f"{str(self.path)!r} was started with other settings of {few}: resume with those, or "
                "choose another output folder"
            )
        if changed and not self.finished:
            print(f"{self.path}: resumed with other settings of {', '.join(changed)} than it was started with")

    def begin(self, config: dict[str, Any], step: int, tensorboard: bool) -> None:
        """Write the configuration, once the stage and its data are built: a mistake leaves no run behind."""
        if not self.writes:
            return
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.path, purge_step=step + 1)  # drops what an interrupted run wrote later
        with atomic(self.path / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(escaped(config)), temporary)
        sweep(self.path)

    @property
    def finished(self) -> bool:
        return self.model.exists()

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state, atomically."""
        if not self.writes:
            return
        save_torch(self.state, state)

    def load_state(self) -> dict[str, Any] | None:
        """Return the saved state, or None, and cut the metrics back to it; no pickled code is run."""
        state = None
        if self.state.exists():
            try:
                state = torch.load(self.state, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises half a dozen kinds for a damaged file
                raise ValueError(f"cannot resume from {str(self.state)!r}: the file is damaged ({error})") from None
        if self.writes:
            self._cut_metrics(0 if state is None else state["step"])
        return state

    def _cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and an incomplete one of a run that was killed."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        with atomic(self.metrics) as temporary:
            temporary.write_text("".join(kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a JSON line, and a TensorBoard point for each value."""
        if not self.writes:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def preview(self, step: int, images: list[Image.Image], columns: int, labels: Sequence[str] = ()) -> None:
        """Write the images on a grid, each row under its label if there are any, as a PNG and to TensorBoard."""
        if not self.writes:
            return
        path = self.path / "previews" / f"{step:06d}.png"
        rows = [images[i : i + columns] for i in range(0, len(images), columns)]
        labelled = [Row(*both) for both in zip(labels, rows, strict=True)] if labels else []
        grid = labelled_rows(labelled) if labelled else image_grid(images, columns)
        with atomic(path) as temporary:
            grid.save(temporary, format="PNG")
        if self.writer is not None:
            self.writer.add_image("preview", numpy.array(grid.convert("RGB")), step, dataformats="HWC")

    def finish(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the finished checkpoint, then remove the state to resume from."""
        if not self.writes:
            return
        save_file(self.model, tensors, config)
        self.state.unlink(missing_ok=True)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists to {"a.b.0": value}."""
    if not isinstance(config, dict | list) or not config:
        return {prefix: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
