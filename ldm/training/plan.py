"""What the training of a stage takes: measured by a few real training steps, without writing anything.

Memory is that of tensors which live at the same time. What an operation uses for itself is not in it, nor what
allocators keep: glibc's takes up to a quarter more, and none with MALLOC_MMAP_THRESHOLD_=65536, which is slower.
"""

import json
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import RawIOBase
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ldm.checkpoint.file import CONFIG_KEY, STEP_KEY
from ldm.checkpoint.writing import bytes_of, write_tensors
from ldm.data.part import part
from ldm.training.latents import LatentDataset
from ldm.training.loader import training_batches
from ldm.training.loop_settings import LoopSettings
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.optimizers import average_of, clip_gradients
from ldm.training.order import EpochBatches
from ldm.training.processes import make_accelerator
from ldm.training.rehearsal import rehearse
from ldm.training.snapshots import ProfileAverages
from ldm.training.stage import Stage, Trained
from ldm.util import get_obj_from_str

TIMED_BATCHES, TIMED_SECONDS = 8, 30.0  # whichever is over first
SAFE = 0.8  # share of the free memory that a trial may be expected to take
_CPU = "_scaled_dot_product_flash_attention_for_cpu"  # which torch has no formula for
FLOPS = {
    **flop_registry,
    getattr(torch.ops.aten, _CPU): lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    getattr(torch.ops.aten, f"{_CPU}_backward"): lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(
        gradient.shape, q.shape, k.shape, v.shape
    ),
}


class Needs(NamedTuple):
    """What a training step takes, in one process."""

    flops: float
    activations: float  # bytes that the forward pass of a batch keeps for its backward pass
    transient: float  # most bytes of activations, gradients and all else that is made in the step, at one time


class Plan(NamedTuple):
    """What the training of a stage takes; memory and disk in bytes."""

    steps: int
    images_per_step: int  # of all processes
    images: int  # of the data set
    trained: int  # parameters
    frozen: int
    step: Needs
    seconds: float | None  # a training step; None where the free memory seems too small to try one
    memory: float  # at a step's peak: weights, optimizer, averages, and what is made in it
    free: int  # memory there is besides the weights
    parts: dict[str, float]  # of memory
    checkpointed: (
        tuple[float, float] | None
    )  # activations with and without gradient checkpointing, where it is possible
    latents: int  # that are encoded once and kept in memory
    files: dict[str, int]


class LiveTensors(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all storages that operations made on a device and that live: `now`, at the `peak`.

    torch's FlopCounterMode, which also knows the modules, fails where a loss has a gradient in it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kind, self.flops, self.now, self.peak = device.type, 0, 0, 0
        self.sizes: dict[int, int] = {}  # of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} | self.sizes.keys()
        made = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.device.type == self.kind and (key := _storage(x)) not in known:
                known.add(key)
                self.sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._drop, key)
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
        return made

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Trial:
    """A stage as the loop trains it, to try training steps of any batch size on a prepared data set."""

    def __init__(self, settings: LoopSettings, stage: Stage, dataset: Any, device: torch.device) -> None:
        self.settings, self.stage, self.dataset, self.device = settings, stage, dataset, device
        self.accelerator = make_accelerator(settings.precision, 1, device, "none", Path())
        self.trained, own = Trained(stage.to(device).train()), stage.optimizers()
        for group in (group for optimizer in own for group in optimizer.param_groups):
            group["lr"] *= lr_multiplier(0, settings.steps, **settings.lr_schedule)
        self.average = average_of(self.trained, own, settings.ema, settings.ema_device)
        where: Any = self.average.device
        every = settings.ema_snapshots
        self.profiles = ProfileAverages(stage, every, where) if every else None
        self.model, *self.optimizers = self.accelerator.prepare(self.trained, *own)
        self._turns(self._batch(min(2, settings.batch_size)))  # the optimizers make their state

    def state(self) -> dict[str, Any]:
        """Return what resume.pt holds."""
        parts: dict[str, Any] = {"networks": self.trained, "ema": self.average}
        parts |= {f"optimizer_{k}": optimizer for k, optimizer in enumerate(self.optimizers)}
        parts |= {} if self.profiles is None else {"profiles": self.profiles}
        return {"step": self.settings.steps} | {name: each.state_dict() for name, each in parts.items()}

    def _batch(self, size: int) -> Any:
        some = [i % len(self.dataset) for i in range(size)]
        return send_to_device(next(iter(DataLoader(self.dataset, batch_sampler=[some]))), self.device)

    def _turns(self, batch: Any, live: LiveTensors | None = None, backward: bool = True, update: bool = True) -> int:
        """Do the turns of all optimizers; return the bytes that the largest forward pass keeps, if they are counted."""
        kept, shared = 0, None
        for k, optimizer in enumerate(self.optimizers):
            before = 0 if live is None else live.now
            loss, _, shared = self.model(batch, k, 0, shared)
            kept = max(kept, 0 if live is None else live.now - before)
            if backward:
                self.accelerator.backward(loss)
            if backward and update:
                weights = [p for group in optimizer.param_groups for p in group["params"]]
                clip_gradients(self.accelerator, weights, self.settings.clip)
                optimizer.step()
                optimizer.zero_grad()
            del loss
        if backward and update:
            self.average.update()
        return kept

    def _measure(self, size: int) -> Needs:
        """Accumulated batches add to the same gradients, so two show the peak of any number."""
        batches = min(2, self.settings.accumulate)
        with LiveTensors(self.device) as live:
            kept = [self._turns(self._batch(size), live, update=number == batches - 1) for number in range(batches)]
        return Needs(live.flops / batches * self.settings.accumulate, max(kept), live.peak)

    def measure(self, free: float) -> tuple[Needs, bool]:
        """Return what a step takes, and whether it was tried at its full size.

        Batches are doubled while they can be expected to fit; beyond, every image more is taken to add as much.
        """
        wanted, sizes = self.settings.batch_size, [min(2, self.settings.batch_size)]
        found = [self._measure(sizes[0])]
        while sizes[-1] < wanted and (len(sizes) < 2 or 2 * found[-1].transient < SAFE * free):
            sizes.append(min(2 * sizes[-1], wanted))
            found.append(self._measure(sizes[-1]))
        if sizes[-1] == wanted:
            return found[-1], True
        step = Needs(*(_extend(sizes[-2:], pair, wanted) for pair in zip(*found[-2:], strict=True)))
        return step._replace(transient=max(step.transient, step.activations)), False

    def activations(self, checkpointing: bool) -> float:
        """Return the bytes that a forward pass keeps with gradient checkpointing or without."""
        self.stage.checkpoint_blocks(checkpointing)
        sizes, kept = sorted({min(size, self.settings.batch_size) for size in (2, 4)}), []
        for size in sizes:
            with LiveTensors(self.device) as live:
                kept.append(self._turns(self._batch(size), live, backward=False))
        return kept[0] if len(sizes) == 1 else _extend(sizes, kept, self.settings.batch_size)

    def seconds(self) -> float:
        """Return the seconds of a training step, its loading included, by the median of a few batches."""
        own: dict[str, Any] = {name: getattr(self.dataset, name, None) for name in ("groups", "shuffled")}
        order = EpochBatches(len(self.dataset), self.settings.batch_size, 0, **own)
        batches = training_batches(self.dataset, order, self.settings.workers)
        times: dict[bool, list[float]] = {True: [], False: []}  # of batches after which the weights change, and others
        begun = time.monotonic()
        for number in range(TIMED_BATCHES):
            start, update = self._clock(), self.settings.accumulate == 1 or number % 2 == 1
            self._turns(send_to_device(next(batches)[1], self.device), update=update)
            if number > 1:  # until then processes that load data start, and kernels are chosen
                times[update].append(self._clock() - start)
            if number > 4 and time.monotonic() - begun > TIMED_SECONDS:
                break
        return median(times[True]) + (self.settings.accumulate - 1) * median(times[False] or [0.0])

    def _clock(self) -> float:
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


def _extend(sizes: Sequence[int], values: Sequence[float], size: int) -> float:
    """Return the value at `size` on the line through the values at two sizes."""
    return values[1] + (values[1] - values[0]) / (sizes[1] - sizes[0]) * (size - sizes[1])


class Counted(RawIOBase):
    """A file that only counts its bytes."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += (count := memoryview(data).nbytes)
        return count


def _size_of(write: Callable[[Any], None]) -> int:
    write(file := Counted())
    return file.size


def _tensors_size(state: Mapping[str, Tensor], texts: dict[str, str]) -> int:
    dtypes = {name: x.dtype for name, x in state.items()}
    return _size_of(lambda file: write_tensors(file, state, texts, dtypes))


def _files(settings: LoopSettings, trial: Trial) -> dict[str, int]:
    """Return the bytes of the files that a run writes, by their names, but for its cache."""
    exported, tensors = trial.stage.export()
    texts = {} if exported is None else {CONFIG_KEY: json.dumps(exported, sort_keys=True)}
    files = {"model.safetensors": _tensors_size(tensors, texts | {STEP_KEY: str(settings.steps)})}
    files["resume.pt"] = _size_of(lambda file: torch.save(trial.state(), file))
    if kept := (settings.steps - 1) // settings.keep_every if settings.keep_every else 0:
        files[f"{kept} of keep_every"] = kept * files["model.safetensors"]
    if trial.profiles is not None:
        snapshots = -(-settings.steps // settings.ema_snapshots)
        files[f"{snapshots} of ema_snapshots"] = snapshots * _tensors_size(trial.profiles.shadow, {})
    return files


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def make_plan(
    config: Mapping[str, Any], stage: Stage, dataset: Any, held_out: Any, device: torch.device, processes: int = 1
) -> Plan:
    """Return what a stage's training on a data set takes, by a few batches of it. It changes the stage's weights.

    held_out: what it is validated on, or None.
    """
    settings = replace(LoopSettings.of(config), compile=False)
    groups = list(getattr(dataset, "groups", None) or [None] * len(dataset))
    common = Counter(groups).most_common(1)[0][0]
    some = [i for i, group in enumerate(groups) if group == common][: 4 * settings.batch_size]
    prepared = stage.train(False).prepare(part(dataset, some))
    sample = prepared.__getitems__([0])[0] if isinstance(prepared, LatentDataset) else {}
    if settings.gradient_checkpointing:
        stage.checkpoint_blocks()
    free, trial = free_memory(device), Trial(settings, stage, prepared, device)
    step, tried = trial.measure(free)
    seconds = trial.seconds() if tried else None
    files = _files(settings, trial)
    encoded = len(dataset) + (0 if held_out is None else len(held_out))
    latents = bytes_of([sample.get("mean"), sample.get("std")]) * encoded
    if stage.cache_dir is not None:  # that of the trial, which has all texts
        texts_size = sum(path.stat().st_size for path in Path(stage.cache_dir).glob("texts-*/*.safetensors"))
        files["cache_dir"], latents = latents + texts_size, 0
    networks = (*stage.networks.values(), *stage.frozen.values())
    every = {id(x): x for network in networks for x in (*network.parameters(), *network.buffers())}
    parameters = [x for x in every.values() if isinstance(x, torch.nn.Parameter)]
    trained = [x for x in parameters if x.requires_grad]
    averages = bytes_of([trial.average.shadow, None if trial.profiles is None else trial.profiles.shadow])
    states = [each.state for each in trial.optimizers]
    parts: dict[str, float] = {"weights": bytes_of(every), "optimizer": bytes_of(states), "averages": averages}
    parts |= {"gradients": bytes_of(trained), "activations": step.activations}
    elsewhere = averages if settings.ema_device == "cpu" and device.type != "cpu" else 0
    try:
        checkpointed = trial.activations(True), trial.activations(False)
    except ValueError:  # no blocks that can
        checkpointed = None
    return Plan(
        steps=settings.steps,
        images_per_step=settings.batch_size * settings.accumulate * processes,
        images=len(dataset),
        trained=sum(x.numel() for x in trained),
        frozen=sum(x.numel() for x in parameters) - sum(x.numel() for x in trained),
        step=step,
        seconds=seconds,
        memory=parts["weights"] + parts["optimizer"] + averages - elsewhere + step.transient,
        free=free,
        parts=parts,
        checkpointed=checkpointed,
        latents=latents,
        files=files,
    )


def describe(plan: Plan) -> str:
    """Return a plan as text: a line for each resource."""
    memory = f"{_size(plan.memory)}: {', '.join(f'{name} {_size(size)}' for name, size in plan.parts.items())}"
    if plan.checkpointed is not None:
        memory += " ({} with gradient checkpointing, {} without)".format(*map(_size, plan.checkpointed))
    hours = f"not tried, as memory may be too small: {_size(plan.free)} are free"
    if plan.seconds is not None:
        hours = f"{plan.steps * plan.seconds / 3600:.2g} hours, at {plan.seconds:.3g} seconds a step"
    epochs = plan.steps * plan.images_per_step / plan.images
    lines = {
        "parameters": f"{plan.trained:,} that train, {plan.frozen:,} frozen",
        "steps": f"{plan.steps:,} of {plan.images_per_step:,} images, {epochs:.3g} epochs of {plan.images:,}",
        "work": f"{plan.step.flops / 1e9:,.4g} GFLOP a step",
        "time": hours,
        "memory": memory,
        "disk": ", ".join(f"{name} {_size(size)}" for name, size in plan.files.items()),
    }
    if plan.latents:
        lines["latents"] = f"{_size(plan.latents)} of memory, encoded once"
    return "\n".join(f"  {key:11} {text}" for key, text in lines.items())


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def print_plans(configs: Sequence[Mapping[str, Any]], resume: bool, device: torch.device, processes: Any) -> None:
    """Rehearse stages, and print the plan of each, or why there is none. processes: accelerate's state of them."""
    plans: dict[str, str] = {}

    def inspect(config: Mapping[str, Any], *tried: Any) -> None:
        plans[config["name"]] = describe(make_plan(config, *tried, processes.num_processes))

    rehearse(configs, resume, device, inspect)
    for config in configs if processes.is_main_process else ():
        kind: Any = get_obj_from_str(config["stage"]["target"])
        why = "it is finished" if kind.rehearses else "it tunes a model that it loads, which is not tried beforehand"
        print(config["name"], plans.get(config["name"], f"  no plan: {why}"), sep="\n")
