"""The processes of a run: their accelerator, what they agree on, and the signals that ask them to stop."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.util import computes_in_bf16, pick_device

if TYPE_CHECKING:
    from accelerate import PartialState


def processes(device: str) -> "PartialState":
    """Return accelerate's state of the run's processes: which is the main one, and how to wait for each other.

    Call it before `train`, because accelerate keeps its first state. device: as `train` takes it.
    """
    from accelerate import PartialState

    # The others wait while one generates class images, which takes longer than torch's default timeout.
    return PartialState(cpu=pick_device(device).type == "cpu", timeout=timedelta(hours=12))


def make_accelerator(precision: str, accumulate: int, device: torch.device, report_to: str, outdir: Path) -> Any:
    """Return accelerate's front end for these settings; raise ValueError if it uses another device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()  # accelerate keeps those of the stage before in the process
    GradientState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed_precision(precision, device),
        gradient_accumulation_steps=accumulate,
        cpu=device.type == "cpu",
        log_with=None if report_to == "none" else report_to,
        project_dir=outdir,
    )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        from ldm.training.fsdp import use_fsdp  # only where it is asked for

        use_fsdp(accelerator)
    if accelerator.device.type != device.type or device.index not in (None, accelerator.device.index):
        raise ValueError(f"training on {str(device)!r} is not possible here: accelerate gives {accelerator.device}")
    return accelerator


def prepared(accelerator: Any, trained: Any, optimizers: Sequence[Any]) -> list[Any]:
    """Return what trains, a `Trained`, and its optimizers, as accelerate wraps them for these processes.

    DDP waits for the gradient of each weight. That of a weight which the loss does not use would never come, so it can
    look for these in every step, and warns where it finds none. They are there with several optimizers, as the loss of
    one does not use the network of another; and where a text encoder trains, or adapters of one in a model that is
    loaded to be tuned: the context may be taken before its last layer, and its logit scale is CLIP's.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    text = any(hasattr(network, "tokenizer") for network in trained.stage.networks.values())
    some_unused = len(optimizers) > 1 or text or not trained.stage.rehearses
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=some_unused)
    return list(accelerator.prepare(trained, *optimizers))


def agreed(accelerator: Any, flag: bool) -> bool:
    """Return whether any process has set its flag; if only some stopped, the others would wait for them."""
    if accelerator.num_processes == 1:
        return flag
    if flag:
        accelerator.set_trigger()
    return accelerator.check_trigger()


@contextmanager
def lost_processes_named(accelerator: Any, run: Path) -> Iterator[None]:
    """Raise one sentence where another process has ended, without which those that remain cannot go on."""
    try:
        yield
    except RuntimeError as error:
        backends = ("gloo", "NCCL", "closed by peer", "reset by peer")
        if accelerator.num_processes == 1 or not any(name in str(error) for name in backends):
            raise
        raise ConnectionError(
            f"another of the {accelerator.num_processes} processes has ended, or cannot be reached, so process "
            f"{accelerator.process_index} ends too: the run is in {str(run)!r}; continue it by the same command with "
            "--resume, on any number of processes"
        ) from error


def mixed_precision(precision: str, device: torch.device) -> str:
    """Return accelerate's name for a precision; `auto` is bf16 only where the hardware computes in it.

    Raises ValueError for fp16 without a GPU, where it is slower than float32 and accelerate refuses it.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 trains on CUDA GPUs, not on {str(device)!r}: use bf16 or fp32")
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    return "bf16" if computes_in_bf16(device) else "no"


class StopFlag:
    """In the block, the first Ctrl-C or SIGTERM sets the flag, to stop between training steps; a second acts at once.

    Schedulers and containers end a program by SIGTERM, some seconds before SIGKILL.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> threading.Event:
        self.event = threading.Event()
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self.event

    def _handle(self, number: int, frame: Any) -> None:
        self.event.set()
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, previous in self.previous.items():
            signal.signal(number, previous)
