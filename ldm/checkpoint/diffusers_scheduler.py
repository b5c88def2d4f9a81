"""scheduler_config.json <-> our schedule, prediction and drawing defaults."""

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.diffusers_config import refuse
from ldm.diffusion.sampling import SAMPLERS, choose_sampler, get_sampler
from ldm.diffusion.schedule import SCHEDULES

BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid_beta",  # DDPMScheduler's alone
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# scheduler -> our sampler, and the spacing that it has when its configuration does not say
SCHEDULERS = {
    "DDIMScheduler": ("ddim", "leading"),
    "DDPMScheduler": ("ddpm", "leading"),
    "PNDMScheduler": ("plms", "leading"),
    "LCMScheduler": ("lcm", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": ("euler_a", "linspace"),
    "HeunDiscreteScheduler": ("heun", "linspace"),
    "KDPM2DiscreteScheduler": ("dpm2", "linspace"),
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", "linspace"),
    "LMSDiscreteScheduler": ("lms", "linspace"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace"),
    "UniPCMultistepScheduler": ("unipc", "linspace"),
    "DEISMultistepScheduler": ("deis", "linspace"),
}
# ours -> theirs. Stable Diffusion's "leading" has steps_offset 1, which the pipeline insists on: ours, to the digit.
SPACINGS = {"leading": "leading", "compvis": "leading", "linspace": "linspace", "trailing": "trailing"}


def read_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A scheduler's configuration -> (LatentDiffusion's schedule, prediction and defaults, notes).

    The defaults are sampler and spacing. Raises ValueError for a schedule, prediction or scheduler that we have not.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS and "beta_schedule" not in config:
        raise ValueError(f"the scheduler is a {name}: known are those with a beta_schedule")
    if config.get("trained_betas") is not None:
        raise ValueError("the scheduler has trained_betas, betas one by one: our schedules are named curves")
    curve, kind = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    for value, known, key in ((curve, BETAS, "beta_schedule"), (kind, PREDICTIONS, "prediction_type")):
        if value not in known:
            raise ValueError(f"the scheduler's {key} is {value!r}: known are {', '.join(known)}")
    schedule = {"name": BETAS[curve], "T": config.get("num_train_timesteps", 1000)}
    if SCHEDULES[schedule["name"]] is not None:
        schedule |= {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    source = "its scheduler says so" if "prediction_type" in config else "assumed, since its scheduler does not say"
    notes = [f"the UNet predicts {PREDICTIONS[kind]} ({source})"]
    sampler, spacing = SCHEDULERS.get(name, ("", "leading"))
    if sampler not in SAMPLERS:
        notes.append(f"its scheduler is a {name}; drawn with ddim unless another sampler is named")
        sampler = "ddim"
    spacing = config.get("timestep_spacing", spacing)
    for key, own in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        spacing = own if config.get(key) else spacing
    if config.get("thresholding"):
        notes.append("its scheduler's dynamic thresholding is left out")
    defaults = {"sampler": sampler, "spacing": spacing}
    return {"schedule": schedule, "prediction": PREDICTIONS[kind], "defaults": defaults}, notes


def write_scheduler(
    schedule: Mapping[str, Any], prediction: str, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Our schedule, prediction and drawing defaults -> (a DDIMScheduler's configuration, notes on what is lost)."""
    name = schedule.get("name", "cosine")
    curves = {own: theirs for theirs, own in BETAS.items() if theirs != "sigmoid"}
    refuse({f"the noise schedule {name!r}": name not in curves})
    ends = {}
    if SCHEDULES[name] is not None:
        given = (schedule.get("start"), schedule.get("end"))
        start, end = (own if own is not None else usual for own, usual in zip(given, SCHEDULES[name], strict=True))
        ends = {"beta_start": start, "beta_end": end}
    T = schedule.get("T", 1000)
    sampler = choose_sampler(defaults.get("sampler", "ddim"), defaults.get("steps", 50), T)
    spacing = defaults.get("spacing")
    spacing = get_sampler(sampler).spacing if spacing is None else spacing
    their_spacing = SPACINGS.get(spacing) if isinstance(spacing, str) else None  # it may be a list of levels
    notes = []
    if sampler != "ddim" or their_spacing is None:
        notes.append(f"the folder's scheduler is DDIM; the model's own sampler is {sampler}, spacing {spacing}")
    own = {key: defaults.get(key, usual) for key, usual in (("steps", 50), ("scale", 7.5), ("interval", None))}
    if own != {"steps": 50, "scale": 7.5, "interval": None}:
        notes.append(f"the folder cannot say the model's own drawing settings: {own}")
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": T,
        "beta_schedule": curves[name],
        **ends,
        "trained_betas": None,
        "prediction_type": {own: theirs for theirs, own in PREDICTIONS.items()}[prediction],
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "timestep_spacing": "leading" if their_spacing is None else their_spacing,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,  # our samplers end at sigma 0
        "thresholding": False,
    }
    return config, notes
