"""Translate the yamls of generative-models (sgm), which has Stable Diffusion XL, to the configurations of our files."""

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint import networks
from ldm.checkpoint.compvis_config import BETA_SCHEDULES, KL_RULE, UNET_RULE, clip_config, kept, openclip_config
from ldm.checkpoint.family_table import FAMILIES, kind
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import one_if_equal
from ldm.checkpoint.xl import sized_text
from ldm.models.autoencoder import Encoder

_PARTS = ("denoiser_config", "network_config", "conditioner_config", "first_stage_config", "scale_factor")
# what only training, logging and sampling read
_IGNORED = (
    *("disable_first_stage_autocast", "sampler_config", "loss_fn_config", "network_wrapper", "optimizer_config"),
    *("scheduler_config", "ckpt_path", "use_ema", "ema_decay_rate", "input_key", "log_keys", "no_cond_log"),
    *("compile_model", "en_and_decode_n_samples_a_time"),
)
_SIZES = {
    **{"original_size_as_tuple": "original_size", "crop_coords_top_left": "crop"},
    **{"target_size_as_tuple": "target_size", "aesthetic_score": "aesthetic_score"},
}
_SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}


def from_sgm(params: Config) -> Config:
    """Return LatentDiffusion's arguments from those of a DiffusionEngine."""
    params = kept(params, "DiffusionEngine", _PARTS, _IGNORED, needs=4)
    conditioner = _conditioner(_params(params["conditioner_config"]))
    first_stage = _first_stage(params["first_stage_config"])
    family = FAMILIES.get((kind(conditioner), "kl", None))
    if family is None:
        raise ValueError("of generative-models' yamls those of Stable Diffusion XL and its refiner are known")
    unet = dict(_params(params["network_config"]))
    for name in ("spatial_transformer_attn_type", "disable_self_attentions_middle"):
        unet.pop(name, None)
    unet = {"image_size": family.latents, "use_spatial_transformer": True, "legacy": False, **unet}
    unet["context_dim"] = one_if_equal(unet.get("context_dim"))  # one, or one for each block of a transformer
    downsampling = 2 ** (len(first_stage["params"]["ddconfig"].get("ch_mult", (1, 2, 4, 8))) - 1)
    return {
        "unet_config": {"target": networks.UNET_TARGET, "params": kept(unet, UNET_RULE.whose, UNET_RULE.takes)},
        "first_stage_config": first_stage,
        "cond_stage_config": conditioner,
        "prediction": _prediction(params["denoiser_config"]),
        "schedule": _schedule(params["denoiser_config"]),
        "scale_factor": float(params.get("scale_factor", 1.0)),
        "defaults": family.defaults(downsampling),
        "concat": None,
    }


def _params(config: Any) -> Config:
    return dict((config.get("params") if isinstance(config, Mapping) else None) or {})


def _named(config: Any) -> str:
    """Return the last part of a target's name."""
    return str(config.get("target") if isinstance(config, Mapping) else config).rpartition(".")[2]


def _conditioner(params: Config) -> Config:
    towers: list[Config] = []
    sizes: dict[str, int] = {}
    for model in params.get("emb_models") or ():
        name, own = _named(model), _params(model)
        key = model.get("input_key") if isinstance(model, Mapping) else None
        if name == "ConcatTimestepEmbedderND" and key in _SIZES:
            sizes[_SIZES[key]] = own.get("outdim", 256)
        elif name == "FrozenCLIPEmbedder":
            towers.append(clip_config(own)["params"])
        elif name == "FrozenOpenCLIPEmbedder2":
            if own.pop("legacy", True) or not own.pop("always_return_pooled", False):
                raise ValueError("FrozenOpenCLIPEmbedder2 has a counterpart with always_return_pooled and no legacy")
            towers.append(openclip_config(own)["params"] | {"projection_dim": 1280})
        else:
            raise ValueError(f"the conditioner {name} of {key!r} has no counterpart here")
    if not towers or len(set(sizes.values())) != 1:
        raise ValueError("the conditioner has no text encoder, or sizes of different numbers of features")
    (width,) = set(sizes.values())
    return sized_text(towers, sizes=list(sizes), size_width=width)


def _first_stage(config: Any) -> Config:
    if (name := _named(config)) not in ("AutoencoderKL", "AutoencoderKLInferenceWrapper"):
        raise ValueError(f"the first stage {name} has no counterpart here: known is AutoencoderKL")
    params = kept(_params(config), KL_RULE.whose, KL_RULE.takes, KL_RULE.ignores, KL_RULE.needs)
    return {
        "target": networks.KL_TARGET,
        "params": params | {"ddconfig": kept(params["ddconfig"], "ddconfig", Encoder)},
    }


def _prediction(denoiser: Any) -> str:
    name = _named(_params(denoiser).get("scaling_config"))
    if _named(denoiser) != "DiscreteDenoiser" or name not in _SCALINGS:
        raise ValueError(f"the denoiser {_named(denoiser)} with {name} has no counterpart here: it is discrete here")
    return _SCALINGS[name]


def _schedule(denoiser: Any) -> Config:
    config = _params(denoiser).get("discretization_config")
    own = _params(config)
    if _named(config) != "LegacyDDPMDiscretization":
        raise ValueError(f"the noise levels of {_named(config)} have no counterpart here")
    start, end = own.get("linear_start", 0.00085), own.get("linear_end", 0.012)
    return {"name": BETA_SCHEDULES["linear"], "start": start, "end": end, "T": own.get("num_timesteps", 1000)}
