"""The `loop:` part of a training configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from ldm.checks import Decay, Positive, Range
from ldm.training.lr_scheduler import lr_multiplier
from ldm.util import call_with

LARGEST_STEP = 2**16  # images of a training step in a process: more than any published


@dataclass
class LoopSettings:
    """The `loop:` part of a configuration."""

    steps: Positive  # training steps
    batch_size: Positive  # of each process
    accumulate: Annotated[int, Range(1, 2**16)] = 1  # batches in a training step
    # fp32, bf16, fp16 (on a GPU), or auto: bf16 where the hardware computes in it
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    clip: Annotated[float, Range(1e-9)] = 1.0  # maximum gradient norm
    compile: bool = False  # by torch.compile: the networks' part of a step is faster, after a minute or more at first
    gradient_checkpointing: bool = False  # less memory, a third more work: blocks compute their activations twice
    ema: Decay = 0.999  # decay of the average of the weights, which is the result; 0 keeps none
    ema_device: Literal["auto", "cpu"] = "auto"  # where it is kept: with the weights, or on the CPU
    ema_snapshots: Annotated[int, Range(0)] = 0  # steps between those for `ldm convert --sigma-rel`; 0: none
    # Arguments of `lr_multiplier`; null is the same as this.
    lr_schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    log_every: Positive = 50  # steps between lines of metrics.jsonl
    preview_every: Positive = 500  # steps between images in previews/
    save_every: Positive = 500  # steps between states to resume from
    keep_every: Annotated[int, Range(0)] = 0  # steps between checkpoints kept as model-STEP.safetensors; 0: none
    keep_state: bool = True  # whether a finished run keeps resume.pt, so that it can go on with more steps
    validate_every: Positive | None = None  # steps between measurements on data.validation; None: as between previews
    validate_both: bool = False  # whether to measure the weights that train there too, besides their average
    quality: Mapping[str, Any] | None = None  # measures generated images: target and params, such as of `Quality`
    quality_every: Positive | None = None  # steps between these measurements; None: as between previews
    workers: Annotated[int, Range(0, 256)] = 0  # processes that load data
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # besides metrics.jsonl

    def __post_init__(self) -> None:
        if (images := self.batch_size * self.accumulate) > LARGEST_STEP:
            raise ValueError(
                f"loop.batch_size {self.batch_size} times loop.accumulate {self.accumulate} are {images:,} images in "
                f"each training step: at most {LARGEST_STEP:,} are possible"
            )
        if self.validate_both and self.ema == 0:
            raise ValueError(
                "loop.validate_both has no effect with loop.ema 0: there is no average besides the weights"
            )
        if self.report_to == "wandb" and find_spec("wandb") is None:
            raise ValueError("loop.report_to wandb needs a package that is not installed: pip install wandb")
        call_with("loop.lr_schedule", lr_multiplier, self.lr_schedule, step=0, steps=self.steps)

    @property
    def measures(self) -> bool:
        """Whether they ask for more than the loss on what is trained on."""
        asked = self.validate_every, self.quality, self.quality_every
        return self.validate_both or any(value is not None for value in asked)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LoopSettings":
        """Return the checked `loop:` part of a configuration."""
        loop = config["loop"]
        if isinstance(loop, Mapping) and loop.get("lr_schedule", "") is None:  # as if it were not given: constant
            loop = {key: value for key, value in loop.items() if key != "lr_schedule"}
        if isinstance(loop, Mapping) and "report_to" not in loop and isinstance(loop.get("tensorboard"), bool):
            loop = dict(loop)  # of before there was another
            loop["report_to"] = "tensorboard" if loop.pop("tensorboard") else "none"
        return call_with(f"loop of {config['name']!r}", cls, loop)
