"""THE training loop. Every stage is trained by it: one process on a laptop, or many under torchrun.

Exact resume: the data order is a function of (seed, epoch), captions and augmentation of (seed, epoch, index), and all
other randomness of (seed, batch number); state is saved between training steps. So a run that was interrupted and
resumed ends with the same weights as an uninterrupted one (bit for bit on a CPU with the same number of threads).
"""

import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.training.contract import content_of
from ldm.training.datasets import build_datasets, make_measurements
from ldm.training.ema import EMA
from ldm.training.loader import training_batches
from ldm.training.loop_settings import LoopSettings
from ldm.training.lr_scheduler import lr_multiplier
from ldm.training.metrics import Metrics, Waits
from ldm.training.optimizers import average_of, clip_gradients
from ldm.training.order import EpochBatches
from ldm.training.processes import StopFlag, agreed, lost_processes_named, make_accelerator, prepared
from ldm.training.run_folder import RunFolder
from ldm.training.sharding import complete
from ldm.training.share import BatchShare
from ldm.training.stage import Stage, Trained
from ldm.util import instantiate_from_config, pick_device, progress_bar


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


@dataclass
class Training:
    """A stage that trains, its data, and what the loop keeps beside them."""

    settings: LoopSettings
    accelerator: Any
    folder: RunFolder
    stage: Stage
    images: Any  # the data set, as the configuration describes it
    held_out: Any  # those of data.validation, or None
    dataset: Any  # as the stage has prepared it
    content: Any  # what the data set holds, which must be the same when the run goes on
    measurements: list[tuple[int, Callable[[EMA], dict[str, float]]]]  # steps between them, and what gives the figures
    model: Any  # the networks that train, whose forward is the loss
    optimizers: list[Any]
    rates: list[list[float]]  # the learning rates of each optimizer's groups, before the schedule
    average: EMA
    profiles: Any  # a `ProfileAverages`, or None
    order: EpochBatches
    parts: dict[str, Any]  # what has a state to resume from
    metrics: Metrics


def train_stage(
    config: dict[str, Any], settings: LoopSettings, accelerator: Any, folder: RunFolder, **stage_params: Any
) -> None:
    """Train one stage, from what its folder holds to its checkpoint."""
    from accelerate.utils import send_to_device

    run = build_run(config, settings, accelerator, folder, **stage_params)
    stage, average, metrics = run.stage, run.average, run.metrics
    step = resume_run(run)
    accelerator.wait_for_everyone()  # until every process has read the folder
    folder.begin(config, step, accelerator, run.images, run.held_out)

    bar: dict[str, Any] = {"initial": step, "total": settings.steps, "desc": config["name"], "unit": "step"}
    compiling = nullcontext()
    if settings.compile:
        from ldm.models.compiler import compiled  # only this option needs it

        compiling = compiled(stage.compiles())
    batches = Waits(training_batches(run.dataset, run.order, settings.workers))
    with StopFlag() as stopped, progress_bar(leave=True, mininterval=1, **bar) as progress, compiling:
        for number, batch in batches:
            if step >= settings.steps:
                break
            stage.share.begin(config["seed"], number)
            train_batch(run, send_to_device(batch, accelerator.device), number, step)
            if not accelerator.sync_gradients:
                continue
            average.update()
            step += 1
            progress.update()
            last = step == settings.steps
            if run.profiles is not None:
                run.profiles.update(folder, step, last)
            for every, measure in run.measurements:
                if last or step % every == 0:
                    metrics.measured(step, measure(average))
            if last or step % settings.log_every == 0:
                progress.set_postfix(metrics.report(step, batches.share()), refresh=False)
            if last or step % settings.preview_every == 0:
                preview(stage, average, folder, step)
            stop = agreed(accelerator, stopped.is_set())
            save_due(run, step, stop)
            if stop:
                raise Interrupted(
                    f"stopped at step {step}, saved in {folder.state}: resume by the same command with --resume"
                )

    with average.applied():
        stage.train(False)
        if folder.writes:
            stage.write_extras()
    save_checkpoint(run, step, folder.model.name)
    if not settings.keep_state:
        folder.remove_state()
    accelerator.wait_for_everyone()  # the next stage reads what the main process writes
    accelerator.free_memory()


def train_batch(run: Training, batch: dict[str, Any], number: int, step: int) -> None:
    """Take the turn of each optimizer on a batch: loss, gradients and, where the batch ends a training step, the step.

    number: of the batch in the run. step: training steps before it.
    """
    settings, accelerator, scaler = run.settings, run.accelerator, run.accelerator.scaler
    factor, shared = lr_multiplier(step, settings.steps, **settings.lr_schedule), None
    with accelerator.accumulate(run.model):
        for k, optimizer in enumerate(run.optimizers):
            loss, values, shared = run.model(batch, k, number, shared)
            accelerator.backward(loss)
            run.metrics.add(values)
            for group, rate in zip(optimizer.param_groups, run.rates[k], strict=True):
                group["lr"] = rate * factor
            if accelerator.sync_gradients:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = clip_gradients(accelerator, parameters, settings.clip)
                if scaler is None or norm.isfinite():  # otherwise the scaler skips the step
                    run.metrics.add({f"grad_norm_{k}": norm})
            optimizer.step()
            optimizer.zero_grad()


def build_run(
    config: dict[str, Any], settings: LoopSettings, accelerator: Any, folder: RunFolder, **stage_params: Any
) -> Training:
    """Build a stage and its data, and what trains it."""
    name, seed = config["name"], config["seed"]
    torch.manual_seed(seed)
    stage = instantiate_from_config(config["stage"], **stage_params).to(accelerator.device).train(False)
    ranks = accelerator.process_index, accelerator.num_processes
    stage.share = BatchShare(*ranks)
    with accelerator.main_process_first():  # it writes files that the others then find
        images, held_out = build_datasets(stage, config["data"])
    stage.workers = settings.workers
    dataset = stage.prepare(images)
    measurements = make_measurements(stage, images, held_out, settings, accelerator)
    trained = Trained(stage.to(accelerator.device).train())  # again: `prepare` may add networks
    if settings.gradient_checkpointing:
        stage.checkpoint_blocks()
    if stage.share.count > 1:
        from ldm.training.gathering import share_batch_norm  # only several processes need it

        share_batch_norm(trained)
    own = stage.optimizers()
    if accelerator.distributed_type == "FSDP":
        from ldm.training.fsdp import check_fsdp  # only there

        check_fsdp(stage, own, **{key: getattr(settings, key) for key in ("ema_snapshots", "validate_both", "compile")})
        trained.to(memory_format=torch.contiguous_format)  # it shards no others
    model, *optimizers = prepared(accelerator, trained, own)
    scaler = accelerator.scaler  # of gradients in fp16, else None
    if scaler is not None and len(optimizers) > 1:  # each changes the scale that the others' gradients already have
        raise ValueError(f"precision fp16 is for one optimizer, and {name!r} has {len(optimizers)}: use bf16")
    average = average_of(trained, own, settings.ema, settings.ema_device)
    profiles = None
    if settings.ema_snapshots:
        from ldm.training.snapshots import ProfileAverages  # only this option needs it

        profiles = ProfileAverages(stage, settings.ema_snapshots, average.device)
    shuffling = {name: getattr(dataset, name, None) for name in ("groups", "shuffled")}
    order = EpochBatches(len(dataset), settings.batch_size, seed, *ranks, **shuffling)
    parts: dict[str, Any] = {"networks": trained, "ema": average, "order": order}
    parts |= {f"optimizer_{k}": part for k, part in enumerate(optimizers)}
    parts |= {name: part for name, part in (("scaler", scaler), ("profiles", profiles)) if part is not None}
    return Training(
        settings=settings, accelerator=accelerator, folder=folder, stage=stage, images=images, held_out=held_out,
        dataset=dataset, content=content_of(images, stage.vocabulary), measurements=measurements, model=model,
        optimizers=optimizers, rates=[[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers],
        average=average, profiles=profiles, order=order, parts=parts,
        metrics=Metrics(name, folder, trained, stage.share),
    )  # fmt: skip


def resume_run(run: Training) -> int:
    """Load what the run's folder holds and return its step, 0 of a new run; print what of the settings stands out."""
    settings, folder, step = run.settings, run.folder, 0
    if folder.has_remains:
        from ldm.training.resuming import load_saved  # a new run has no use for it

        step = load_saved(run.parts, settings, run.content, folder)
    counts = {"lr_schedule.warmup": settings.lr_schedule.get("warmup", 0), "keep_every": settings.keep_every}
    for key, count in counts.items():
        if count > settings.steps and folder.writes:
            print(f"note: loop.{key} is {count} steps, and the run has only {settings.steps}", file=sys.stderr)
    return step


@torch.no_grad()
def preview(stage: Stage, average: EMA, folder: RunFolder, step: int) -> None:
    """Write the preview of the averaged weights, in eval mode."""
    with average.applied():
        stage.train(False)
        folder.preview(step, stage.preview(), stage.preview_columns, stage.preview_labels())
        stage.train()


def save_due(run: Training, step: int, stop: bool) -> None:
    """Write the checkpoint and the state that are due at a step; stop: whether the run stops there."""
    settings, folder, last = run.settings, run.folder, step == run.settings.steps
    keep = settings.keep_every > 0 and step % settings.keep_every == 0 and not last
    due = stop or last or step % settings.save_every == 0
    if due or keep:
        run.metrics.report(step)  # raises before anything is saved that is not finite
    if keep:
        save_checkpoint(run, step, f"model-{step:06d}.safetensors")
    if due:
        try:
            state = {key: complete(part.state_dict()) for key, part in run.parts.items()}
            folder.save_state({"data": run.content, "step": step} | state)
        except OSError as error:
            if not last:
                raise
            print(f"{error}; the result is written nevertheless", file=sys.stderr)


@torch.no_grad()
def save_checkpoint(run: Training, step: int, name: str) -> None:
    """Write the averaged weights, completed as a result's are, and leave the weights that train as they are."""
    stage = run.stage
    state = stage.networks.state_dict()  # of which the shards are kept as they are
    own = {k: tensor.to("cpu", copy=True) for k, tensor in state.items() if not hasattr(tensor, "full_tensor")}
    with run.average.applied():
        stage.train(False)
        stage.finish(run.dataset)
        config, tensors = stage.export()
        run.folder.save_model(run.folder.path / name, step, config, complete(tensors))
    stage.networks.load_state_dict(own, strict=False)
    stage.train()
