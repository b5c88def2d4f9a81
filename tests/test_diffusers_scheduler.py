"""Schedules, spacings and predictions against diffusers' schedulers."""

import pytest
import torch

from ldm.checkpoint.diffusers_config import read_scheduler
from ldm.checkpoint.diffusers_writer import write_scheduler
from ldm.diffusion.schedule import make_schedule, sampling_sigmas

SCHEDULES = [
    ({"name": "scaled_linear"}, "eps"),
    ({"name": "scaled_linear", "T": 500, "start": 0.001, "end": 0.01}, "x0"),
    ({"name": "linear", "T": 1000}, "eps"),
    ({"name": "cosine"}, "v"),
    ({"name": "scaled_linear", "zero_terminal_snr": True}, "v"),
]


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule, prediction):
    from diffusers import DDIMScheduler

    config, notes = write_scheduler(schedule, prediction, {"spacing": "trailing"})
    scheduler = DDIMScheduler(**config)
    own = make_schedule(**schedule).alphas_cumprod
    # float32 betas near 1 (cosine) cost the last of 1,000 products some digits
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), own, atol=1e-6, rtol=1e-3)
    params, _ = read_scheduler(scheduler.config)
    assert torch.equal(make_schedule(**params["schedule"]).alphas_cumprod, own)
    assert (params["prediction"], params["defaults"]) == (prediction, {"sampler": "ddim", "spacing": "trailing"})
    assert notes == [] and dict(scheduler.config)["steps_offset"] == 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [4, 7, 50])
def test_spacings_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    config, _ = write_scheduler({"name": "scaled_linear"}, "eps", {"spacing": spacing})
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    schedule = make_schedule("scaled_linear")
    sigmas = sampling_sigmas(schedule, steps, read_scheduler(scheduler.config)[0]["defaults"]["spacing"])
    assert [schedule.t_at(sigma) for sigma in sigmas[:-1].tolist()] == scheduler.timesteps.tolist()


def test_schedulers_that_are_read():
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "use_karras_sigmas": True}
    params, _ = read_scheduler(euler)
    assert params["defaults"]["spacing"] == "karras"
    params, notes = read_scheduler({"_class_name": "OddScheduler", "beta_schedule": "sigmoid"})
    assert params["schedule"]["name"] == "sigmoid_beta" and params["defaults"]["sampler"] == "ddim"
    assert any("OddScheduler; the sampler is ddim" in note for note in notes)
    _, notes = write_scheduler({"name": "linear"}, "eps", {"spacing": "karras", "steps": 20, "scale": 7.5})
    assert "spacing karras" in notes[0] and "'steps': 20" in notes[1]
    config, notes = write_scheduler({"name": "linear"}, "eps", {"spacing": [999, 500, 1]})
    assert config["timestep_spacing"] == "leading" and "[999, 500, 1]" in notes[0]
