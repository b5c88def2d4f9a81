"""Schedules, spacings and predictions against diffusers' schedulers."""

import inspect
import json

import pytest
import torch

from ldm.checkpoint.diffusers_config import SCHEDULERS, read_scheduler
from ldm.checkpoint.diffusers_writer import write_scheduler
from ldm.diffusion.schedule import make_schedule, sampling_sigmas

SCHEDULES = [
    ({"name": "scaled_linear"}, "eps"),
    ({"name": "scaled_linear", "T": 500, "start": 0.001, "end": 0.01}, "x0"),
    ({"name": "linear", "T": 1000}, "eps"),
    ({"name": "cosine"}, "v"),
    ({"name": "scaled_linear", "zero_terminal_snr": True}, "v"),
]


DEFAULTS = {"sampler": "ddim", "spacing": "trailing", "final_sigma": "zero"}


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
    assert (params["prediction"], params["defaults"]) == (prediction, DEFAULTS)
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_field_of_a_scheduler_is_dropped_in_silence(name):
    """Each field, with another value than the scheduler's own: it changes what is read, or it is named."""
    import diffusers

    scheduler = getattr(diffusers, name)
    usual = {field.name: field.default for field in inspect.signature(scheduler).parameters.values()}
    config = json.loads(scheduler().to_json_string()) | {"_class_name": name}
    before, notes = read_scheduler(config)
    without_effect = {"clip_sample", "clip_sample_range", "steps_offset", "sample_max_value", "flow_shift"}
    without_effect |= {"dynamic_thresholding_ratio", "time_shift_type"}
    for field, value in usual.items():
        if field in without_effect or field == "trained_betas":
            continue
        other = OTHERS.get(field, not value if isinstance(value, bool) else 0.5)
        after, said = read_scheduler(config | {field: other})
        assert after != before or any(field in note or "thresholding" in note for note in {*said} ^ {*notes}), field


OTHERS = {
    **{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "num_train_timesteps": 500},
    **{"timestep_spacing": "trailing", "beta_start": 0.002, "beta_end": 0.03},
}


def test_where_schedulers_end():
    """Against diffusers' defaults: of the three with set_alpha_to_one, PNDM's alone is false."""
    for name in SCHEDULERS:
        config = {"_class_name": name, "beta_schedule": "scaled_linear"}
        fields = inspect.signature(getattr(__import__("diffusers"), name)).parameters
        usual = fields["set_alpha_to_one"].default if "set_alpha_to_one" in fields else True
        for given, zero in (({}, usual), ({"set_alpha_to_one": False}, "set_alpha_to_one" not in fields)):
            assert read_scheduler(config | given)[0]["defaults"]["final_sigma"] == ("zero" if zero else "sigma_min")
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear", "final_sigmas_type": "sigma_min"}
    assert read_scheduler(euler)[0]["defaults"]["final_sigma"] == "sigma_min"


def test_schedulers_that_are_read():
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    params, _ = read_scheduler(euler)
    assert params["defaults"]["spacing"] == "karras"
    params, notes = read_scheduler({"_class_name": "OddScheduler", "beta_schedule": "sigmoid"})
    assert params["schedule"]["name"] == "sigmoid_beta" and params["defaults"]["sampler"] == "ddim"
    assert any("OddScheduler; the sampler is ddim" in note for note in notes)
    _, notes = write_scheduler({"name": "linear"}, "eps", {"spacing": "karras", "steps": 20, "scale": 7.5})
    assert "spacing karras" in notes[0] and "'steps': 20" in notes[1]
    config, notes = write_scheduler({"name": "linear"}, "eps", {"spacing": [999, 500, 1]})
    assert config["timestep_spacing"] == "leading" and "[999, 500, 1]" in notes[0]
