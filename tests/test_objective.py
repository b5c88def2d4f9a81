"""The options that all stages of denoising share: what they do to the loss, and that no stage takes anything else."""

import pytest
import torch
from conftest import TINY, refused
from test_pixel_diffusion import CONFIG

from ldm.diffusion.loss import prediction_loss
from ldm.training.objective import Objective
from ldm.training.share import BatchShare
from ldm.util import instantiate_from_config

OTHERS = [  # stages that train no denoiser
    *("training.autoencoder.AutoencoderStage", "training.clip.CLIPStage", "training.classifier.ClassifierStage"),
    *("optional.ddgan_stage.DenoisingGANStage", "optional.noisy_classifier_stage.NoisyClassifierStage"),
]
DENOISING = {
    "training.diffusion.DiffusionStage": {"unet_config": TINY["unet_config"], "schedule": {"name": "cosine"}},
    "training.pixel_diffusion.PixelDiffusionStage": {"model": CONFIG},
    "finetune.dreambooth.DreamBoothStage": {"resolution": 32},
    "finetune.textual_inversion.TextualInversionStage": {"resolution": 32, "word": "<sks>", "initial": "five"},
}


@pytest.fixture(scope="module")
def build(tiny_parts, tiny_checkpoint):
    """build(stage, **options) -> the stage, of a tiny model."""
    files = dict.fromkeys(DENOISING, {"ckpt": str(tiny_checkpoint)})
    files["training.diffusion.DiffusionStage"] = tiny_parts | {"defaults": TINY["defaults"]}
    files["training.pixel_diffusion.PixelDiffusionStage"] = {}

    def make(stage, **options):
        params = {**DENOISING.get(stage, {}), **files.get(stage, {}), "learning_rate": 1e-3, **options}
        return instantiate_from_config({"target": f"ldm.{stage}", "params": params})

    return make


@pytest.mark.parametrize("stage", [*DENOISING, *OTHERS])
def test_every_stage_refuses_an_unknown_option(build, stage):
    refused(f"{stage}: .*'errror'.*; it takes .*'learning_rate'", build, stage, errror="l1")


@pytest.mark.parametrize("stage", DENOISING)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": "l3"}, "unknown error 'l3'"),
        ({"weight": {"name": "max_snr"}}, "unknown loss weight 'max_snr'"),
        ({"weight": {"nam": "snr"}}, r"^weight: .*'nam'; it takes"),
        ({"weight": "min_snr"}, "weight 'min_snr' must be a mapping or null"),
        ({"noise": {"offset": -1.0}}, "offset -1.0 must not be below 0"),
        ({"noise": {"ofset": 0.1}}, r"^noise: .*'ofset'; did you mean offset\?"),
        ({"timesteps": {"name": "even"}}, "distribution of timesteps 'even'"),
        ({"timesteps": {"name": "uniform", "men": 1}}, r"^timesteps: .*'men'; it takes"),
        ({"timesteps": {"mean": 1}}, "^timesteps: missing .*'name'"),
        ({"timesteps": "uniform"}, "timesteps 'uniform' must be a mapping or null"),
    ],
)
def test_every_denoising_stage_names_a_bad_value(build, stage, options, message):
    with pytest.raises(ValueError, match=message):
        build(stage, **options)


@pytest.mark.parametrize("stage", DENOISING)
def test_every_denoising_stage_uses_them(build, stage):
    options = {"error": "l1", "weight": {"name": "min_snr"}, "noise": {"offset": 0.2}, "timesteps": {"name": "uniform"}}
    objective = build(stage, **options).objective
    assert {name: getattr(objective, name) for name in options} == options


def test_the_loss_of_an_objective_by_hand(tiny_model):
    objective = Objective(tiny_model, error="l1", weight={"name": "min_snr", "gamma": 2.0}, noise={"offset": 0.3})
    z, cond = torch.randn(3, 4, 8, 8), tiny_model.condition(["one", "two", ""])
    torch.manual_seed(0)
    t, noise = objective.sample_timesteps(z, BatchShare()), objective.sample_noise(z, BatchShare())
    torch.manual_seed(0)
    assert torch.equal(t, torch.randint(0, 1000, (3,)))
    assert torch.equal(noise, torch.randn_like(z) + 0.3 * torch.randn(3, 4, 1, 1))
    ab = tiny_model.schedule.alphas_cumprod[t].float()[:, None, None, None]
    signal, spread, snr = ab.sqrt(), (1 - ab).sqrt(), (ab / (1 - ab)).flatten()
    error = tiny_model.apply_model(signal * z + spread * noise, t, cond) - (signal * noise - spread * z)
    expected = error.abs().mean((1, 2, 3)) * snr.clamp(max=2) / (snr + 1)
    torch.testing.assert_close(objective.losses(z, cond, t, noise, BatchShare()), expected, rtol=1e-4, atol=1e-6)


def test_no_weight_is_a_weight_of_one():
    output, x0, noise, ab = torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9])
    plain = prediction_loss("eps", output, x0, noise, ab)
    assert torch.equal(plain, (output - noise).square().mean(1))
    assert torch.equal(plain, prediction_loss("eps", output, x0, noise, ab, weight={"name": "none"}))
