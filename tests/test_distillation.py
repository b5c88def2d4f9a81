"""Few-step models: the exact ones of a Gaussian, whose teacher is linear; guidance in the weights; r and its stages."""

import copy
import math

import pytest
import torch
from conftest import TINY, randomised, refused
from tiny_stages import UNCONDITIONAL
from torch import nn

import ldm
from ldm.diffusion.denoiser import scalings
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.schedule import sampling_sigmas
from ldm.finetune.distillation import Consistency, DistillationStage, two_steps

DEVIATION = 0.6  # of the Gaussian that the toy's images are of


class Table(nn.Module):
    """A network whose output is its input times a weight of each timestep, interpolated between them."""

    downsampling = 1

    def __init__(self, T: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(T, dtype=torch.float64))

    def forward(self, x, timesteps=None, context=None, **kwargs):
        low = timesteps.double().floor().long().clamp(max=len(self.weight) - 2)
        share = timesteps.double() - low
        weight = (1 - share) * self.weight[low] + share * self.weight[low + 1]
        return (weight.reshape(-1, 1, 1, 1) * x.double()).to(x.dtype)


def gaussian(T: int = 64) -> ldm.LatentDiffusion:
    """Return the exact denoiser, as v, of images that are normal with that deviation."""
    identity = {"target": "ldm.models.identity.IdentityFirstStage", "params": {"channels": 4}}
    defaults = {"height": 8, "width": 8, "scale": 1.0, "steps": 4}
    params = {
        "unet_config": UNCONDITIONAL,
        "first_stage_config": identity,
        "cond_stage_config": None,
        "prediction": "v",
    }
    model = ldm.LatentDiffusion(**copy.deepcopy(params), schedule={"name": "cosine", "T": T}, defaults=defaults)
    model.model.diffusion_model = Table(T)
    for t, sigma in enumerate(model.schedule.sigmas.tolist()):
        model.model.diffusion_model.weight.data[t] = weight_of(DEVIATION**2 / (DEVIATION**2 + sigma**2), sigma)
    return model


def weight_of(coefficient: float, sigma: float) -> float:
    """Return the network's weight with which x0 is that coefficient times x."""
    c_skip, c_out = scalings("v", sigma)
    return (coefficient - c_skip) / c_out * math.sqrt(1 + sigma**2)


def coefficient_of(stage, sigma: float) -> float:
    x = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    found = stage.predict(stage.model, x, torch.tensor([sigma], dtype=torch.float64), {})
    return found.flatten()[0].item()


def train(stage, count: int, rate: float, size: int = 64) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(stage.networks.parameters(), rate)
    for number in range(count):
        images = DEVIATION * torch.randn(size, 4, 8, 8)
        loss, _, _ = stage.turn({"mean": images, "std": torch.zeros_like(images)}, 0, number, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - number / count)


def test_a_step_makes_two_of_an_exact_teacher():
    """On paper: two DDIM steps of the Gaussian's denoiser, by their coefficients."""
    stage = DistillationStage(gaussian(), 1e-3, steps=8)
    train(stage, 400, 0.03)
    sigmas = sampling_sigmas(stage.latent_diffusion.schedule, 16, "trailing").tolist()
    for k in range(8):
        start, middle, end = sigmas[2 * k : 2 * k + 3]
        x = 1.0
        for now, then in ((start, middle), (middle, end)):
            x0 = DEVIATION**2 / (DEVIATION**2 + now**2) * x
            x = x0 + then / now * (x - x0)
        wanted = (x - end / start) / (1 - end / start)
        assert coefficient_of(stage, start) == pytest.approx(wanted, abs=2e-3), k
    assert stage.latent_diffusion.defaults["steps"] == 8 and stage.latent_diffusion.defaults["scale"] == 1


def test_consistency_tuning_ends_at_the_exact_consistency_function():
    """Of a Gaussian, x0 along the probability flow's path is s / sqrt(s^2 + sigma^2) x."""
    stage = DistillationStage(gaussian(), 1e-3, 4, {"stage_batches": 300, "q": 2.0, "mean": -0.5, "std": 1.2})
    before = {sigma: coefficient_of(stage, sigma) for sigma in (0.2, 0.6, 1.5, 4.0)}
    train(stage, 1500, 0.02)
    for sigma, denoised in before.items():
        wanted = DEVIATION / math.hypot(DEVIATION, sigma)
        assert denoised == pytest.approx(DEVIATION**2 / (DEVIATION**2 + sigma**2), abs=0.02)
        assert coefficient_of(stage, sigma) == pytest.approx(wanted, abs=0.03), sigma


def test_both_noise_levels_have_the_same_dropout():
    """At r = sigma both predictions are one, so that only the square root's offset, 1e-8, is left of the loss."""
    config = copy.deepcopy(TINY)
    config["unet_config"]["params"]["dropout"] = 0.5
    model = randomised(ldm.LatentDiffusion(**config))
    stage = DistillationStage(model, 1e-3, 1, {"stage_batches": 1, "q": 1e30}, scale=1.0)
    stage.networks.train()
    z, cond = torch.randn(4, *model.latent_size(32, 32)), model.condition(["five"] * 4)
    x = 3 * torch.randn_like(z)
    sigmas = torch.full((4,), 3.0, dtype=torch.float64)
    torch.manual_seed(0)
    first, second = (stage.predict(stage.model, x, sigmas, cond) for _ in range(2))
    assert (first - second).abs().max() > 1e-3  # there is dropout
    levels = Consistency(stage_batches=1, q=1e30, mean=math.log(3.0), std=0.0)
    losses = stage.consistency_losses(z, cond, torch.randn_like(z), levels, 0)
    assert losses.tolist() == pytest.approx([(1 / 9 + 1) * 1e-4] * 4, rel=0.01)


def test_r_approaches_sigma_in_stages():
    levels = Consistency(stage_batches=10)
    sigmas = torch.tensor([0.1, 1.0, 50.0], dtype=torch.float64)
    sigmoid = [1 / (1 + math.exp(sigma)) for sigma in sigmas.tolist()]
    for number in range(4):
        wanted = [
            s * max(1 - (1 + 8 * part) / 4 ** (number + 1), 0) for s, part in zip(sigmas.tolist(), sigmoid, strict=True)
        ]
        assert levels.nearer(sigmas, number).tolist() == pytest.approx(wanted)
    assert levels.nearer(sigmas, 0)[0] == 0 and (levels.nearer(sigmas, 9) / sigmas > 0.9999).all()


def test_two_steps_of_any_teacher_end_in_the_same_place():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator)
    start, middle, end = (torch.tensor(part, dtype=torch.float64) for part in ([9, 4, 1], [3, 1, 0.2], [1, 0.3, 0]))

    def teacher(x, sigmas):
        return torch.tanh(x / (1 + sigmas.reshape(-1, 1, 1, 1)))

    def ddim(x0, x, now, then):
        return x0 + (then / now).reshape(-1, 1, 1, 1) * (x - x0)

    between = ddim(teacher(x, start), x, start, middle)
    after = ddim(teacher(between, middle), between, middle, end)
    assert torch.allclose(ddim(two_steps(teacher, x, start, middle, end), x, start, end), after, atol=1e-12)


def test_the_teacher_guides_as_sampling_does():
    """One DDIM step with guidance, in its interval and outside, against `generate`'s own guidance."""
    torch.manual_seed(1)
    model = randomised(ldm.LatentDiffusion(**copy.deepcopy(TINY))).eval()
    stage = DistillationStage(model, 1e-3, steps=2, scale=3.0, interval=(0.5, 5.0))
    cond, null = model.condition(["five", "a bold six"]), model.condition(["", ""])
    x = torch.randn(2, *model.latent_size(32, 32))
    guided = classifier_free(model.denoiser([0, 1]), cond, null, 3.0, interval=(0.5, 5.0))
    for sigma in (0.3, 0.5, 2.0, 5.0, 9.0):
        x0, added = stage.teach(x, torch.full((2,), sigma, dtype=torch.float64), cond)
        assert torch.allclose(x0 + added, guided(x, sigma).x0, atol=1e-4), sigma
        assert bool(added.any()) == (0.5 < sigma <= 5.0)


def test_what_cannot_be_distilled():
    refused("steps 24: their noise levels", DistillationStage, gaussian(100), 1e-3, 24)
    refused("guidance scale 2.0 needs a null condition", DistillationStage, gaussian(), 1e-3, 4, scale=2.0)
    for message, options in (
        (r"interval ends before it begins: got 5 to 1", {"interval": [5, 1]}),
        (r"interval \[1\] is not two numbers", {"interval": [1]}),
        (r"interval must be at least 0, got \[-1, 2\]", {"interval": [-1, 2]}),
        (r"scale must be at least 0, got -3", {"scale": -3}),
        (r"interval has no effect at guidance scale 1", {"interval": [0.3, 2]}),
        (r"scale 'three' is not a finite number", {"scale": "three"}),
        (r"consistency: q 1 must be above 1", {"consistency": {"stage_batches": 1, "q": 1}}),
        (r"loading \{'ema': True\} has no effect on a model that is loaded already", {"loading": {"ema": True}}),
        (r"dropout 0.1 needs a null condition", {"caption_dropout": 0.1}),
    ):
        refused(message, DistillationStage, gaussian(), 1e-3, 4, **options)
    assert DistillationStage(gaussian(), 1e-3, 64, {"stage_batches": 1}).latent_diffusion.defaults["steps"] == 64
