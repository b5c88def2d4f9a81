"""Write a model as a diffusers folder, by diffusers' and transformers' own classes: their versions fix the format."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ldm.checkpoint import diffusers_names as names
from ldm.checkpoint import networks
from ldm.checkpoint.atomic_folder import atomic_folder
from ldm.checkpoint.diffusers_config import (
    BETA_CURVES,
    PER_LEVEL,
    PREDICTION_TYPES,
    UNET_KEYS,
    VAE_KEYS,
    arguments,
    read_unet,
    read_vae,
    unet_blocks,
    unet_levels,
    vae_blocks,
)
from ldm.checkpoint.diffusers_files import WEIGHT_FILES, read_json
from ldm.checkpoint.diffusers_folder import PIPELINES, XL_COMPONENTS, XL_PIPELINES
from ldm.checkpoint.diffusers_text import TOKENIZER_FILES
from ldm.checkpoint.diffusers_text_writer import (
    CANNOT_EXPRESS,
    TextPart,
    refuse,
    text_class,
    text_parts,
    text_weights,
    write_tokenizer,
)
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import one_if_equal
from ldm.checkpoint.tensors import State
from ldm.checkpoint.writing import save_file
from ldm.checkpoint.xl import check_sized_text
from ldm.checks import few
from ldm.diffusion.sampling import choose_sampler, get_sampler
from ldm.diffusion.schedule import SCHEDULES
from ldm.models.autoencoder import Encoder
from ldm.models.unet import UNetModel
from ldm.util import instantiate_network

MARK = {"_written_by": "ldm"}  # in model_index.json; diffusers skips what begins with an underscore
WRITTEN = {  # all files that any version writes
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer{second}/{name}" for name in TOKENIZER_FILES for second in ("", "_2")),
    *(f"{part}/config.json" for part in (*WEIGHT_FILES, "text_encoder_2")),
    *(f"{part}/{'.'.join(kinds[0])}" for part, kinds in WEIGHT_FILES.items()),
    "text_encoder_2/model.safetensors",
}
# Arguments that change no number of a trained network of this kind, or not beside the others.
NO_EFFECT = {
    *("image_size", "resolution", "dropout", "use_checkpoint", "use_fp16", "use_bf16", "num_heads_upsample"),
    *("use_new_attention_order", "adm_in_channels", "legacy", "double_z"),
}
# Ours -> theirs. Stable Diffusion's "leading" has steps_offset 1, which the pipeline insists on: ours, to the digit.
SPACINGS = {"leading": "leading", "compvis": "leading", "linspace": "linspace", "trailing": "trailing"}


def write_pipeline(
    path: str | Path, config: Config, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model as a diffusers folder, and return notes on what is lost in it.

    The text encoder gets the blocks that are run and no projection: the 24th block of Stable Diffusion 2 is left out,
    as in its public folders. Whatever goes wrong, `path` is the old folder or the complete new one. An old folder is
    replaced only if it is empty, or was written by this function and holds nothing else, so that nothing is lost.

    Args:
        dtype: converts the weights, e.g. torch.float16 to halve the files.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"writing a diffusers folder needs diffusers: pip install diffusers ({error})") from None
    params, path = config["params"], Path(os.path.abspath(path))
    unet, vae, conditioner = _networks(params)
    towers = text_parts(conditioner, params["cond_stage_config"]["params"])
    xl = params["cond_stage_config"]["target"] == networks.SIZED_TEXT_TARGET
    defaults, ddconfig = params["defaults"], vae["ddconfig"]
    scheduler, notes = write_scheduler(params["schedule"], params["prediction"], defaults, 5.0 if xl else 7.5)
    weights = _weights(state, unet_levels(unet), ddconfig, towers)
    given = sum(name.startswith(networks.PREFIXES["text"]) for name in state)
    if not xl and (towers[0].encoder.layout == "openclip" or len(weights["text_encoder"]) < given):
        kept = f"of the text encoder {towers[0].layers} blocks are kept, without a projection"
        notes.append(f"{kept}: the rest is not used")
    latents = [defaults[side] // 2 ** (len(ddconfig["ch_mult"]) - 1) for side in ("height", "width")]
    classes = {
        "unet": (
            diffusers.UNet2DConditionModel,
            write_unet(unet, one_if_equal(latents), conditioner.size_width if xl else None),
        ),
        "vae": (diffusers.AutoencoderKL, write_vae(vae, params["scale_factor"], defaults["height"])),
        **{tower.part: text_class(tower) for tower in towers},
    }
    if xl:
        refiner = "aesthetic_score" in conditioner.sizes
        name, more = XL_PIPELINES[refiner], dict[str, Any](force_zeros_for_empty_prompt=conditioner.zeros_for_empty)
        more |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True} if refiner else {}
    else:
        name = PIPELINES[params.get("concat")]
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with atomic_folder(path) as folder:
        _check_replaceable(path)
        tokenizers = {}
        for part, own in (
            (tower.part.replace("text_encoder", "tokenizer"), tower.encoder.tokenizer) for tower in towers
        ):
            tokenizers[part] = write_tokenizer(folder / part, own.merges, own.pad, own.context_length)
        pipeline = getattr(diffusers, name)(
            **{part: _filled(*parts, weights[part], dtype) for part, parts in classes.items()},
            **tokenizers | more,
            scheduler=diffusers.DDIMScheduler(**scheduler),
        )
        pipeline.register_to_config(**MARK)
        _save(pipeline, folder, {tower.part: weights[tower.part] for tower in towers}, dtype)
    return notes


def _save(pipeline: Any, folder: Path, texts: Mapping[str, State], dtype: torch.dtype | None) -> None:
    """Save the pipeline, and its text encoders so that every version of transformers reads them as they are meant."""
    try:
        pipeline.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"cannot write folder {str(folder)!r}: {error}") from None
    # Versions from 5.6 on leave `text_model.` out of names; older ones then take random weights, in silence.
    for part, text in texts.items():
        save_file(folder / part / "model.safetensors", text, dtype=dtype, metadata={"format": "pt"})
        config = folder / part / "config.json"
        content = read_json(config)  # a dtype of half precision would be computed in, beside the other parts' float32
        config.write_text(json.dumps(content | {key: "float32" for key in content.keys() & {"dtype", "torch_dtype"}}))


def _networks(params: Config) -> tuple[Config, Config, Any]:
    """Return the arguments of UNet and first stage, and the conditioner on the meta device."""
    configs = [params[f"{part}_config"] for part in ("unet", "first_stage", "cond_stage")]
    targets = [None if own is None else own["target"] for own in configs]
    refuse(
        {
            f"the UNet {targets[0]}": targets[0] != networks.UNET_TARGET,
            f"the first stage {targets[1]}": targets[1] != networks.KL_TARGET,
            f"the conditioner {targets[2]}": targets[2] not in (networks.TEXT_TARGET, networks.SIZED_TEXT_TARGET),
            f"concat {params.get('concat')!r}": params.get("concat") not in PIPELINES,
        }
    )
    with torch.device("meta"):
        conditioner = instantiate_network(configs[2])
    if targets[2] == networks.SIZED_TEXT_TARGET:
        with _expressing():
            check_sized_text(configs[2]["params"])
        refuse({f"concat {params.get('concat')!r} in Stable Diffusion XL": params.get("concat") is not None})
    else:
        text = arguments(type(conditioner), configs[2]["params"])
        refuse(
            {
                "pooled text beside the tokens (pooled)": text["pooled"],
                "text states without the final norm (layer hidden)": text["layer"] == "hidden",
                "a text encoder of no blocks": conditioner.state < 1,
            }
        )
    return configs[0]["params"], configs[1]["params"], conditioner


def _weights(
    state: Mapping[str, Tensor], levels: list[names.UNetLevel], ddconfig: Config, towers: Sequence[TextPart]
) -> dict[str, State]:
    """Return the weights of each part under diffusers' names."""
    prefixes = {part: networks.PREFIXES[part] for part in ("unet", "first_stage")}
    prefixes |= {tower.part: tower.prefix for tower in towers}
    parts: dict[str, State] = {part: {} for part in prefixes}
    for name, tensor in state.items():
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), None)
        if part is None:
            raise ValueError(f"{name} is not a weight of this model's UNet, first stage or text encoder")
        parts[part][name.removeprefix(prefixes[part])] = tensor
    found = {
        "unet": names.unet_to_diffusers(parts["unet"], levels, xl=any(tower.part in XL_COMPONENTS for tower in towers)),
        "vae": names.vae_to_diffusers(parts["first_stage"], len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"]),
    }
    return found | {tower.part: text_weights(tower, parts[tower.part]) for tower in towers}


def _filled(cls: type, params: Config, weights: State, dtype: torch.dtype | None) -> nn.Module:
    """Return the network with these weights, not copied unless `dtype` is another."""
    with torch.device("meta"):
        network = cls(**params)
    own = network.state_dict()
    if not any(name.startswith("text_model.") for name in own):  # transformers from 5.6 on
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return network


def write_unet(params: Config, sample_size: int | list[int], size_width: int | None = None) -> Config:
    """Return UNet2DConditionModel's arguments from UNetModel's; sample_size: of the latents.

    size_width: features of each number that Stable Diffusion XL takes beside the pooled text.
    """
    own = arguments(UNetModel, params)
    widths = [own["model_channels"] * mult for mult in own["channel_mult"]]
    down, up = unet_blocks([level.attention for level in unet_levels(params)])
    by_width = own["num_head_channels"] != -1
    config = {
        "sample_size": sample_size,
        **{theirs: own[ours] for ours, theirs in UNET_KEYS.items()},
        **{theirs: one_if_equal(own[ours]) for ours, theirs in PER_LEVEL.items()},
        **{"down_block_types": down, "up_block_types": up, "block_out_channels": widths},
        # which diffusers reads as the number of heads
        "attention_head_dim": [max(1, w // own["num_head_channels"]) for w in widths] if by_width else own["num_heads"],
        "cross_attention_dim": one_if_equal(own["context_dim"]),
        "only_cross_attention": one_if_equal(own["disable_self_attentions"] or False),
        # Stable Diffusion 2's attention overflows in half precision with old versions; no effect otherwise
        "upcast_attention": own["use_linear_in_transformer"] and size_width is None,
        "resnet_time_scale_shift": "scale_shift" if own["use_scale_shift_norm"] else "default",
    }
    if size_width is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": size_width}
        config["projection_class_embeddings_input_dim"] = own["adm_in_channels"]
    own |= {"num_heads": -1} if by_width else {}
    with _expressing():
        again = read_unet(config)
    again = arguments(UNetModel, again) | {"attention_resolutions": unet_levels(again)}
    _check_lossless(own | {"attention_resolutions": unet_levels(params)}, again)
    return config


def write_vae(params: Config, scale_factor: float, sample_size: int) -> Config:
    """Return the arguments of diffusers' AutoencoderKL from ours; sample_size: of the images."""
    own = _vae_arguments(params)
    down, up = vae_blocks(own["attn_resolutions"])
    config = {
        **{theirs: own[ours] for ours, theirs in VAE_KEYS.items()},
        **{"down_block_types": down, "up_block_types": up, "sample_size": sample_size, "scaling_factor": scale_factor},
        **{"block_out_channels": [own["ch"] * m for m in own["ch_mult"]], "mid_block_add_attention": own["attn_type"]},
    }
    with _expressing():
        again, _ = read_vae(config)
    _check_lossless(own, _vae_arguments(again))
    return config


def _vae_arguments(params: Config) -> Config:
    """Return our autoencoder's arguments, attn_resolutions as a flag per level and attn_type as one for the middle."""
    own = arguments(Encoder, params["ddconfig"])
    middle = own["attn_type"] != "none"
    attended = [middle and own["resolution"] // 2**i in own["attn_resolutions"] for i in range(len(own["ch_mult"]))]
    return own | {"embed_dim": params["embed_dim"], "attn_type": middle, "attn_resolutions": attended}


@contextmanager
def _expressing() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{CANNOT_EXPRESS}: {error}") from None


def _check_lossless(own: Config, again: Config) -> None:
    """Refuse arguments that are not the same when the configuration is read again."""
    values = {key: [one_if_equal(part[key]) or None for part in (own, again)] for key in own.keys() - NO_EFFECT}
    refuse({f"{key} {own[key]}": before != after for key, (before, after) in sorted(values.items())})


def write_scheduler(
    schedule: Config, prediction: str, defaults: Config, scale: float = 7.5
) -> tuple[Config, list[str]]:
    """Return (a DDIMScheduler's arguments, notes on what is lost) from our schedule, prediction and defaults.

    scale: the pipeline's own guidance scale.
    """
    name = schedule.get("name", "cosine")
    curves = {own: theirs for theirs, own in BETA_CURVES.items() if theirs != "sigmoid"}
    types = {own: theirs for theirs, own in PREDICTION_TYPES.items()}
    refuse(
        {
            f"the noise schedule {name!r}": name not in curves,
            f"its shift {schedule.get('shift')}": schedule.get("shift", 1) != 1,
            f"the prediction {prediction!r}": prediction not in types,
        }
    )
    ends, T = {}, schedule.get("T", 1000)
    if (usual_ends := SCHEDULES[name]) is not None:
        for end, usual in zip(("start", "end"), usual_ends, strict=True):
            ends[f"beta_{end}"] = usual if schedule.get(end) is None else schedule[end]
    sampler = choose_sampler(defaults.get("sampler", "ddim"), defaults.get("steps", 50), T)
    spacing = defaults.get("spacing")
    spacing = get_sampler(sampler).spacing if spacing is None else spacing
    their_spacing = SPACINGS.get(spacing) if isinstance(spacing, str) else None  # it may be a list of timesteps
    notes = []
    if sampler != "ddim" or their_spacing is None:
        notes.append(f"the folder's scheduler is DDIM; the model's own sampler is {sampler}, spacing {spacing}")
    usual = {"steps": 50, "scale": scale, "interval": None}
    own = {key: defaults.get(key, value) for key, value in usual.items()}
    if own != usual:
        notes.append(f"the folder cannot express the model's own default settings: {own}")
    return {
        "num_train_timesteps": T,
        "beta_schedule": curves[name],
        **ends,
        "prediction_type": types[prediction],
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "timestep_spacing": "leading" if their_spacing is None else their_spacing,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": defaults.get("final_sigma", "zero") == "zero",
    }, notes


def _check_replaceable(path: Path) -> None:
    """Raise ValueError for a file, and for a folder with more in it than `write_pipeline` wrote."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file: give the path of a folder")
    index = path / "model_index.json"
    own = WRITTEN if index.is_file() and read_json(index).items() >= MARK.items() else ()
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
    strange = sorted(islice((name for name in found if name not in own), 4))  # of "/", say, not all of them
    if strange:
        lost = f"{few(strange, 3)}, which would be lost"
        raise ValueError(f"folder {str(path)!r} already holds {lost}: name another folder, or empty this one")
