"""The folder of a run: configuration, metrics, previews, the state to resume from, and the finished checkpoint.

OUTDIR/STAGE/config.yaml  metrics.jsonl  events.out.tfevents...  previews/000500.png  resume.pt  model.safetensors
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.file import atomic, save_file
from ldm.images import image_grid


class RunFolder:
    """Raises ValueError when the folder holds another run, or a run of its own that was not asked to be resumed."""

    def __init__(
        self, path: Path, config: dict[str, Any], resume: bool, tensorboard: bool = True, writes: bool = True
    ) -> None:
        """`writes`: False in all but the main process of a distributed run."""
        self.path, self.writes, self.tensorboard, self.writer = path, writes, tensorboard, None
        self.model, self.state, self.metrics = path / "model.safetensors", path / "resume.pt", path / "metrics.jsonl"
        if writes:
            self._check(config, resume)

    def _check(self, config: dict[str, Any], resume: bool) -> None:
        from omegaconf import OmegaConf

        saved = self.path / "config.yaml"
        if saved.exists() and not resume:
            raise ValueError(
                f"{str(self.path)!r} already holds a run: go on with it by --resume, or choose another outdir"
            )
        if saved.exists():
            before = OmegaConf.to_container(OmegaConf.load(saved))
            changed = sorted(k for k in flatten(before).keys() | flatten(config).keys()
                             if flatten(before).get(k) != flatten(config).get(k))  # fmt: skip
            if changed:
                raise ValueError(f"{str(self.path)!r} was begun with other settings of {', '.join(changed)}: "
                                 "resume with the same ones, or choose another outdir")  # fmt: skip
        else:
            with atomic(saved) as temporary:
                OmegaConf.save(OmegaConf.create(config), temporary)

    @property
    def finished(self) -> bool:
        return self.model.exists()

    def save_state(self, state: dict[str, Any]) -> None:
        """Written whole or not at all; the old state goes only then."""
        if not self.writes:
            return
        with atomic(self.state) as temporary:
            torch.save(state, temporary)

    def load_state(self) -> dict[str, Any] | None:
        """The saved state, and the metrics cut back to it; None when there is none. No pickled code is run."""
        if not self.state.exists():
            return None
        try:
            state = torch.load(self.state, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise ValueError(f"cannot resume from {str(self.state)!r}: the file is damaged ({error})") from None
        if self.metrics.exists():
            lines = [
                line for line in self.metrics.read_text().splitlines() if json.loads(line)["step"] <= state["step"]
            ]
            with atomic(self.metrics) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))
        return state

    def log(self, step: int, values: dict[str, float]) -> None:
        """One JSON line and one TensorBoard point per value."""
        if not self.writes:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                self._writer(step).add_scalar(name, value, step)

    def preview(self, step: int, images: list[Image.Image], columns: int) -> None:
        """The pictures on a grid, as a PNG and in TensorBoard."""
        if not self.writes:
            return
        path = self.path / "previews" / f"{step:06d}.png"
        grid = image_grid(images, columns)
        with atomic(path) as temporary:
            grid.save(temporary, format="PNG")
        if self.tensorboard:
            import numpy

            pixels = numpy.array(grid)
            self._writer(step).add_image("preview", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def _writer(self, step: int) -> Any:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.path, purge_step=step)  # drops what an interrupted run wrote beyond this
        return self.writer

    def progress(self, name: str, step: int, steps: int) -> tqdm:
        """A bar with rate and estimate, silent in all but the main process."""
        return tqdm(initial=step, total=steps, desc=name, unit="step", mininterval=1, disable=not self.writes)

    def finish(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the finished checkpoint; only then is the state to resume from superfluous."""
        if not self.writes:
            return
        save_file(self.model, tensors, config)
        self.state.unlink(missing_ok=True)
        if self.writer is not None:
            self.writer.close()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> {"a.b.0": value}."""
    if not isinstance(config, dict | list) or not config:
        return {prefix: config}
    items = config.items() if isinstance(config, dict) else enumerate(config)
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
