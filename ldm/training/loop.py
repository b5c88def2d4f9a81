"""THE training loop. Every stage is trained by it: one process on a laptop, or many under torchrun.

Exact resume: the data order is a function of (seed, epoch), captions and augmentation of (seed, epoch, index), and all
other randomness of (seed, batch number); state is saved between training steps. So a run that was interrupted and
resumed ends with the same weights as an uninterrupted one (bit for bit on a CPU with the same number of threads).
"""

import math
import signal
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ldm.training.contract import build_dataset
from ldm.training.ema import EMA
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.order import EpochBatches, mix_seed, training_batches
from ldm.training.run_folder import RunFolder
from ldm.training.stage import Stage, Trained
from ldm.util import call_with, instantiate_from_config, pick_device

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass
class LoopSettings:
    """The `loop:` part of a configuration."""

    steps: int  # training steps
    batch_size: int  # of each process
    accumulate: int = 1  # batches in a training step
    precision: str = "auto"  # fp32, bf16, fp16 (on a GPU), or auto: bf16 where the hardware computes in it
    clip: float = 1.0  # maximum gradient norm
    ema: float = 0.999  # decay of the average of the weights, which is the result; 0 keeps none
    # Arguments of `lr_multiplier`.
    lr_schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    log_every: int = 50  # steps between lines of metrics.jsonl
    preview_every: int = 500  # steps between images in previews/
    save_every: int = 500  # steps between states to resume from
    workers: int = 0  # processes that load data
    tensorboard: bool = True  # whether to write TensorBoard's file

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "preview_every", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"loop.{name} is {getattr(self, name)!r}: it must be an integer of at least 1")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"loop.precision {self.precision!r} is unknown: use auto, fp32, bf16 or fp16")
        if not 0 <= self.ema < 1 or not self.clip > 0:
            raise ValueError(f"loop.ema {self.ema} must be from 0 to below 1, and loop.clip {self.clip} above 0")
        call_with("loop.lr_schedule", lr_multiplier, self.lr_schedule, step=0, steps=self.steps)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LoopSettings":
        """Return the checked `loop:` part of a configuration."""
        return call_with(f"loop of {config['name']!r}", cls, config["loop"])


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says how to resume."""


def train(config: dict[str, Any], resume: bool = False, device: str = "auto", **stage_params: Any) -> Path:
    """Train one stage and return the path of its checkpoint.

    Args:
        config: resolved, with name, outdir, seed, stage, data and loop.
        resume: continue an interrupted run; a finished one is left as it is.
        device: auto, cpu, cuda or mps.
        stage_params: arguments of the stage instead of the configuration's, such as a model that is already loaded.

    Raises:
        ValueError: for bad settings, and when the loss is no longer finite.
        Interrupted: after Ctrl-C.
    """
    from accelerate.utils import send_to_device

    name, seed, settings = config["name"], config["seed"], LoopSettings.of(config)
    accelerator = make_accelerator(settings, pick_device(device))
    folder = RunFolder(Path(config["outdir"]) / name, config, resume, accelerator.is_main_process)
    if folder.finished:
        return folder.model

    torch.manual_seed(seed)
    stage = instantiate_from_config(config["stage"], **stage_params).to(accelerator.device).train(False)
    with accelerator.main_process_first():  # it writes files that the others then find
        dataset = build_dataset(stage, config["data"])
    dataset = stage.prepare(dataset)
    trained = Trained(stage.to(accelerator.device).train())  # again: `prepare` may add networks
    average = EMA(trained, settings.ema)
    model, *optimizers = accelerator.prepare(trained, *stage.optimizers())
    scaler = accelerator.scaler  # of gradients in fp16, else None
    if scaler is not None and len(optimizers) > 1:  # each changes the scale that the others' gradients already have
        raise ValueError(f"precision fp16 is for one optimizer, and {name!r} has {len(optimizers)}: use bf16")
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    ranks, groups = (accelerator.process_index, accelerator.num_processes), getattr(dataset, "groups", None)
    order = EpochBatches(len(dataset), settings.batch_size, seed, *ranks, groups)
    parts = {"networks": trained, "ema": average} | {f"optimizer_{k}": part for k, part in enumerate(optimizers)}
    parts |= {} if scaler is None else {"scaler": scaler}
    step = load_state(folder, parts) if resume else 0
    accelerator.wait_for_everyone()  # until every process has read the folder
    folder.begin(config, step, settings.tensorboard)
    metrics = Metrics(name, folder)

    bar = {"initial": step, "total": settings.steps, "desc": name, "unit": "step", "mininterval": 1}
    with InterruptFlag() as interrupted, closing(folder), tqdm(**bar, disable=not folder.writes) as progress:
        for number, batch in training_batches(dataset, order, step * settings.accumulate, settings.workers):
            if step >= settings.steps:
                break
            torch.manual_seed(mix_seed(seed, number, accelerator.process_index))
            batch, shared = send_to_device(batch, accelerator.device), None
            with accelerator.accumulate(model):
                for k, optimizer in enumerate(optimizers):
                    loss, values, shared = model(batch, k, number, shared)
                    accelerator.backward(loss)
                    metrics.add(values)
                    for group, rate in zip(optimizer.param_groups, rates[k], strict=True):
                        group["lr"] = rate * lr_multiplier(step, settings.steps, **settings.lr_schedule)
                    if accelerator.sync_gradients:
                        parameters = [p for group in optimizer.param_groups for p in group["params"]]
                        norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                        if scaler is None or norm.isfinite():  # otherwise the scaler skips the step
                            metrics.add({f"grad_norm_{k}": norm})
                    optimizer.step()
                    optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            average.update()
            step += 1
            progress.update()
            last = step == settings.steps
            if last or step % settings.log_every == 0:
                progress.set_postfix(metrics.report(step), refresh=False)
            if last or step % settings.preview_every == 0:
                preview(stage, average, folder, step)
            stop = agreed(accelerator, interrupted.is_set())
            if stop or (not last and step % settings.save_every == 0):
                metrics.report(step)  # raises before a state that is not finite is saved
                folder.save_state({"step": step} | {key: part.state_dict() for key, part in parts.items()})
            if stop:
                raise Interrupted(
                    f"stopped at step {step}, saved in {folder.state}: resume by the same command with --resume"
                )

    with average.applied():
        stage.train(False)
        stage.finish(dataset)
        folder.finish(*stage.export())
    accelerator.wait_for_everyone()  # the next stage reads what the main process writes
    accelerator.free_memory()
    return folder.model


def processes(device: str) -> "PartialState":
    """Return accelerate's state of the run's processes: which is the main one, and how to wait for each other.

    Call it before `train`, because accelerate keeps its first state. device: as `train` takes it.
    """
    from accelerate import PartialState

    # The others wait while one generates class images, which takes longer than torch's default timeout.
    return PartialState(cpu=pick_device(device).type == "cpu", timeout=timedelta(hours=12))


def make_accelerator(settings: LoopSettings, device: torch.device) -> Any:
    """Return accelerate's front end for these settings; raise ValueError if it uses another device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state()  # accelerate keeps those of the stage before in the process
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(settings.precision, device),
        gradient_accumulation_steps=settings.accumulate,
        cpu=device.type == "cpu",
        # With several processes: the loss for one optimizer does not use the network of the other.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.device.type != device.type or device.index not in (None, accelerator.device.index):
        raise ValueError(f"training on {str(device)!r} is not possible here: accelerate gives {accelerator.device}")
    return accelerator


def agreed(accelerator: Any, flag: bool) -> bool:
    """Return whether any process has set its flag; if only some stopped, the others would wait for them."""
    if accelerator.num_processes == 1:
        return flag
    if flag:
        accelerator.set_trigger()
    return accelerator.check_trigger()


class Metrics:
    """Means over the main process's batches since the last report, logged as a JSON line and TensorBoard points."""

    def __init__(self, stage: str, folder: RunFolder) -> None:
        self.stage, self.folder, self.values = stage, folder, {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def report(self, step: int) -> dict[str, str]:
        """Log the means and return the first few for the progress bar; raise ValueError if one is not finite."""
        means = {name: torch.stack(values).float().mean().item() for name, values in self.values.items()}
        self.values = {}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(
                    f"{self.stage}: {name} became {mean} by step {step}, so training stopped; the last saved state is "
                    f"in {str(self.folder.path)!r}: continue with --resume and a lower learning rate, or "
                    "loop.precision=fp32"
                )
        if means:
            self.folder.log(step, means)
        return {name: f"{mean:.4g}" for name, mean in list(means.items())[:3]}


def load_state(folder: RunFolder, parts: Mapping[str, Any]) -> int:
    """Load a saved state into the parts of a run and return its step; 0 if nothing is saved yet.

    Randomness and data order are functions of the step. A run that was saved in another precision than the fp16 it is
    resumed in begins with the scaler's initial scale.
    """
    state = folder.load_state()
    if state is None:
        return 0
    if "optimizers" in state:  # as it was first saved in version 0.1.0
        state["stage"].pop("batches", None)
        optimizers = {f"optimizer_{k}": saved for k, saved in enumerate(state["optimizers"])}
        state |= {"networks": state["stage"], **optimizers}
    try:
        for key, part in parts.items():
            if state.get(key) is not None or key != "scaler":
                part.load_state_dict(state[key])
    except (KeyError, ValueError, RuntimeError):
        raise ValueError(
            f"cannot resume from {str(folder.state)!r}, which another version of ldm saved: resume with that version, "
            "or start again in another output folder"
        ) from None
    return state["step"]


@torch.no_grad()
def preview(stage: Stage, average: EMA, folder: RunFolder, step: int) -> None:
    """Write the preview of the averaged weights, in eval mode."""
    with average.applied():
        stage.train(False)
        folder.preview(step, stage.preview(), stage.preview_columns, stage.preview_labels())
        stage.train()


def mixed_precision(precision: str, device: torch.device) -> str:
    """Return accelerate's name for a precision; `auto` is bf16 only where the hardware computes in it.

    Raises ValueError for fp16 without a GPU, where it is slower than float32 and accelerate refuses it.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 trains on CUDA GPUs, not on {str(device)!r}: use bf16 or fp32")
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch has private functions for CPUs, in some versions
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if device.type == "cpu" else ()
        native = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return "bf16" if native else "no"


class InterruptFlag:
    """In the block, the first Ctrl-C sets the flag, to stop between training steps; a second one interrupts at once."""

    def __enter__(self) -> threading.Event:
        self.event, self.previous = threading.Event(), None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._handle)
        return self.event

    def _handle(self, number: int, frame: Any) -> None:
        self.event.set()
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *exception: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
