"""THE training loop. Every stage is trained by it: one process on a laptop, or many under `accelerate launch`.

Exact resume: the data order is a function of (seed, epoch), captions and augmentation of (seed, epoch, index), and all
other randomness of (seed, batch number); state is saved between optimizer steps. So a run that was interrupted and
resumed ends with the same weights as one left alone (bit for bit on a CPU with the same number of threads).
"""

import math
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.checkpoint.file import save_file
from ldm.training.ema import EMA
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.order import EpochBatches, batches, mix_seed
from ldm.training.run_folder import RunFolder
from ldm.util import instantiate_from_config


@dataclass
class LoopSettings:
    """The `loop:` part of a configuration; `steps` are optimizer steps, `batch_size` is per process and micro-batch."""

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: str = "auto"  # fp32, bf16, fp16, or auto: bf16 where the hardware computes it natively
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999
    lr_schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    log_every: int = 50
    preview_every: int = 500
    save_every: int = 500
    workers: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "preview_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} is {getattr(self, name)}: it must be at least 1")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"loop.precision {self.precision!r} is unknown: use auto, fp32, bf16 or fp16")
        lr_multiplier(0, self.steps, **self.lr_schedule)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says how to go on."""


def train(config: dict[str, Any], resume: bool = False, device: str = "auto") -> Path:
    """Train one stage from its resolved configuration (name, outdir, seed, stage, data, loop) -> its checkpoint's path.

    Raises ValueError for bad settings and when the loss stops being finite, Interrupted after Ctrl-C.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import send_to_device

    settings, seed = LoopSettings(**config["loop"]), config["seed"]
    AcceleratorState._reset_state()  # accelerate keeps the last stage's precision and accumulation in the process
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(settings.precision, device),
        gradient_accumulation_steps=settings.accumulate,
        cpu=device == "cpu",
    )
    main = accelerator.is_main_process
    folder = RunFolder(Path(config["outdir"]) / config["name"], config, resume, settings.tensorboard and main)
    if folder.finished:
        print(f"{config['name']}: already trained, {folder.model}")
        return folder.model

    torch.manual_seed(seed)
    dataset = instantiate_from_config(config["data"])
    stage = instantiate_from_config(config["stage"])
    dataset = stage.prepare(dataset, accelerator.device)
    stage.to(accelerator.device)
    average = EMA(stage, settings.ema)
    model, *optimizers = accelerator.prepare(stage, *stage.optimizers())
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    order = EpochBatches(len(dataset), settings.batch_size, seed, accelerator.process_index, accelerator.num_processes)

    step = 0
    if resume and (state := folder.load_state()) is not None:
        step = state["step"]
        stage.load_state_dict(state["stage"])
        average.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def save() -> None:
        if main:
            folder.save_state(
                {
                    "step": step,
                    "stage": stage.state_dict(),
                    "ema": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                }
            )

    sums: dict[str, torch.Tensor] = {}
    counted = 0

    def report() -> None:
        nonlocal sums, counted
        values = {name: total.item() / counted for name, total in sums.items()} if counted else {}
        sums, counted = {}, 0
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{config['name']}: {name} became {value} by step {step}; nothing was saved since the last good state: "
                    f"lower the learning rate, or resume from {folder.state} with another precision"
                )
        if values and main:
            folder.log(step, values)
            progress.set_postfix({k: f"{v:.4g}" for k, v in list(values.items())[:3]}, refresh=False)

    progress = tqdm(total=settings.steps, initial=step, desc=config["name"], unit="step", disable=not main, mininterval=1)
    with InterruptFlag() as interrupted, progress:
        for number, batch in batches(dataset, order, step * settings.accumulate, settings.workers):
            if step >= settings.steps:
                break
            torch.manual_seed(mix_seed(seed, number, accelerator.process_index))
            batch = send_to_device(batch, accelerator.device)
            with accelerator.accumulate(model):
                for k, optimizer in enumerate(optimizers):
                    loss, metrics = model(batch, k)
                    accelerator.backward(loss)
                    for group, rate in zip(optimizer.param_groups, rates[k], strict=True):
                        group["lr"] = rate * lr_multiplier(step, settings.steps, **settings.lr_schedule)
                    if accelerator.sync_gradients:
                        parameters = [p for group in optimizer.param_groups for p in group["params"]]
                        norm = accelerator.clip_grad_norm_(parameters, settings.clip)
                        metrics = {**metrics, f"grad_norm_{k}" if k else "grad_norm": norm}
                    optimizer.step()
                    optimizer.zero_grad()
                    for name, value in metrics.items():
                        sums[name] = sums.get(name, 0) + value.detach()
            counted += 1
            if not accelerator.sync_gradients:
                continue
            average.update()
            step += 1
            progress.update()
            if step % settings.log_every == 0 or step % settings.save_every == 0 or step == settings.steps:
                report()
            if main and (step % settings.preview_every == 0 or step == settings.steps):
                with average.applied():
                    show(stage, folder, step)
            if interrupted.is_set() or (step % settings.save_every == 0 and step < settings.steps):
                report()
                save()
            if interrupted.is_set():
                raise Interrupted(f"stopped at step {step}, saved in {folder.state}: the same command with --resume goes on")

    with average.applied():
        stage.eval()
        stage.finish(dataset)
        if main:
            model_config, tensors = stage.export()
            save_file(folder.model, tensors, model_config)
    folder.close()
    folder.state.unlink(missing_ok=True)
    accelerator.free_memory()
    return folder.model


@torch.no_grad()
def show(stage: Any, folder: RunFolder, step: int) -> None:
    """Write the stage's preview, in eval mode and without moving torch's random state."""
    stage.eval()
    with torch.random.fork_rng():
        folder.preview(step, stage.preview(), stage.preview_columns)
    stage.train()


def mixed_precision(precision: str, device: str) -> str:
    """accelerate's name for a precision; `auto` takes bf16 only where the hardware computes in it."""
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    if device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    native = "AVX512" in capability and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "no"


class InterruptFlag:
    """Within the block the first Ctrl-C sets the flag, so that the loop stops between steps; a second one interrupts at once."""

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
