"""Configurations of UNet and autoencoder: ours <-> diffusers'. What the other side cannot say is refused.

`read_*` take a part's config.json and give the parameters of our class; `write_*` the reverse, with every size spelled
out, since defaults differ between versions. A key that is missing means diffusers' default; one that is unknown must
be null or false, so that a network that computes something else is never taken for ours.

All raise ValueError with one sentence that names what cannot be said.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.checkpoint.diffusers_names import Level
from ldm.models.unet import UNetModel

Config = dict[str, Any]

ATTENDED, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
UNET_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": [ATTENDED[0]] * 3 + [PLAIN[0]],
    "up_block_types": [PLAIN[1]] + [ATTENDED[1]] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "dropout": 0.0,
    "norm_num_groups": 32,
}
# The only values that our UNetModel has; the first ones are written too.
UNET_FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
}
UNET_FIXED_TOO = {
    "addition_embed_type_num_heads": 64,  # of an embedding that is null
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
}
VAE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,  # says how a half-precision pipeline computes, not what
}
VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}


def unet_levels(params: Mapping[str, Any]) -> list[Level]:
    """The levels of a UNetModel with these parameters."""
    own = arguments(UNetModel, params)
    blocks = _per_level(own["num_res_blocks"], len(own["channel_mult"]))
    return [Level(count, 2**i in own["attention_resolutions"]) for i, count in enumerate(blocks)]


def read_unet(config: Mapping[str, Any]) -> Config:
    """UNet2DConditionModel's configuration -> UNetModel's parameters."""
    own = understood(config, UNET_DEFAULTS, {**UNET_FIXED, **UNET_FIXED_TOO}, "the UNet")
    widths = list(own["block_out_channels"])
    attended = [name == ATTENDED[0] for name in own["down_block_types"]]
    expected = [[pair[side] for pair in _kinds(attended)] for side in (0, 1)]
    if len(attended) != len(widths) or [list(own["down_block_types"]), list(own["up_block_types"])[::-1]] != expected:
        raise ValueError(
            f"the UNet's blocks are {list(own['down_block_types'])} and {list(own['up_block_types'])}: only "
            f"{ATTENDED[0]} and {PLAIN[0]} are known, one per entry of block_out_channels, and mirrored on the way up"
        )
    depths, contexts = own["transformer_layers_per_block"], own["cross_attention_dim"]
    if not isinstance(contexts, int):
        contexts = _only(contexts, "the UNet's cross_attention_dim")
    if not isinstance(depths, int) and not all(isinstance(depth, int) for depth in depths):
        raise ValueError(f"the UNet's transformer_layers_per_block is {depths}: one number per level is known")
    params = {
        "image_size": 64 if own["sample_size"] is None else first(own["sample_size"]),
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "model_channels": widths[0],
        "channel_mult": _multiples(widths, "the UNet"),
        "num_res_blocks": _plain(own["layers_per_block"]),
        "attention_resolutions": [2**i for i, attends in enumerate(attended) if attends][::-1],
        **_read_heads(own["attention_head_dim"], widths, attended),
        "use_spatial_transformer": True,
        "transformer_depth": _plain(depths),
        "context_dim": contexts,
        "use_linear_in_transformer": own["use_linear_projection"],
        "legacy": False,
    }
    if own["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise ValueError(f"the UNet's resnet_time_scale_shift is {own['resnet_time_scale_shift']!r}, which is unknown")
    if own["resnet_time_scale_shift"] == "scale_shift":
        params["use_scale_shift_norm"] = True
    if own["only_cross_attention"]:
        params["disable_self_attentions"] = _per_level(own["only_cross_attention"], len(widths))
    if own["dropout"]:
        params["dropout"] = own["dropout"]
    if own["norm_num_groups"] != 32:
        params["norm_groups"] = own["norm_num_groups"]
    return params


def write_unet(params: Mapping[str, Any], sample_size: int | list[int]) -> Config:
    """UNetModel's parameters -> UNet2DConditionModel's configuration; sample_size: of the latents."""
    own = arguments(UNetModel, params)
    widths = [own["model_channels"] * mult for mult in own["channel_mult"]]
    levels = unet_levels(params)
    by_width = own["num_head_channels"] != -1
    heads = [max(1, w // own["num_head_channels"]) for w in widths] if by_width else own["num_heads"]
    # each width with attention: the middle's is the last level's
    used = {width for width, level in zip(widths, levels, strict=True) if level.attention} | {widths[-1]}
    contexts = own["context_dim"] if isinstance(own["context_dim"], Sequence) else [own["context_dim"]]
    refuse(
        {
            "num_classes, a class or vector beside the text": own["num_classes"] is not None,
            "n_embed": own["n_embed"] is not None,
            "attention without text (use_spatial_transformer false)": not own["use_spatial_transformer"],
            "resblock_updown": own["resblock_updown"],
            "conv_resample false": not own["conv_resample"],
            "disable_middle_self_attn": own["disable_middle_self_attn"],
            "num_attention_blocks": own["num_attention_blocks"] is not None,
            f"channel_mult {list(own['channel_mult'])}, which does not begin with 1": own["channel_mult"][0] != 1,
            f"context_dim {contexts}, of several widths": len(set(contexts)) != 1,
            f"num_head_channels {own['num_head_channels']}, which does not divide every width": by_width
            and any(width % own["num_head_channels"] for width in used),
        }
    )
    disabled = own["disable_self_attentions"]
    kinds = _kinds([level.attention for level in levels])
    return {
        "sample_size": sample_size,
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": _plain(own["num_res_blocks"]),
        "transformer_layers_per_block": _plain(own["transformer_depth"]),
        "attention_head_dim": heads,  # which diffusers reads as their number
        "cross_attention_dim": contexts[0],
        "only_cross_attention": False if disabled is None else _plain([bool(flag) for flag in disabled]),
        "use_linear_projection": own["use_linear_in_transformer"],
        # Stable Diffusion 2's attention overflows in half precision with old versions; no effect otherwise
        "upcast_attention": own["use_linear_in_transformer"],
        "resnet_time_scale_shift": "scale_shift" if own["use_scale_shift_norm"] else "default",
        "dropout": own["dropout"],
        "norm_num_groups": own["norm_groups"],
        **UNET_FIXED,
    }


def _kinds(attended: Sequence[bool]) -> list[tuple[str, str]]:
    return [ATTENDED if attends else PLAIN for attends in attended]


def _read_heads(heads: int | Sequence[int], widths: Sequence[int], attended: Sequence[bool]) -> Config:
    """attention_head_dim, which is the *number* of heads -> num_heads, or num_head_channels if their width is one."""
    if isinstance(heads, int):
        return {"num_heads": heads}
    # the middle has the last level's
    used = [i for i in range(len(widths)) if attended[i] or i == len(widths) - 1]
    if len(heads) == len(widths):
        if len({widths[i] / heads[i] for i in used}) == 1 and not widths[-1] % heads[-1]:
            return {"num_head_channels": widths[-1] // heads[-1]}
        if len({heads[i] for i in used}) == 1:
            return {"num_heads": heads[-1]}
    raise ValueError(
        f"the UNet's attention_head_dim is {list(heads)} heads for levels of widths {list(widths)}: our UNetModel has "
        "one number of heads, or one width of a head"
    )


def read_vae(config: Mapping[str, Any]) -> tuple[Config, float]:
    """diffusers' AutoencoderKL's configuration -> (our AutoencoderKL's parameters, the scale factor)."""
    own = understood(config, VAE_DEFAULTS, VAE_FIXED, "the autoencoder")
    widths = list(own["block_out_channels"])
    attended = [name == "AttnDownEncoderBlock2D" for name in own["down_block_types"]]
    if [list(own["down_block_types"]), list(own["up_block_types"])] != _vae_kinds(attended) or len(attended) != len(
        widths
    ):
        raise ValueError(
            f"the autoencoder's blocks are {list(own['down_block_types'])} and {list(own['up_block_types'])}: only "
            "DownEncoderBlock2D and AttnDownEncoderBlock2D are known, one per entry of block_out_channels, mirrored"
        )
    resolution = max(first(own["sample_size"]), 2 ** len(widths))  # only tells the levels apart
    ddconfig = {
        "double_z": True,
        "z_channels": own["latent_channels"],
        "resolution": resolution,
        "in_channels": own["in_channels"],
        "out_ch": own["out_channels"],
        "ch": widths[0],
        "ch_mult": _multiples(widths, "the autoencoder"),
        "num_res_blocks": own["layers_per_block"],
        "attn_resolutions": [resolution // 2**i for i, attends in enumerate(attended) if attends],
        "dropout": 0.0,
    }
    if not own["mid_block_add_attention"]:
        ddconfig["attn_type"] = "none"
    if own["norm_num_groups"] != 32:
        ddconfig["norm_groups"] = own["norm_num_groups"]
    return {"ddconfig": ddconfig, "embed_dim": own["latent_channels"]}, own["scaling_factor"]


def write_vae(params: Mapping[str, Any], scale_factor: float, sample_size: int) -> Config:
    """Our AutoencoderKL's parameters -> the configuration of diffusers'; sample_size: of the pictures."""
    own = params["ddconfig"]
    mults, mid = list(own.get("ch_mult", (1, 2, 4, 8))), own.get("attn_type", "vanilla") != "none"
    attended = [own["resolution"] // 2**i in own["attn_resolutions"] for i in range(len(mults))]
    refuse(
        {
            f"embed_dim {params['embed_dim']} beside z_channels {own['z_channels']}": params["embed_dim"]
            != own["z_channels"],
            "resamp_with_conv false": not own.get("resamp_with_conv", True),
            "tanh_out": own.get("tanh_out", False),
            "attn_type none with attn_resolutions": any(attended) and not mid,
            f"ch_mult {mults}, which does not begin with 1": mults[0] != 1,
        }
    )
    down, up = _vae_kinds(attended)
    return {
        "in_channels": own["in_channels"],
        "out_channels": own["out_ch"],
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [own["ch"] * mult for mult in mults],
        "layers_per_block": own["num_res_blocks"],
        "latent_channels": own["z_channels"],
        "norm_num_groups": own.get("norm_groups", 32),
        "sample_size": sample_size,
        "scaling_factor": scale_factor,
        "act_fn": "silu",
        **({} if mid else {"mid_block_add_attention": False}),
    }


def _vae_kinds(attended: Sequence[bool]) -> list[list[str]]:
    """down_block_types and up_block_types."""
    down = ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attended]
    up = ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(attended)]
    return [down, up]


def understood(
    config: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any], whose: str
) -> dict[str, Any]:
    """The values of the keys in `defaults`. Others must have the value in `fixed`, or be null or false, or private."""
    for key, value in config.items():
        if key in fixed and value == fixed[key] or key.startswith("_") or key in defaults:
            continue
        if key in fixed or value not in (None, False):
            raise ValueError(f"{whose} has {key} {value!r}, which our networks cannot do")
    return {key: config.get(key, default) for key, default in defaults.items()}


def refuse(reasons: Mapping[str, bool]) -> None:
    """Raises ValueError naming those that hold."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"diffusers' Stable Diffusion has no words for this model: {'; '.join(found)}")


def arguments(cls: type, params: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a class's constructor: those given, and its defaults."""
    bound = inspect.signature(cls).bind(**params)
    bound.apply_defaults()
    return dict(bound.arguments)


def first(size: int | Sequence[int]) -> int:
    """A size, or the height of [height, width]."""
    return size if isinstance(size, int) else size[0]


def _plain(values: Any) -> Any:
    """One value for all levels, where it is one."""
    if not isinstance(values, Sequence):
        return values
    return values[0] if len(set(values)) == 1 else list(values)


def _per_level(value: Any, levels: int) -> list:
    return list(value) if isinstance(value, Sequence) else [value] * levels


def _multiples(widths: Sequence[int], whose: str) -> list[int]:
    """Widths in units of the first."""
    if any(width % widths[0] for width in widths):
        raise ValueError(f"{whose} has block_out_channels {list(widths)}: each must be a multiple of the first")
    return [width // widths[0] for width in widths]


def _only(values: Sequence[int], what: str) -> int:
    if len(set(values)) != 1:
        raise ValueError(f"{what} is {list(values)}: our UNetModel has one for all levels")
    return values[0]
