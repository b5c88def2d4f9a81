"""Translate CompVis's own yamls to the configurations that our files carry.

Classes are translated by name and never imported: what a yaml's target names is looked up in the tables below.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from ldm.checkpoint import networks
from ldm.checkpoint.family_table import Family, find_family
from ldm.checkpoint.networks import Config
from ldm.models.autoencoder import Encoder
from ldm.models.unet import UNetModel

_MODELS = (
    "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion",
    "ldm.models.diffusion.ddpm_edit.LatentDiffusion",  # InstructPix2Pix
)
_READ = (
    *("unet_config", "first_stage_config", "cond_stage_config", "conditioning_key", "concat_mode", "parameterization"),
    *("timesteps", "beta_schedule", "linear_start", "linear_end", "cosine_s", "given_betas", "scale_factor"),
    "image_size",
)
# What only training or logging reads, in CompVis's three repositories and the forks that add to them; `scale_by_std`
# leaves the measured factor in the file.
_TRAINING = (
    *("base_learning_rate", "model_lr", "scheduler_config", "use_ema", "load_ema", "reset_ema"),
    *("reset_num_ema_updates", "loss_type", "l_simple_weight", "original_elbo_weight", "learn_logvar", "logvar_init"),
    *("v_posterior", "monitor", "log_every_t", "ckpt_path", "ignore_keys", "load_only_unet", "make_it_fit"),
    *("scale_by_std", "first_stage_key", "cond_stage_key", "cond_stage_trainable", "cond_stage_forward"),
    *("num_timesteps_cond", "channels", "clip_denoised", "use_positional_encodings", "ucg_training"),
    *("force_null_conditioning", "finetune_keys", "concat_keys", "keep_finetune_dims", "masked_image_key"),
    *("c_concat_log_start", "c_concat_log_end"),
    *("personalization_config", "embedding_reg_weight", "reg_weight", "unfreeze_model"),
)
_AUTOENCODER_TRAINING = (
    *("lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "ema_decay", "use_ema"),
    *("learn_logvar", "remap", "sane_index_shape", "batch_resize_range", "scheduler_config", "lr_g_factor"),
)
BETA_SCHEDULES = {  # CompVis's name -> ours
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "sqrt": "sqrt",
    "cosine": "cosine",
    "squaredcos_cap_v2": "cosine",
}
# The text towers' width, layers and heads: by the last part of transformers' name, also of a local folder of that name;
# by open_clip's architecture.
_CLIPS = {"large-patch14": (768, 12, 12), "base-patch32": (512, 12, 8), "base-patch16": (512, 12, 8)}
_CLIPS = {f"clip-vit-{size}": sizes for size, sizes in _CLIPS.items()}
_OPENCLIPS = {"ViT-H-14": (1024, 24, 16), "ViT-L-14": (768, 12, 12), "ViT-B-32": (512, 12, 8)}
_OPENCLIPS["ViT-bigG-14"] = (1280, 32, 20)


def from_compvis(yaml: Mapping[str, Any]) -> Config:
    """Return {"target": class, "params": ...} of our own classes, from a yaml of CompVis's code and its descendants.

    Args:
        yaml: the file or its `model` section, as plain dicts: of a LatentDiffusion, or of an autoencoder alone. One in
            our own terms comes back as it is.
    """
    model = yaml.get("model", yaml)
    if not isinstance(model, Mapping) or "target" not in model:
        raise ValueError("the configuration names no model: it has no target, nor a model section that has one")
    target, params = str(model["target"]), dict(model.get("params") or {})
    if target == networks.MODEL_TARGET:
        return {"target": networks.MODEL_TARGET, "params": params}
    if target in _MODELS:
        return {"target": networks.MODEL_TARGET, "params": _model(params)}
    if target in _FIRST_STAGES:
        return _translated(model, _FIRST_STAGES, "the model")
    if target.endswith(".DiffusionEngine"):
        from ldm.checkpoint.sgm_config import from_sgm  # which uses this file

        return {"target": networks.MODEL_TARGET, "params": from_sgm(params)}
    known = ", ".join((networks.MODEL_TARGET, *_MODELS, *_FIRST_STAGES))
    raise ValueError(f"the model's target {target!r} is not supported: known are {known}")


def _model(params: Config) -> Config:
    params = kept(params, "LatentDiffusion", _READ, _TRAINING, needs=3)
    unet = _translated(params["unet_config"], _UNETS, "the UNet")
    first_stage = _translated(params["first_stage_config"], _FIRST_STAGES, "the first stage")
    conditioner = _conditioner(params)
    family, concat = find_family(unet["params"]["in_channels"], first_stage, conditioner)
    prediction = params.get("parameterization", "eps")
    if prediction not in ("eps", "x0", "v"):  # CompVis's code has no flow
        raise ValueError(f"parameterization {prediction!r} is unknown: it is one of eps, x0, v")
    return {
        "unet_config": unet,
        "first_stage_config": first_stage,
        "cond_stage_config": conditioner,
        "schedule": schedule_params(params),
        "prediction": prediction,
        "scale_factor": float(params.get("scale_factor", 1.0)),
        "defaults": _defaults(params, first_stage, family, prediction),
        "concat": concat,
    }


def _conditioner(params: Mapping[str, Any]) -> Config | None:
    config, key = params["cond_stage_config"], params.get("conditioning_key")
    if key not in (None, "crossattn", "concat", "hybrid"):
        raise ValueError(f"conditioning_key {key!r} has no counterpart here: known are crossattn, concat and hybrid")
    if config in ("__is_unconditional__", "__is_first_stage__"):  # the first stage's latents come by `concat`
        return None
    if isinstance(config, Mapping) and config.get("target") == "torch.nn.Identity":
        if key == "crossattn" or (key is None and not params.get("concat_mode", True)):
            raise ValueError("embeddings from outside (torch.nn.Identity under crossattn) have no counterpart here")
        return {"target": networks.IMAGE_TARGET, "params": {}}
    return _translated(config, _CONDITIONERS, "the conditioner")


def schedule_params(params: Mapping[str, Any]) -> Config:
    """Return the arguments of `make_schedule`; what the yaml leaves out is CompVis's default."""
    name = params.get("beta_schedule", "linear")
    if name not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule {name!r} is unknown: it is one of {', '.join(BETA_SCHEDULES)}")
    if params.get("given_betas") is not None:
        raise ValueError("given_betas, betas one by one, have no counterpart here: schedules are named curves")
    T = int(params.get("timesteps", 1000))
    if BETA_SCHEDULES[name] == "cosine":
        if float(params.get("cosine_s", 8e-3)) != 8e-3:
            raise ValueError(f"cosine_s {params['cosine_s']} has no counterpart here: it is always 0.008")
        return {"name": "cosine", "T": T}
    start, end = float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2))
    return {"name": BETA_SCHEDULES[name], "start": start, "end": end, "T": T}


def _defaults(params: Config, first_stage: Config, family: Family | None, prediction: str) -> Config:
    """Return default settings: the yaml's size, the steps and scale of the published model of these parts."""
    downsampling = 2 ** (len(first_stage["params"]["ddconfig"].get("ch_mult", (1, 2, 4, 8))) - 1)
    defaults = {"steps": 50, "scale": 1.0} if family is None else family.defaults(downsampling)
    latents = params.get("image_size", 256)
    if family is not None and family.name == "sd-v2-v" and prediction == "v" and latents == 64:
        latents = family.latents  # v2-inference-v.yaml says 64, and is to be run with --H 768 --W 768
    height, width = latents if isinstance(latents, Sequence) else (latents, latents)
    return defaults | {"height": int(height) * downsampling, "width": int(width) * downsampling}


class Rule(NamedTuple):
    """The parameters that a network takes, of which the first `needs` must be given, and those of its training.

    A class in `takes` stands for the arguments of its constructor, which have the same names as CompVis's.
    """

    target: str
    whose: str
    takes: type | tuple[str, ...]
    ignores: tuple[str, ...] = ()
    needs: int = 0


def _translated(config: Any, table: Mapping[str, Rule | Callable[[Config], Config]], whose: str) -> Config:
    target = str(config.get("target") if isinstance(config, Mapping) else config)
    if target not in table:
        raise ValueError(f"{whose}'s target {target!r} is not supported: known are {', '.join(table)}")
    rule, params = table[target], dict(config.get("params") or {})
    if not isinstance(rule, Rule):
        return rule(params)
    params = kept(params, rule.whose, rule.takes, rule.ignores, rule.needs)
    if "ddconfig" in params:
        params["ddconfig"] = kept(params["ddconfig"], "ddconfig", Encoder)
    return {"target": rule.target, "params": params}


def kept(
    params: Config, whose: str, takes: type | tuple[str, ...], ignores: tuple[str, ...] = (), needs: int = 0
) -> Config:
    """Return the parameters that are taken, as `Rule` says; ValueError for unknown and missing ones."""
    if isinstance(takes, type):
        arguments = inspect.signature(takes).parameters.values()
        takes = tuple(p.name for p in sorted(arguments, key=lambda p: p.default is not p.empty))
        needs = sum(p.default is p.empty for p in arguments)
    unknown = sorted(set(params) - {*takes, *ignores})
    if unknown:
        raise ValueError(f"{whose}'s parameters {', '.join(unknown)} are not known: it takes {', '.join(takes)}")
    missing = [name for name in takes[:needs] if name not in params]
    if missing:
        raise ValueError(f"{whose} lacks its parameters {', '.join(missing)}")
    return {name: params[name] for name in takes if name in params}


def clip_config(params: Config) -> Config:
    takes = ("version", "max_length", "layer", "layer_idx")
    params = kept(params, "FrozenCLIPEmbedder", takes, ("device", "freeze"))
    name = params.get("version", "openai/clip-vit-large-patch14")
    sizes = _CLIPS.get(PurePath(name).name)
    if sizes is None:
        raise ValueError(f"the text encoder's version {name!r} is unknown: known are {', '.join(_CLIPS)}")
    return _text(networks.CLIP_SETTINGS, sizes, params, layers=("last", "hidden"))


def openclip_config(params: Config) -> Config:
    takes = ("arch", "version", "max_length", "layer")  # the version names weights, which the checkpoint brings
    params = kept(params, "FrozenOpenCLIPEmbedder", takes, ("device", "freeze"))
    arch = params.get("arch", "ViT-H-14")
    if arch not in _OPENCLIPS:
        raise ValueError(f"the text encoder's arch {arch!r} is unknown: known are {', '.join(_OPENCLIPS)}")
    settings = networks.OPENCLIP_SETTINGS | {"layer": "last"}
    return _text(settings, _OPENCLIPS[arch], params, layers=("last", "penultimate"))


def _text(settings: Config, sizes: tuple[int, int, int], params: Config, layers: tuple[str, ...]) -> Config:
    """Return a TextEncoder with the yaml's choice of layer."""
    if params.get("max_length", 77) != 77:
        raise ValueError(f"max_length {params['max_length']} has no counterpart here: CLIP reads 77 tokens")
    layer = params.get("layer", settings["layer"])
    if layer not in layers:
        raise ValueError(f"the text encoder's layer {layer!r} has no counterpart here: known are {', '.join(layers)}")
    settings = settings | dict(zip(("width", "layers", "heads"), sizes, strict=True)) | {"layer": layer}
    if layer == "hidden":
        settings["layer_index"] = params.get("layer_idx")
    return {"target": networks.TEXT_TARGET, "params": settings}


KL_RULE = Rule(networks.KL_TARGET, "the first stage", ("embed_dim", "ddconfig"), _AUTOENCODER_TRAINING, needs=2)
_VQ = Rule(networks.VQ_TARGET, "the first stage", ("embed_dim", "n_embed", "ddconfig"), _AUTOENCODER_TRAINING, needs=3)
UNET_RULE = Rule(networks.UNET_TARGET, "UNetModel", UNetModel)
_UNETS = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": UNET_RULE, networks.UNET_TARGET: UNET_RULE}
_VQ_NAMES = (networks.VQ_TARGET, *(f"ldm.models.autoencoder.{name}" for name in ("VQModelInterface", "VQModel")))
_FIRST_STAGES = {networks.KL_TARGET: KL_RULE, **dict.fromkeys(_VQ_NAMES, _VQ)}  # KL's is CompVis's name too
_CONDITIONERS = {
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": clip_config,
    "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder": openclip_config,
    "ldm.modules.encoders.modules.BERTEmbedder": Rule(
        networks.BERT_TARGET,
        "BERTEmbedder",
        ("n_embed", "n_layer", "vocab_size", "max_seq_len", "embedding_dropout"),
        ("device", "use_tokenizer"),
        needs=2,
    ),
    "ldm.modules.encoders.modules.ClassEmbedder": Rule(
        networks.CLASSES_TARGET, "ClassEmbedder", ("embed_dim", "n_classes"), ("key", "ucg_rate"), needs=1
    ),
    "ldm.modules.encoders.modules.SpatialRescaler": Rule(
        *(networks.RESCALER_TARGET, "SpatialRescaler"),
        ("n_stages", "method", "multiplier", "in_channels", "out_channels", "bias"),
    ),
}
