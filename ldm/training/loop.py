"""THE training loop. Every stage is trained by it: one process on a laptop, or many under torchrun.

Exact resume: the data order is a function of (seed, epoch), captions and augmentation of (seed, epoch, index), and all
other randomness of (seed, batch number); state is saved between training steps. So a run that was interrupted and
resumed ends with the same weights as an uninterrupted one (bit for bit on a CPU with the same number of threads).
"""

import sys
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.checks import Decay, Positive, Range
from ldm.models.compiler import compiled
from ldm.training.contract import compare_content, content_of
from ldm.training.ema import EMA
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.metrics import Metrics, Waits
from ldm.training.optimizers import average_of
from ldm.training.order import EpochBatches, training_batches
from ldm.training.posthoc import ProfileAverages
from ldm.training.processes import StopFlag, agreed, lost_processes_named, make_accelerator
from ldm.training.run_folder import RunFolder
from ldm.training.sharding import check_fsdp, complete, sharded
from ldm.training.share import BatchShare, share_batch_norm
from ldm.training.stage import Stage, Trained
from ldm.training.validation import build_datasets, make_measurements
from ldm.util import call_with, instantiate_from_config, pick_device

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
    # Arguments of `lr_multiplier`.
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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LoopSettings":
        """Return the checked `loop:` part of a configuration."""
        loop = config["loop"]
        if isinstance(loop, Mapping) and "report_to" not in loop and isinstance(loop.get("tensorboard"), bool):
            loop = dict(loop)  # of before there was another
            loop["report_to"] = "tensorboard" if loop.pop("tensorboard") else "none"
        return call_with(f"loop of {config['name']!r}", cls, loop)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state was saved; the message says how to resume."""


def train(config: dict[str, Any], resume: bool = False, device: str = "auto", **stage_params: Any) -> Path:
    """Train one stage and return the path of its checkpoint.

    Args:
        config: resolved, with name, outdir, seed, stage, data and loop.
        resume: continue an interrupted run, or one that was finished with fewer steps; any other is left as it is.
        device: auto, cpu, cuda or mps.
        stage_params: arguments of the stage instead of the configuration's, such as a model that is already loaded.

    Raises:
        ValueError: for bad settings, and when the loss or the weights are no longer finite.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    settings = LoopSettings.of(config)
    path = Path(config["outdir"]) / config["name"]
    tracking = settings.report_to, path.parent
    accelerator = make_accelerator(settings.precision, settings.accumulate, pick_device(device), *tracking)
    with closing(RunFolder(path, config, resume, accelerator.is_main_process)) as folder:
        if not folder.finished:
            with lost_processes_named(accelerator, folder.path):
                train_stage(config, settings, accelerator, folder, **stage_params)
    return folder.model


def train_stage(
    config: dict[str, Any], settings: LoopSettings, accelerator: Any, folder: RunFolder, **stage_params: Any
) -> None:
    """Train one stage, from what its folder holds to its checkpoint."""
    from accelerate.utils import send_to_device

    name, seed = config["name"], config["seed"]
    torch.manual_seed(seed)
    stage = instantiate_from_config(config["stage"], **stage_params).to(accelerator.device).train(False)
    ranks = accelerator.process_index, accelerator.num_processes
    stage.share = BatchShare(*ranks)
    with accelerator.main_process_first():  # it writes files that the others then find
        dataset, held_out = build_datasets(stage, config["data"])
    stage.workers = settings.workers
    images, dataset = dataset, stage.prepare(dataset)
    measurements = make_measurements(stage, images, held_out, settings, accelerator)
    trained = Trained(stage.to(accelerator.device).train())  # again: `prepare` may add networks
    if settings.gradient_checkpointing:
        stage.checkpoint_blocks()
    if stage.share.count > 1:
        share_batch_norm(trained)
    own = stage.optimizers()
    if accelerator.distributed_type == "FSDP":
        check_fsdp(stage, own, **{key: getattr(settings, key) for key in ("ema_snapshots", "validate_both", "compile")})
    model, *optimizers = accelerator.prepare(trained, *own)
    average = average_of(trained, own, settings.ema, settings.ema_device)
    scaler = accelerator.scaler  # of gradients in fp16, else None
    if scaler is not None and len(optimizers) > 1:  # each changes the scale that the others' gradients already have
        raise ValueError(f"precision fp16 is for one optimizer, and {name!r} has {len(optimizers)}: use bf16")
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    own = {name: getattr(dataset, name, None) for name in ("groups", "shuffled")}
    order = EpochBatches(len(dataset), settings.batch_size, seed, *ranks, **own)
    parts = {"networks": trained, "ema": average, "order": order} | {
        f"optimizer_{k}": part for k, part in enumerate(optimizers)
    }
    profiles = ProfileAverages(stage, settings.ema_snapshots, average.device)
    parts |= ({} if scaler is None else {"scaler": scaler}) | ({"profiles": profiles} if profiles.every else {})
    step = load_state(folder, parts, settings.accumulate, known := {"data": content_of(images)})
    if order.past and (before := order.past[-1][0]) != order.global_size and folder.writes:
        print(
            f"note: all processes together took {before} images in a batch, and now take {order.global_size}: the run "
            "goes on at the next image; steps, the learning rate and its schedule are counted as before",
            file=sys.stderr,
        )
    if step > settings.steps:
        raise ValueError(f"the run in {str(folder.path)!r} has {step} steps already: loop.steps must be at least that")
    counts = {"lr_schedule.warmup": settings.lr_schedule.get("warmup", 0), "keep_every": settings.keep_every}
    for key, count in counts.items():
        if count > settings.steps and folder.writes:
            print(f"note: loop.{key} is {count} steps, and the run has only {settings.steps}", file=sys.stderr)
    accelerator.wait_for_everyone()  # until every process has read the folder
    folder.begin(config, step, accelerator, images, held_out)
    metrics = Metrics(name, folder, trained, stage.share)

    bar = {"initial": step, "total": settings.steps, "desc": name, "unit": "step", "mininterval": 1}
    compiling = compiled(stage.compiles()) if settings.compile else nullcontext()
    batches = Waits(training_batches(dataset, order, settings.workers))
    with StopFlag() as stopped, tqdm(**bar, disable=not folder.writes) as progress, compiling:
        for number, batch in batches:
            if step >= settings.steps:
                break
            stage.share.begin(seed, number)
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
            profiles.update(folder, step, last)
            for every, measure in measurements:
                if last or step % every == 0:
                    metrics.measured(step, measure(average))
            if last or step % settings.log_every == 0:
                progress.set_postfix(metrics.report(step, batches.share()), refresh=False)
            if last or step % settings.preview_every == 0:
                preview(stage, average, folder, step)
            keep = settings.keep_every > 0 and step % settings.keep_every == 0 and not last
            stop = agreed(accelerator, stopped.is_set())
            save = stop or last or step % settings.save_every == 0
            if save or keep:
                metrics.report(step)  # raises before anything is saved that is not finite
            if keep:
                save_checkpoint(stage, average, dataset, folder, step, f"model-{step:06d}.safetensors")
            if save:
                try:
                    state = {key: complete(part.state_dict()) for key, part in parts.items()}
                    folder.save_state(known | {"step": step} | state)
                except OSError as error:
                    if not last:
                        raise
                    print(f"{error}; the result is written nevertheless", file=sys.stderr)
            if stop:
                raise Interrupted(
                    f"stopped at step {step}, saved in {folder.state}: resume by the same command with --resume"
                )

    with average.applied():
        stage.train(False)
        if folder.writes:
            stage.write_extras()
    save_checkpoint(stage, average, dataset, folder, step, folder.model.name)
    if not settings.keep_state:
        folder.remove_state()
    accelerator.wait_for_everyone()  # the next stage reads what the main process writes
    accelerator.free_memory()


def load_state(folder: RunFolder, parts: Mapping[str, Any], accumulate: int, known: Mapping[str, Any]) -> int:
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
    compare_content((known | state)["data"], known["data"], folder)
    try:
        state = sharded(state, parts)
        for key, part in parts.items():
            if key == "order" and key not in state:  # of before it was saved
                part.seek(state["step"] * accumulate)
            elif state.get(key) is not None or key != "scaler":
                part.load_state_dict(state[key])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError):
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


@torch.no_grad()
def save_checkpoint(stage: Stage, average: EMA, dataset: Dataset, folder: RunFolder, step: int, name: str) -> None:
    """Write the averaged weights, completed as a result's are, and leave the weights that train as they are."""
    state = stage.networks.state_dict()  # of which the shards are kept as they are
    own = {k: tensor.to("cpu", copy=True) for k, tensor in state.items() if not hasattr(tensor, "full_tensor")}
    with average.applied():
        stage.train(False)
        stage.finish(dataset)
        config, tensors = stage.export()
        folder.save_model(folder.path / name, step, config, complete(tensors))
    stage.networks.load_state_dict(own, strict=False)
    stage.train()
