"""CompVis's single files: names that vary or do not belong to a network, and the files that we write for others."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import networks
from ldm.checkpoint.diffusers_names import attention_from_diffusers, complete_openclip, vae_from_diffusers
from ldm.checkpoint.family_table import SCALE_FACTORS, kind
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import EMBEDDERS, count
from ldm.checkpoint.tensors import State
from ldm.checkpoint.xl import check_sized_text
from ldm.checks import few
from ldm.diffusion.schedule import MIN_ALPHA_BAR, make_schedule

EMA_PREFIX = "model_ema."
XL_PREFIX = "conditioner."  # Stable Diffusion XL's, for networks.PREFIXES["text"]

SCHEDULE_BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)

# Names that published files carry and no network here has; whatever else is unexpected stays, for the loader to list.
_STRAYS = (
    "|".join(SCHEDULE_BUFFERS),  # follow from the schedule, which is in the configuration (`recognise` reads them)
    "scale_factor",  # likewise
    "v_pred|ztsnr",  # marks for "predicts v" and "zero terminal SNR"; `recognise` reads them
    "logvar|lvlb_weights",  # weights of the training loss
    "ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)",  # a sampler's, saved into LDM's inpainting_big by mistake
    r"model_ema\..*",  # a second copy of the UNet (or of an autoencoder in training), unless it was asked for
    r"first_stage_model\.(loss|model_ema)\..*",  # discriminator, LPIPS and EMA of the autoencoder's own training
    # 0, 1, 2 ...: transformers before 4.31
    r"cond_stage_model\.(embedders\.0\.)?transformer\.text_model\.embeddings\.position_ids",
    r"denoiser\.sigmas",  # Stable Diffusion XL's schedule, in some of its descendants
    r"cond_stage_model\.(embedders\.0\.)?logit_scale",  # ComfyUI's wrapper around CLIP; not part of the text tower
    r"embedding_manager\..*",  # textual inversion's, which the DreamBooth fork of its code carries along unused
)
_OPENCLIP = re.compile(rf"({re.escape(networks.PREFIXES['text'])}(?:{EMBEDDERS}\d+\.)?model\.)token_embedding\.weight")
_STRAY = re.compile("|".join(f"(?:{pattern})" for pattern in _STRAYS))

# How parts on their own and older writers begin their names -> the names of a complete model.
_RENAMES = (
    (r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.", r"model.diffusion_model.\1."),
    (r"diffusion_model\.", "model.diffusion_model."),
    (r"(encoder|decoder|quantize|quant_conv|post_quant_conv|loss)\.", r"first_stage_model.\1."),
    (r"vae\.", "first_stage_model."),
    (re.escape(XL_PREFIX), "cond_stage_model."),
    # CLIP in transformers' layout, as NovelAI's files and transformers from 5.6 on name it
    (r"(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.", r"\1text_model.\2."),
)
_FIRST_STAGE_COPY = re.compile(r"cond_stage_model\.((?:encoder|decoder|quantize|quant_conv|post_quant_conv)\..*)")
_VAE_ATTENTION = re.compile(r"first_stage_model\..*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")


def normalise(state: Mapping[str, Tensor], ema: bool = False) -> tuple[State, list[str]]:
    """Return a published file's tensors under the names of our networks, without known strays, and notes. Idempotent.

    Mapped tensors stay mapped. A file of one part alone comes out with that network's own names, a complete model with
    the three prefixes of `networks.PREFIXES`.

    Args:
        ema: take the averaged weights in place of the others.
    """
    state, notes = tidy(state, ema)
    parts = [part for part in networks.PREFIXES if has_part(state, part)]
    if len(parts) == 1:
        prefix = networks.PREFIXES[parts[0]]
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state, notes


def has_part(state: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith(networks.PREFIXES[part]) for name in state)


def tidy(state: Mapping[str, Tensor], ema: bool = False) -> tuple[State, list[str]]:
    """Do as `normalise`, but with the names of a complete model even where there is only one part."""
    notes = []
    if any(name.startswith("encoder.down_blocks.") for name in state):  # as most VAEs that are shared alone
        state = vae_from_diffusers(state)
    renamed = {name: own_name(name) for name in state}
    if len(set(renamed.values())) < len(renamed):
        twice = sorted(name for name, new in renamed.items() if name != new and new in renamed)
        raise ValueError(f"the file holds {len(twice)} tensors twice, under two names each ({few(twice)})")
    state = {renamed[name]: tensor for name, tensor in state.items()}
    if ema:
        state |= _averaged(state)
        notes.append("the averaged weights (EMA) were taken")
    elif any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in state):
        notes.append("the file also has averaged weights (EMA), which were not taken (ema=True, --ema)")
    if any(name.startswith("embedding_manager.") for name in state):
        notes.append("textual inversion's embeddings (embedding_manager.*) in the file are left out")
    state = {name: tensor for name, tensor in state.items() if not _STRAY.fullmatch(name)}
    state = _without_first_stage_copy(state)
    for name, tensor in state.items():
        if tensor.ndim == 2 and _VAE_ATTENTION.fullmatch(name):
            state[name] = tensor[:, :, None, None]  # linear layers (diffusers) -> 1x1 convolutions (CompVis)
    supplied = _missing_of_openclip(state)
    if supplied:
        notes.append(f"the file lacks {len(supplied)} tensors of OpenCLIP that nothing reads; stand-ins were supplied")
    return state | supplied, notes


def own_name(name: str) -> str:
    """Return a published name of a weight as a complete model of ours has it."""
    renamed = (re.sub("^" + pattern, new, name) for pattern, new in _RENAMES if re.match(pattern, name))
    name = next(renamed, name)
    return attention_from_diffusers(name) if name.startswith(networks.PREFIXES["first_stage"]) else name


def _averaged(state: State) -> State:
    """Return the EMA's tensors under the names of what they average: the EMA's own names have lost their dots."""
    owner = "model." if has_part(state, "unet") else networks.PREFIXES["first_stage"]
    shadows = {name: EMA_PREFIX + name.removeprefix(owner).replace(".", "") for name in state if name.startswith(owner)}
    averaged = {name: state[shadow] for name, shadow in shadows.items() if shadow in state}
    if not averaged:
        raise ValueError("the file has no averaged weights (EMA, model_ema.*): load it without ema")
    counters = {f"{EMA_PREFIX}decay", f"{EMA_PREFIX}num_updates"}
    stray = {name for name in state if name.startswith(EMA_PREFIX)} - counters - set(shadows.values())
    misshapen = {name for name, tensor in averaged.items() if tensor.shape != state[name].shape}
    if stray or misshapen:
        wrong = sorted(stray | misshapen)
        raise ValueError(f"the averaged weights (EMA) do not fit the model, {len(wrong)} of them ({few(wrong)})")
    return averaged


def _without_first_stage_copy(state: State) -> State:
    """Drop a second first stage, which LDM's inpainting model has as its conditioner (`__is_first_stage__`)."""
    copy = {match[1]: name for name in state if (match := _FIRST_STAGE_COPY.fullmatch(name))}
    prefix = networks.PREFIXES["first_stage"]
    shapes = {name: state[old].shape for name, old in copy.items()}
    own = {name.removeprefix(prefix): tensor.shape for name, tensor in state.items() if name.startswith(prefix)}
    different = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
    if copy and different:
        names = f"{len(different)} tensors ({few(different)})"
        raise ValueError(f"the conditioner is an autoencoder other than the first stage: they differ in {names}")
    return {name: tensor for name, tensor in state.items() if name not in copy.values()}


def _missing_of_openclip(state: State) -> State:
    """Return stand-ins for what other programs left out of OpenCLIP's tower in files of Stable Diffusion 2 and XL."""
    base = next((match[1] for name in state if (match := _OPENCLIP.fullmatch(name))), "none")
    tower = {name.removeprefix(base): tensor for name, tensor in state.items() if name.startswith(base)}
    if "token_embedding.weight" not in tower:
        return {}
    if base.startswith(f"{networks.PREFIXES['text']}{EMBEDDERS}"):  # where all but the temperature is read
        return {} if "logit_scale" in tower else {f"{base}logit_scale": torch.zeros(())}
    blocks = count(tower, "transformer.resblocks.")
    # ViT-H has 24 blocks; of other towers only the missing projection tells that the file was saved by diffusers
    cut = blocks == 23 if tower["token_embedding.weight"].shape[-1] == 1024 else "text_projection" not in tower
    completed = complete_openclip(dict(tower), blocks + cut)
    return {base + name: tensor for name, tensor in completed.items() if name not in tower}


def single_file(state: Mapping[str, Tensor], config: Config) -> tuple[State, dict[str, str]]:
    """Return (tensors, safetensors metadata) of a LatentDiffusion as other programs read them; `normalise` undoes it.

    Beside the weights: the schedule's buffers, CLIP's position ids, `scale_factor` unless it is what everyone assumes,
    the empty marks `v_pred` and `ztsnr`, and metadata after the modelspec standard 1.0.0
    (https://github.com/Stability-AI/ModelSpec).
    """
    params = config["params"]
    if params["prediction"] == "flow":
        raise ValueError("CompVis's format cannot say that a network predicts flow: save the model as ours")
    added = schedule_buffers(params["schedule"])
    text: Config | None = params["cond_stage_config"]
    prefix = networks.PREFIXES["text"]
    if text is not None and kind(text) in _XL_KINDS:
        check_sized_text(text["params"])
        state = {re.sub("^" + re.escape(prefix), XL_PREFIX, name): tensor for name, tensor in state.items()}
        text = dict[str, Any](target=networks.TEXT_TARGET, params=text["params"]["embedders"][0])
        prefix = f"{XL_PREFIX}embedders.0."
    if text is not None and kind(text) == "clip":
        name = f"{prefix}transformer.text_model.embeddings.position_ids"
        added[name] = torch.arange(text["params"].get("context_length", 77))[None]
    if params["scale_factor"] != SCALE_FACTORS.get(params["first_stage_config"]["target"]):
        added["scale_factor"] = torch.tensor(params["scale_factor"])
    if params["prediction"] == "v":
        added["v_pred"] = torch.empty(0)
    if params["schedule"].get("zero_terminal_snr", False):
        added["ztsnr"] = torch.empty(0)
    return {**added, **state}, _modelspec(params)


def schedule_buffers(schedule: Config) -> State:
    """Return the twelve buffers of CompVis's DDPM, float32 (T,), from `make_schedule`'s arguments.

    Posterior of q: Ho et al. 2020, eq. 6 and 7. Where ab = 0 (zero terminal SNR), its reciprocal is taken of 2^-24.
    """
    ab = make_schedule(**schedule).alphas_cumprod
    prev = torch.cat([ab.new_ones(1), ab[:-1]])
    beta = 1 - ab / prev
    recip = 1 / ab.clamp(min=MIN_ALPHA_BAR)
    variance = beta * (1 - prev) / (1 - ab)
    values = (
        *(beta, ab, prev, ab.sqrt(), (1 - ab).sqrt(), (1 - ab).log(), recip.sqrt(), (recip - 1).sqrt(), variance),
        variance.clamp(min=1e-20).log(),  # 0 at the first step
        *(beta * prev.sqrt() / (1 - ab), (1 - prev) * (1 - beta).sqrt() / (1 - ab)),
    )
    return {name: value.float() for name, value in zip(SCHEDULE_BUFFERS, values, strict=True)}


_PREDICTION_TYPES = {"eps": "epsilon", "v": "v", "x0": "sample"}
_XL_KINDS = {"sdxl": "-base", "sdxl-refiner": "-refiner"}
_SUFFIXES = {"latents": "-instruct-pix2pix", "mask_latents": "-inpainting", "latents_mask": "-inpainting", None: ""}
_REPOSITORIES = {
    "stable-diffusion-v1": "https://github.com/CompVis/stable-diffusion",
    "stable-diffusion-v2": "https://github.com/Stability-AI/stablediffusion",
    "stable-diffusion-xl-v1": "https://github.com/Stability-AI/generative-models",
    "latent-diffusion": "https://github.com/CompVis/latent-diffusion",
}


def _modelspec(params: Config) -> dict[str, str]:
    text = f"{kind(params['cond_stage_config'])}"
    lines = {"clip": "stable-diffusion-v1", "openclip": "stable-diffusion-v2"}
    lines |= dict.fromkeys(_XL_KINDS, "stable-diffusion-xl-v1")
    line = lines.get(text, "latent-diffusion")
    architecture = line + _SUFFIXES[params.get("concat")]
    if architecture == "stable-diffusion-v2":
        architecture += "-768-v" if params["prediction"] == "v" else "-512"
    elif architecture == "stable-diffusion-xl-v1":
        architecture += _XL_KINDS[text]
    return {
        "format": "pt",  # which transformers demands
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _REPOSITORIES[line],
        "modelspec.title": architecture,
        "modelspec.resolution": "{width}x{height}".format(**params["defaults"]),
        "modelspec.prediction_type": _PREDICTION_TYPES[params["prediction"]],
    }
