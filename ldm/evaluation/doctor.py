"""Why a latent diffusion model that reconstructs well samples noise: checks of a run's folder, a line for each.

The limits tell a mistake in settings or code from a model that only needs longer training, which passes.
"""

import io
import math
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.checkpoint.file import STEP_KEY, checkpoint_at, load_file
from ldm.checkpoint.networks import PREFIXES
from ldm.checkpoint.tensors import read_tensors
from ldm.checkpoint.writing import save_file
from ldm.data.part import part
from ldm.diffusion.denoiser import PREDICTIONS, network_input, predicted_x0
from ldm.diffusion.schedule import Schedule, q_sample
from ldm.models.perceptual import psnr
from ldm.training.config import read_configs
from ldm.training.datasets import build_datasets
from ldm.training.denoising import MAX_TERMINAL_SIGNAL
from ldm.training.diffusion import DiffusionStage
from ldm.training.ema import ema_decay
from ldm.training.latents import encoding_size, posterior
from ldm.training.loop_settings import LoopSettings
from ldm.training.validation import Validation
from ldm.util import get_obj_from_str, instantiate_from_config

SIGMAS = (0.5, 1.0, 2.0)  # noise levels at which the predictions differ most
MOST_AT_ONCE, OVERFIT_BATCH = 64, 8  # images for the network's output, and to overfit


class Finding(NamedTuple):
    """The result of a check."""

    name: str
    verdict: str  # ok, suspicious or wrong
    found: str  # the figure, and its limit
    change: str

    def __str__(self) -> str:
        return f"{self.verdict:10}  {self.name}: {self.found}" + ("" if self.verdict == "ok" else f"; {self.change}")


class Run(NamedTuple):
    """The model of a run's newest checkpoint in its stage, its data, and how it was trained."""

    stage: DiffusionStage
    dataset: Any
    settings: LoopSettings
    steps: int


def grade(value: float, suspicious: float, wrong: float) -> str:
    """Return the verdict on a value beyond neither, one or both limits; below them where wrong < suspicious."""
    sign = 1 if wrong >= suspicious else -1
    if not sign * value <= sign * wrong:  # NaN, too
        return "wrong"
    return "suspicious" if sign * value > sign * suspicious else "ok"


def check_latents(z: Tensor) -> Finding:
    """Check scaled latents (n, c, h, w): means of channels within 0 +- 1, deviations from 1/2 to 2; twice is wrong."""
    channels = z.double().transpose(0, 1).flatten(1)
    mean, std = channels.mean(1), channels.std(1)
    figures = [" ".join(f"{x:.2f}" for x in part.tolist()) for part in (mean, std)]
    found = "mean {} (limit +-1), standard deviation {} (limits 0.5 and 2)".format(*figures)
    # Small means beside the posterior's noise, which training adds, hold little of the images.
    remedy = "longer or with a smaller" if channels.std() < 1 else "with a larger"
    change = f"divide scale_factor by {channels.std().item():.3g}, or train the first stage {remedy} kl_weight"
    change = change if std.max() > 1e-3 else "the first stage encodes all images alike: use a smaller kl_weight"
    return Finding("latents", grade(torch.cat([mean.abs(), std.log2().abs()]).max().item(), 1, 2), found, change)


def check_first_stage(plain: float, scaled: float) -> list[Finding]:
    """Check the PSNR of reconstructions, and that the model's encode and decode apply one scale factor to latents."""
    found = f"PSNR {scaled:.1f} dB through scale_factor, {plain:.1f} without it (difference at most 0.5)"
    change = "multiply by scale_factor after encoding and divide by it before decoding"
    again, figure = "train the first stage longer, or on images like these", f"PSNR {plain:.1f} dB (at least 20)"
    scaling = Finding("scaling", grade(abs(plain - scaled), 0.5, 3), found, change)
    return [Finding("first stage", grade(plain, 20, 15), figure, again), scaling]


def check_schedule(schedule: Schedule) -> Finding:
    """Check that the last noise level leaves nothing of the image, as sampling starts from pure noise."""
    signal = math.sqrt(schedule.alphas_cumprod[-1])
    change = "use more steps or larger betas, or zero_terminal_snr with prediction v or x0, and train again"
    found = f"signal level {signal:.3f} at the last noise level (at most {MAX_TERMINAL_SIGNAL})"
    return Finding("schedule end", grade(signal, MAX_TERMINAL_SIGNAL, 0.3), found, change)


def check_type(prediction: str, errors: Mapping[str, float], linear: float) -> Finding:
    """Check that the output, read as configured, estimates x0 best. Wrong if another is better than any linear one."""
    best = min(errors, key=lambda name: errors[name])
    verdict = "ok" if best == prediction else "wrong" if errors[best] < 0.9 * linear else "suspicious"
    found = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
    found = f"squared error of x0 {found} (lowest should be {prediction})"
    change = (
        f"set prediction to {best}" if verdict == "wrong" else "the network has learned too little to tell: train on"
    )
    return Finding("prediction", verdict, found, change)


def check_denoiser(losses: Mapping[str, float], trivial: Mapping[str, float]) -> Finding:
    """Check losses in ranges of timesteps against the variance of the target, which predicting its mean reaches."""
    shares = {name.removeprefix("loss_"): losses[name] / trivial[name] for name in trivial}
    mean = sum(shares.values()) / len(shares)
    verdict = "wrong" if not mean <= 0.9 else grade(max(shares.values()), 1.05, math.inf)
    found = f"{', '.join(f'{name} {share:.2f}' for name, share in shares.items())} of the error of predicting the mean"
    change = (
        "train longer; if the loss stays there: the learning rate, the weights of timesteps, or other data than it had"
    )
    return Finding("denoiser", verdict, f"{found} (each at most 1.05, on average 0.9)", change)


def check_guidance(share: float | None) -> Finding:
    """Check that the output depends on the condition."""
    if share is None:
        return Finding("guidance", "ok", "the model has no null condition to compare with", "")
    found = f"conditional and null output differ by {share:.2g} of the output (at least 0.01)"
    change = "the condition is ignored: check captions or labels, context_dim, and that caption_dropout is below 1"
    return Finding("guidance", grade(share, 0.01, 1e-4), found, change)


def check_ema(decay: float, steps: int) -> Finding:
    """Check that the average of the weights is over a small part of the run."""
    age = math.inf if decay == 1 else 1 / (1 - decay)
    warm = 1 / (1 - ema_decay(steps, decay))
    found = f"averages over {age:.0f} of {steps} steps (at most {steps / 3:.0f}), by its warm-up over {warm:.0f} so far"
    change = f"train longer, or set loop.ema to {max(1 - 10 / max(steps, 10), 0):.4g}"
    return Finding("EMA", grade(age if decay else 0, steps / 3, math.inf), found, change)


def check_overfit(first: float, last: float, steps: int) -> Finding:
    """Check that a batch can be learned by heart."""
    found = f"loss {first:.3g} to {last:.3g} in {steps} steps on one batch (to under half)"
    change = "change stage.params.learning_rate: try a tenth and ten times as much; or the network gets no gradient"
    return Finding("overfitting", "ok" if last < first / 2 else "suspicious", found, change)


def open_run(folder: Path, device: torch.device) -> Run:
    """Build the stage of a run around its newest checkpoint; the files of earlier stages are not needed."""
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{str(folder)!r} is not the folder of a run: it has no config.yaml")
    prefix = PREFIXES["text"]
    (config,), path = read_configs([str(folder / "config.yaml")]), checkpoint_at(folder)
    kind, settings = config["stage"]["target"], LoopSettings.of(config)
    if not issubclass(get_obj_from_str(kind), DiffusionStage):
        raise ValueError(f"{str(folder)!r} is a run of {kind}: the checks are for DiffusionStage, of latents")
    found, state = load_file(path)
    saved, params = found["params"], dict(config["stage"]["params"])
    params |= {name: saved[name] for name in ("unet_config", "schedule", "prediction", "defaults")}
    params |= {"first_stage": str(path), "cache_dir": None}
    with TemporaryDirectory() as temporary, redirect_stderr(io.StringIO()):  # its notes are training's
        params["cond_stage"] = conditioner = saved["cond_stage_config"]
        if isinstance(config["stage"]["params"].get("cond_stage"), str):  # a text encoder's file, which may have moved
            text = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            params["cond_stage"] = str(Path(temporary, "text"))
            save_file(params["cond_stage"], text, conditioner)
        stage = instantiate_from_config({"target": kind, "params": params})
        dataset, _ = build_datasets(stage, config["data"])
    stage.latent_diffusion.load_state_dict(state)
    stage.latent_diffusion.scale_factor = saved["scale_factor"]
    stage.check_size(dataset)
    steps = int(read_tensors(path).metadata.get(STEP_KEY, settings.steps))
    return Run(stage.to(device).train(False), dataset, settings, steps)


def diagnose(run: Run, images: int = 256, overfit: int = 100) -> list[Finding]:
    """Return the result of each check on some images of the run's data. The last one changes the stage's weights.

    overfit: steps at most to learn a batch by heart; 0 leaves that check out.
    """
    stage, model, groups = run.stage, run.stage.latent_diffusion, getattr(run.dataset, "groups", None)
    torch.manual_seed(0)
    alike = [i for i in range(len(run.dataset)) if groups is None or groups[i] == groups[0]]
    chosen = part(run.dataset, alike[:: -(-len(alike) // images)])  # from all over, as classes may be in order
    size = min(MOST_AT_ONCE, encoding_size(chosen))
    z, cond, plain, scaled = _encoded(stage, chosen, size)
    errors, linear, share = read_outputs(model, z[:size], {name: value[:size] for name, value in cond.items()})
    losses = Validation(stage, chosen, size).measure()
    trivial = mean_errors(model.prediction, model.schedule, max(z.var().item(), 1e-12), losses)
    findings = [check_latents(z.cpu()), *check_first_stage(plain, scaled), check_schedule(model.schedule)]
    findings += [check_type(model.prediction, errors, linear), check_denoiser(losses, trivial)]
    findings += [check_guidance(share), check_ema(run.settings.ema, run.steps)]
    if overfit:
        few = {name: value[:OVERFIT_BATCH] for name, value in cond.items()}
        findings += [check_overfit(*overfit_batch(stage, z[:OVERFIT_BATCH], few, overfit, run.settings.clip))]
    return findings


@torch.no_grad()
def _encoded(stage: DiffusionStage, dataset: Any, size: int) -> tuple[Tensor, dict[str, Tensor], float, float]:
    """Return scaled latents, their conditioning, and the PSNR of reconstructions without and with the scale factor."""
    first, model, found = stage.latent_diffusion.first_stage_model, stage.latent_diffusion, []
    for batch in DataLoader(dataset, batch_size=size):
        batch = send_to_device(batch, stage.device)
        z, cond = stage.data(batch, training=False)
        decoded = first.decode(posterior(first, batch["image"])[0]), model.decode(z)
        found.append(
            (z, cond, *(psnr(pixels.clamp(-1, 1).cpu(), batch["image"].cpu()).clamp(max=100) for pixels in decoded))
        )
    latents, conds, plain, scaled = zip(*found, strict=True)
    cond = {name: torch.cat([each[name] for each in conds]) for name in conds[0]}
    return torch.cat(latents), cond, torch.cat(plain).mean().item(), torch.cat(scaled).mean().item()


@torch.no_grad()
def read_outputs(model: Any, z: Tensor, cond: dict[str, Tensor]) -> tuple[dict[str, float], float, float | None]:
    """Return what the network makes of scaled latents (b, ...) at SIGMAS, on average.

    The squared error of x0, with the output read as each of PREDICTIONS, as flow only of a model of flow, whose network
    has another input; that of the best linear estimate; and by what share of it the output differs from that for the
    null condition, or None without one.
    """
    names = [name for name in PREDICTIONS if name != "flow" or model.prediction == "flow"]
    found, variance, sigmas = [], max(z.var().item(), 1e-12), model.schedule.sigmas
    null = None if model.null is None else model.condition([model.null] * len(z))
    for wanted in SIGMAS:
        t = torch.full((len(z),), round(model.schedule.t_at(wanted)), device=z.device)
        x, levels = q_sample(z, t, torch.randn_like(z), model.schedule), sigmas[t.cpu()]
        inputs = network_input(model.prediction, x, t, model.schedule)
        output = model.apply_model(*inputs, cond).float()
        row = [(predicted_x0(name, output, x, levels) - z).square().mean().item() for name in names]
        row += [1 / (1 / variance + 1 / levels[0].item() ** 2)]
        other = output if null is None else model.apply_model(*inputs, null).float()
        found.append([*row, (output - other).norm().item() / max(output.norm().item(), 1e-12)])
    *errors, linear, share = torch.tensor(found).mean(0).tolist()
    return dict(zip(names, errors, strict=True)), linear, None if null is None else share


def mean_errors(prediction: str, schedule: Schedule, variance: float, names: Mapping[str, float]) -> dict[str, float]:
    """Return the variance of the target in each range of timesteps that `names` has (loss_t0-199), for such latents."""
    found = {}
    for name in (name for name in names if name.startswith("loss_t")):
        low, high = map(int, name.removeprefix("loss_t").split("-"))
        ab = schedule.alphas_cumprod[low : high + 1].mean().item()
        found[name] = {"eps": 1.0, "x0": variance, "v": ab + (1 - ab) * variance, "flow": 1 + variance}[prediction]
    return found


def overfit_batch(
    stage: DiffusionStage, z: Tensor, cond: dict[str, Tensor], steps: int, clip: float
) -> tuple[float, float, int]:
    """Train on latents with the same noise in each step; return the loss before and after, and the steps.

    It ends once the loss is under half. The run's objective, optimizer and learning rate are used, without warm-up.
    """
    stage.train()
    (optimizer,), objective = stage.optimizers(), stage.objective
    t, noise, losses = objective.sample_timesteps(z, stage.share), objective.sample_noise(z, stage.share), []
    for step in range(steps + 1):
        loss = objective.losses(z, cond, t, noise, stage.share).mean()
        losses.append(loss.item())
        if step == steps or losses[-1] < losses[0] / 2 or not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.networks.parameters(), clip)
        optimizer.step()
    return losses[0], losses[-1], len(losses) - 1
