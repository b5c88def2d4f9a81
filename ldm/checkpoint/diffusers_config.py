"""Read the configurations of a diffusers folder: UNet, autoencoder and scheduler -> the arguments of our classes.

A key that is missing means diffusers' default; one that is unknown must be null or false, so that a network that
computes something else is never taken for ours. All raise ValueError that names what is unsupported.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.checkpoint.diffusers_names import UNetLevel
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import one_if_equal
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import SCHEDULES
from ldm.models.unet import UNetModel

ATTENDED, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
UNET_DEFAULTS = {
    **{"sample_size": None, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280]},
    "down_block_types": [ATTENDED[0]] * 3 + [PLAIN[0]],
    "up_block_types": [PLAIN[1]] + [ATTENDED[1]] * 3,
    **{"layers_per_block": 2, "transformer_layers_per_block": 1, "attention_head_dim": 8, "cross_attention_dim": 1280},
    **{"only_cross_attention": False, "use_linear_projection": False, "upcast_attention": False},
    **{"resnet_time_scale_shift": "default", "dropout": 0.0, "norm_num_groups": 32},
    "addition_embed_type": None,
    # no effect unless that is text_time
    **{"addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None},
}
UNET_FIXED = {  # the only values that our UNetModel has
    **{"act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True},
    **{"freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5},
    **{"attention_type": "default", "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0},
    **{"time_embedding_type": "positional", "addition_embed_type_num_heads": 64},  # of an embedding that is null
}
VAE_DEFAULTS = {
    **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 32, "scaling_factor": 0.18215},
    **{"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64]},
    **{"layers_per_block": 1, "mid_block_add_attention": True, "norm_num_groups": 32},
    "force_upcast": True,  # says how a half-precision pipeline computes, not what
}
VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
# Our arguments -> theirs with the same values; the values of PER_LEVEL are one for all levels or one each.
UNET_KEYS = {
    **{"in_channels": "in_channels", "out_channels": "out_channels", "dropout": "dropout"},
    **{"norm_groups": "norm_num_groups", "use_linear_in_transformer": "use_linear_projection"},
}
PER_LEVEL = {"num_res_blocks": "layers_per_block", "transformer_depth": "transformer_layers_per_block"}
VAE_KEYS = {
    **{"in_channels": "in_channels", "out_ch": "out_channels", "z_channels": "latent_channels"},
    **{"num_res_blocks": "layers_per_block", "norm_groups": "norm_num_groups"},
}

# Schedulers' beta_schedule and prediction_type -> ours.
BETA_CURVES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid_beta",  # DDPMScheduler's alone
}
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
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
# Those with set_alpha_to_one, and what it is where a configuration does not say; the others have final_sigmas_type.
ENDS_AT_ZERO = {"DDIMScheduler": True, "LCMScheduler": True, "PNDMScheduler": False}
# Fields of schedulers that become settings of ours, and those without an effect in Stable Diffusion's pipelines (which
# switch clip_sample off and set steps_offset to 1) or unless another field is set.
_READ = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "thresholding"),
    *("clip_sample", "clip_sample_range", "steps_offset", "sample_max_value", "dynamic_thresholding_ratio"),
    *("flow_shift", "time_shift_type", "set_alpha_to_one"),
)
_OURS = {  # the values that our samplers have; of fields that are in neither table: null and false
    **{"skip_prk_steps": (True,), "variance_type": ("fixed_small", None)},
    **{"solver_order": (2,), "algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "logrho", "bh2")},
    **{
        "lower_order_final": (True,),
        "final_sigmas_type": ("zero", "sigma_min"),
        "lambda_min_clipped": (float("-inf"),),
    },
    **{"predict_x0": (True,), "disable_corrector": ([],), "interpolation_type": ("linear",)},
    **{"timestep_type": ("discrete",), "timestep_scaling": (10.0,)},
}


def unet_levels(params: Mapping[str, Any]) -> list[UNetLevel]:
    """Return the levels of a UNetModel with these arguments."""
    own = arguments(UNetModel, params)
    blocks = _per_level(own["num_res_blocks"], len(own["channel_mult"]))
    return [UNetLevel(count, 2**i in own["attention_resolutions"]) for i, count in enumerate(blocks)]


def read_unet(config: Mapping[str, Any]) -> Config:
    """Return UNetModel's arguments from UNet2DConditionModel's configuration."""
    own = _understood(config, UNET_DEFAULTS, UNET_FIXED, "the UNet")
    widths = list(own["block_out_channels"])
    attended = [name == ATTENDED[0] for name in own["down_block_types"]]
    _check_blocks(own, unet_blocks(attended), f"the UNet's blocks are {{}} and {{}}: only {ATTENDED[0]} and {PLAIN[0]}")
    depths, contexts = own["transformer_layers_per_block"], one_if_equal(own["cross_attention_dim"])
    if isinstance(contexts, list):
        raise ValueError(f"the UNet's cross_attention_dim is {contexts}: it must be one for all levels")
    if not isinstance(depths, int) and not all(isinstance(depth, int) for depth in depths):
        raise ValueError(f"the UNet's transformer_layers_per_block is {depths}: one number per level is supported")
    if own["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise ValueError(f"the UNet's resnet_time_scale_shift is {own['resnet_time_scale_shift']!r}, which is unknown")
    if own["addition_embed_type"] not in (None, "text_time"):
        raise ValueError(f"the UNet's addition_embed_type is {own['addition_embed_type']!r}: only text_time is known")
    pooled = {"num_classes": "sequential", "adm_in_channels": own["projection_class_embeddings_input_dim"]}
    return {
        "image_size": _height(own["sample_size"] or 64),
        **{ours: own[theirs] for ours, theirs in UNET_KEYS.items()},
        **{ours: one_if_equal(own[theirs]) for ours, theirs in PER_LEVEL.items()},
        "model_channels": widths[0],
        "channel_mult": _multiples(widths, "the UNet"),
        "attention_resolutions": [2**i for i, attends in enumerate(attended) if attends][::-1],
        **_read_heads(own["attention_head_dim"], widths, attended),
        "use_spatial_transformer": True,
        "context_dim": contexts,
        "use_scale_shift_norm": own["resnet_time_scale_shift"] == "scale_shift",
        "disable_self_attentions": _per_level(own["only_cross_attention"], len(widths)),
        "legacy": False,
        **({} if own["addition_embed_type"] is None else pooled),
    }


def unet_blocks(attended: Sequence[bool]) -> list[list[str]]:
    """Return UNet2DConditionModel's down_block_types and up_block_types."""
    down, up = zip(*(ATTENDED if attends else PLAIN for attends in attended), strict=True)
    return [list(down), list(up[::-1])]


def _read_heads(heads: int | Sequence[int], widths: Sequence[int], attended: Sequence[bool]) -> Config:
    """attention_head_dim, which is the *number* of heads -> num_heads, or num_head_channels if their width is one."""
    if isinstance(heads, int):
        return {"num_heads": heads}
    used = [i for i in range(len(widths)) if attended[i] or i == len(widths) - 1]  # the middle has the last level's
    if len(heads) == len(widths):
        if len({widths[i] / heads[i] for i in used}) == 1 and not widths[-1] % heads[-1]:
            return {"num_head_channels": widths[-1] // heads[-1]}
        if len({heads[i] for i in used}) == 1:
            return {"num_heads": heads[-1]}
    found = f"the UNet's attention_head_dim is {list(heads)} heads for levels of widths {list(widths)}"
    raise ValueError(f"{found}: our UNetModel has one number of heads, or one width of a head")


def read_vae(config: Mapping[str, Any]) -> tuple[Config, float]:
    """Return (our AutoencoderKL's arguments, the scale factor) from diffusers' AutoencoderKL's configuration."""
    own = _understood(config, VAE_DEFAULTS, VAE_FIXED, "the autoencoder")
    widths = list(own["block_out_channels"])
    attended = [name == "AttnDownEncoderBlock2D" for name in own["down_block_types"]]
    blocks = "the autoencoder's blocks are {} and {}: only DownEncoderBlock2D and AttnDownEncoderBlock2D"
    _check_blocks(own, vae_blocks(attended), blocks)
    resolution = max(_height(own["sample_size"]), 2 ** len(widths))  # only tells the levels apart
    ddconfig = {
        **{ours: own[theirs] for ours, theirs in VAE_KEYS.items()},
        **{"double_z": True, "resolution": resolution, "ch": widths[0], "dropout": 0.0},
        "ch_mult": _multiples(widths, "the autoencoder"),
        "attn_resolutions": [resolution // 2**i for i, attends in enumerate(attended) if attends],
        **({} if own["mid_block_add_attention"] else {"attn_type": "none"}),
    }
    return {"ddconfig": ddconfig, "embed_dim": own["latent_channels"]}, own["scaling_factor"]


def vae_blocks(attended: Sequence[bool]) -> list[list[str]]:
    """Return AutoencoderKL's down_block_types and up_block_types."""
    kinds = ["Attn" if attends else "" for attends in attended]
    return [[f"{kind}DownEncoderBlock2D" for kind in kinds], [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)]]


def read_scheduler(config: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Return (LatentDiffusion's schedule, prediction and defaults (sampler and spacing), notes)."""
    name = config.get("_class_name")
    if name not in SCHEDULERS and "beta_schedule" not in config:
        raise ValueError(f"the scheduler is a {name}: supported are those with a beta_schedule")
    if config.get("trained_betas") is not None:
        raise ValueError("the scheduler has trained_betas, betas one by one: our schedules are named curves")
    curve, kind = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    for value, known, key in ((curve, BETA_CURVES, "beta_schedule"), (kind, PREDICTION_TYPES, "prediction_type")):
        if value not in known:
            raise ValueError(f"the scheduler's {key} is {value!r}: known are {', '.join(known)}")
    schedule = {"name": BETA_CURVES[curve], "T": config.get("num_train_timesteps", 1000)}
    if SCHEDULES[schedule["name"]] is not None:
        schedule |= {"start": config.get("beta_start", 0.0001), "end": config.get("beta_end", 0.02)}
    if config.get("rescale_betas_zero_snr"):
        schedule["zero_terminal_snr"] = True
    origin = "its scheduler says so" if "prediction_type" in config else "assumed, since its scheduler does not say"
    notes = [f"the UNet predicts {PREDICTION_TYPES[kind]} ({origin})"]
    sampler, spacing = SCHEDULERS.get(name, ("", "leading"))
    if sampler not in SAMPLERS:
        notes.append(f"its scheduler is a {name}; the sampler is ddim unless another is named")
        sampler = "ddim"
    spacing = config.get("timestep_spacing", spacing)
    for own in ("karras", "exponential"):
        spacing = own if config.get(f"use_{own}_sigmas") else spacing
    if config.get("thresholding"):
        notes.append("its scheduler's dynamic thresholding is left out")
    known = _OURS | ({"solver_order": (3,)} if sampler == "deis" else {})
    others = {key: value for key, value in config.items() if key not in _READ and not key.startswith("_")}
    dropped = [f"{key} {value!r}" for key, value in others.items() if value not in known.get(key, (None, False))]
    if dropped:
        notes.append(f"of its scheduler, {', '.join(dropped)} cannot be kept: diffusers' images may differ")
    ends = config.get("final_sigmas_type") != "sigma_min"
    if name in ENDS_AT_ZERO:  # others ignore it, where it may remain from a scheduler before
        ends = config.get("set_alpha_to_one", ENDS_AT_ZERO[name])
    defaults = {"sampler": sampler, "spacing": spacing, "final_sigma": "zero" if ends else "sigma_min"}
    return {"schedule": schedule, "prediction": PREDICTION_TYPES[kind], "defaults": defaults}, notes


def _understood(config: Mapping[str, Any], defaults: Config, fixed: Config, whose: str) -> Config:
    """Return the values of the keys in `defaults`. Others must be as in `fixed`, or be null, false or private."""
    for key, value in config.items():
        allowed = (fixed[key],) if key in fixed else (None, False)
        if value not in allowed and not key.startswith("_") and key not in defaults:
            raise ValueError(f"{whose} has {key} {value!r}, which our networks do not support")
    return {key: config.get(key, default) for key, default in defaults.items()}


def _check_blocks(own: Config, expected: list[list[str]], sentence: str) -> None:
    found = [list(own["down_block_types"]), list(own["up_block_types"])]
    if found != expected or len(found[0]) != len(own["block_out_channels"]):
        where = "one per entry of block_out_channels, and mirrored on the way up"
        raise ValueError(f"{sentence.format(*found)} are supported, {where}")


def arguments(cls: type, params: Mapping[str, Any]) -> Config:
    """Return all arguments of a class's constructor: those given, and its defaults."""
    bound = inspect.signature(cls).bind(**params)
    bound.apply_defaults()
    return dict(bound.arguments)


def _height(size: int | Sequence[int]) -> int:
    """Return a size, or the height of [height, width]."""
    return size if isinstance(size, int) else size[0]


def _per_level(value: Any, levels: int) -> list:
    return list(value) if isinstance(value, Sequence) else [value] * levels


def _multiples(widths: Sequence[int], whose: str) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{whose} has block_out_channels {list(widths)}: each must be a multiple of the first")
    return [width // widths[0] for width in widths]
