"""A model of few steps out of one of many: easy consistency tuning, and progressive distillation.

Both go on from a model's own weights, and put its classifier-free guidance into them: the result is sampled at guidance
scale 1, so that a step evaluates its network once. Noise levels are sigma, of x = x0 + sigma noise.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.networks import MODEL_TARGET
from ldm.checks import Betas, Count, Probability, Range, Rate
from ldm.diffusion.denoiser import make_denoiser
from ldm.diffusion.schedule import sampling_sigmas
from ldm.finetune.parts import model_to_tune
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.settings import Settings, checked
from ldm.training.diffusion import LatentStage, Posterior
from ldm.training.objective import Objective
from ldm.training.stage import Stage
from ldm.util import call_with


@dataclass(frozen=True)
class Consistency:
    """The noise levels of easy consistency tuning: sigma, log-normal, and r below it, which approaches it in stages.

    r = sigma (1 - (1 + k sigmoid(-b sigma)) / q^(stage + 1)), at least 0
    """

    stage_batches: Annotated[int, Range(1)]  # how many batches a stage takes
    mean: float = -1.1  # of log sigma
    std: Rate = 2.0  # of log sigma
    q: float = 4.0  # the factor by which a stage brings r nearer to sigma, above 1
    k: Rate = 8.0  # how much farther r is at small sigma
    b: Rate = 1.0  # how soon that ends as sigma grows

    def __post_init__(self) -> None:
        if not self.q > 1:
            raise ValueError(f"consistency: q {self.q} must be above 1: by it r comes nearer to sigma in each stage")

    def nearer(self, sigmas: Tensor, stage: int) -> Tensor:
        """Return r for each sigma (b,)."""
        share = (1 + self.k * torch.sigmoid(-self.b * sigmas)) / self.q ** (stage + 1)
        return sigmas * (1 - share).clamp(min=0)


class DistillationStage(LatentStage):
    """Tunes the UNet of a model to few steps; a copy of it as it was, the teacher, is frozen.

    Progressive distillation (Salimans & Ho 2022): a DDIM step makes two of the teacher's. Each training halves the
    steps: of 64, six trainings make one, each from the result of the one before.

        loss = max(1 / sigma^2, 1) |x0(sigma) - wanted|^2, with `wanted` of `two_steps`

    Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548): x0 predicted at sigma learns from that predicted at r
    of the same image, noise and dropout, or from the image, where r is 0. Guidance changes the direction from sigma to
    r by what it adds to the teacher's x0.

        loss = (1 / sigma^2 + 1) |x0(sigma) - x0(r)|

    Args:
        ckpt: a latent diffusion model's checkpoint that `ldm.load` reads; None is the model that ships.
        learning_rate, betas, weight_decay, optimizer: of `make_optimizer`.
        steps: of the result: half of the teacher's, or with consistency tuning any.
        consistency: arguments of `Consistency`; None is progressive distillation.
        scale, interval: guidance to put into the weights, and the sigmas that have it; None is the model's own.
        caption_dropout: probability of the null condition, to which guidance adds nothing.
        cache_latents, cache_dir, posterior, preview_prompts, preview_columns: of `DiffusionStage`.
        loading: further arguments of `ldm.load`.
    """

    rehearses, masked = False, False
    validate = Stage.validate  # none: its loss is over all noise levels, and a few steps have few

    def __init__(
        self,
        ckpt: str | LatentDiffusion | None,
        learning_rate: Rate,
        steps: Count,
        consistency: Mapping[str, Any] | None = None,
        scale: float | None = None,
        interval: Sequence[float] | None = None,
        caption_dropout: Probability = 0.0,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.0,
        optimizer: str | Mapping[str, Any] = "adamw",
        cache_latents: bool = True,
        cache_dir: str | None = None,
        posterior: Posterior = "sample",
        preview_prompts: Sequence[str | int] | None = None,
        preview_columns: Count = 10,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        model = model_to_tune(ckpt, loading)
        if model.target != MODEL_TARGET:
            raise ValueError(f"distillation is for a latent diffusion model, not for a {model.target}")
        self.consistency = None if consistency is None else call_with("consistency", Consistency, consistency)
        levels = sampling_sigmas(model.schedule, steps, "trailing")
        if consistency is None:
            self.sigmas = sampling_sigmas(model.schedule, 2 * steps, "trailing")  # of the teacher, then 0
            if not torch.equal(self.sigmas[::2], levels):
                raise ValueError(f"steps {steps}: their noise levels are not among {2 * steps}'s: use a power of 2")
        own = model.defaults | checked(Settings, {"scale": scale, "interval": interval})
        self.scale, self.interval = own["scale"], own["interval"]
        if self.scale < 0:
            raise ValueError(f"scale must be at least 0, got {self.scale:g}, which leads away from the prompt")
        if self.scale == 1 and interval is not None:
            raise ValueError("interval has no effect at guidance scale 1: leave it out, or set a scale")
        if self.scale != 1 and model.null is None:
            raise ValueError(f"guidance scale {self.scale} needs a null condition, which this model lacks: set scale 1")
        how = {"sampler": "ddim", "spacing": "trailing"} if consistency is None else {"sampler": "lcm", "spacing": None}
        model.defaults = {**model.defaults, "steps": steps, "scale": 1.0, "interval": None, **how}
        adam = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "optimizer": optimizer}
        latents, previews = (cache_latents, cache_dir, posterior), (preview_prompts, preview_columns)
        super().__init__(Objective(model), True, caption_dropout, *latents, *previews, **adam)
        self.teacher: nn.Module = deepcopy(self.model.requires_grad_())
        self.freeze(teacher=self.teacher)

    def predict(self, network: nn.Module, x: Tensor, sigmas: Tensor, cond: Conditioning) -> Tensor:
        """Return the x0 that a network predicts from x = x0 + sigma noise (b, ...); sigmas: float64 (b,)."""
        model = self.latent_diffusion
        denoise = make_denoiser(lambda x, t, cond: network(x, t, **cond), model.schedule, model.prediction)
        return denoise(x, sigmas, cond).x0

    @torch.no_grad()
    def teach(self, x: Tensor, sigmas: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the teacher's x0 (b, ...) and what guidance adds to it, 0 outside the interval."""
        if self.scale == 1:
            found = self.predict(self.teacher, x, sigmas, cond)
            return found, torch.zeros_like(found)
        null = self.condition([self.latent_diffusion.null] * len(x))
        both = {
            name: torch.cat([part, null[name]]) if name in null else part.repeat(2, 1, 1, 1)
            for name, part in cond.items()
        }
        conditional, other = self.predict(self.teacher, x.repeat(2, 1, 1, 1), sigmas.repeat(2), both).chunk(2)
        low, high = (0.0, float("inf")) if self.interval is None else self.interval
        inside = ((low < sigmas) & (sigmas <= high)).reshape(-1, 1, 1, 1).to(x)
        return conditional, (self.scale - 1) * inside * (conditional - other)

    def turn(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        z, cond = self.data(batch)
        noise = self.objective.sample_noise(z, self.share)
        if self.consistency is None:
            loss = self.progressive_losses(z, cond, noise).mean()
        else:
            loss = self.consistency_losses(z, cond, noise, self.consistency, number).mean()
        return loss, {"loss": loss}, None

    def progressive_losses(self, z: Tensor, cond: Conditioning, noise: Tensor) -> Tensor:
        """Return the loss of each latent (b, ...), at one of the result's noise levels."""
        step = (self.share.rand(len(z)) * (len(self.sigmas) // 2)).long()
        start, middle, end = (self.sigmas[2 * step + i] for i in range(3))  # (b,) each
        x = z + start.reshape(-1, 1, 1, 1).to(z) * noise
        wanted = two_steps(lambda x, sigmas: sum(self.teach(x, sigmas, cond)), x, start, middle, end)
        error = (self.predict(self.model, x, start, cond) - wanted).square().flatten(1).mean(1)
        return start.pow(-2).clamp(min=1).to(error) * error

    def consistency_losses(
        self, z: Tensor, cond: Conditioning, noise: Tensor, levels: Consistency, number: int
    ) -> Tensor:
        """Return the loss of each latent (b, ...), of batch `number`."""
        known = self.latent_diffusion.schedule.sigmas
        normal = self.share.randn(torch.empty(len(z), dtype=torch.float64))
        sigmas = (levels.mean + levels.std * normal).exp().clamp(float(known[0]), float(known[-1]))
        nearer = levels.nearer(sigmas, number // levels.stage_batches)
        column, column_r = (part.reshape(-1, 1, 1, 1).to(z) for part in (sigmas, nearer))
        x = z + column * noise
        clean = z if self.scale == 1 else z + self.teach(x, sigmas, cond)[1]
        x_r = clean + column_r / column * (x - clean)  # without guidance, of the same noise
        with torch.no_grad(), torch.random.fork_rng([z.device] if z.device.type == "cuda" else []):  # the same dropout
            wanted = torch.where(column_r > 0, self.predict(self.model, x_r, nearer, cond), clean)
        error = (self.predict(self.model, x, sigmas, cond) - wanted).square().flatten(1).sum(1)
        return (sigmas**-2 + 1).to(error) * (error + 1e-8).sqrt()


def two_steps(teacher: Any, x: Tensor, start: Tensor, middle: Tensor, end: Tensor) -> Tensor:
    """Return the x0 with which one DDIM step from `start` to `end` makes the two of a teacher by way of `middle`.

    teacher(x, sigmas) -> x0 (b, ...); the noise levels are float64 (b,).
    """
    ratio = (middle / start, end / middle, end / start)
    first, second, both = (part.reshape(-1, *[1] * (x.ndim - 1)).to(x) for part in ratio)
    x0 = teacher(x, start)
    between = x0 + first * (x - x0)
    x0 = teacher(between, middle)
    after = x0 + second * (between - x0)
    return (after - both * x) / (1 - both)
