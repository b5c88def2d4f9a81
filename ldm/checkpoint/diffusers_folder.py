"""diffusers' folders of Stable Diffusion 1 and 2: read as written by any version, written so that any version reads.

model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/      (safety_checker/ and others are ignored)
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import diffusers_names as names
from ldm.checkpoint.compvis import PREFIXES
from ldm.checkpoint.diffusers_config import read_unet, read_vae, refuse, unet_levels, write_unet, write_vae
from ldm.checkpoint.diffusers_files import WEIGHTS, WRITER, read_json, read_weights, whole_folder, write_json
from ldm.checkpoint.diffusers_scheduler import read_scheduler, write_scheduler
from ldm.checkpoint.diffusers_text import (
    TOKENIZER_FILES,
    read_text_encoder,
    read_tokenizer,
    write_text_encoder,
    write_tokenizer,
)
from ldm.checkpoint.file import save_file
from ldm.checkpoint.structure import KL, TEXT, UNET, WHOLE
from ldm.util import instantiate_network

# concat -> the pipeline that is written; all of them are read
PIPELINES = {
    None: "StableDiffusionPipeline",
    "mask_latents": "StableDiffusionInpaintPipeline",
    "latents": "StableDiffusionInstructPix2PixPipeline",
}
ALSO_READ = ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy")
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")  # a filter, and IP-Adapter's: not part of the model
FORMAT = "0.30.0"  # the diffusers whose configurations these are; before 0.9, sample_size could mean nothing
WRITTEN = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    *(f"{part}/config.json" for part in WEIGHTS),
    *(f"{part}/{'.'.join(kinds[0])}" for part, kinds in WEIGHTS.items()),
}

State = dict[str, Tensor]


def read_folder(path: str | Path, variant: str | None = None) -> tuple[dict[str, Any], State, list[str]]:
    """A folder of diffusers -> (LatentDiffusion's configuration, its weights under CompVis's names, notes).

    Args:
        variant: of the weights' files, such as "fp16"; parts that have none of it are read without. None takes the
            files without a variant, or the only variant where there are no others.

    The weights are mapped from the files, not copied (save for OpenCLIP's q, k and v, which ours has in one). The notes
    say what was recognised and what assumed. Names and shapes are not compared with the configuration here.

    Raises FileNotFoundError when the folder, one of its parts or a shard is missing, ValueError when it holds another
    pipeline, is damaged, or has something that our networks cannot do.
    """
    path = Path(path)
    pipeline = _check_index(path)
    config = {part: read_json(path / part / "config.json") for part in WEIGHTS}
    with _said_of(path):
        unet = read_unet(config["unet"])
        vae, scale_factor = read_vae(config["vae"])
        text = read_text_encoder(config["text_encoder"], *read_tokenizer(path / "tokenizer"))
        drawing, notes = read_scheduler(read_json(path / "scheduler" / "scheduler_config.json"))
        concat = _concat(unet["in_channels"], vae["embed_dim"], pipeline)
        size, assumed = _image_size(config["unet"], len(vae["ddconfig"]["ch_mult"]))
    params = {
        "unet_config": {"target": UNET, "params": unet},
        "first_stage_config": {"target": KL, "params": vae},
        "cond_stage_config": {"target": TEXT, "params": text},
        **drawing,
        "scale_factor": scale_factor,
        "defaults": {**size, "steps": 50, "scale": 7.5, **drawing["defaults"]},  # what the pipelines are called with
        "concat": concat,
    }
    notes = [f"a folder of diffusers, {pipeline}", *notes, *assumed, *_assumptions(config, text["layout"])]
    weights, variants = {}, {}
    for part in WEIGHTS:
        weights[part], variants[part] = read_weights(path / part, part, variant)
    if variant is not None and variant not in variants.values():
        raise ValueError(f"folder {str(path)!r} holds no weights of the variant {variant!r}")
    notes += [f"{part}/: the weights' variant {own!r}" for part, own in variants.items() if own is not None]
    with _said_of(path):
        return {"target": WHOLE, "params": params}, _from_diffusers(weights, params), notes


def read_vae_folder(path: str | Path) -> tuple[dict[str, Any], State, float | None]:
    """A folder of an autoencoder alone (config.json, weights) -> (configuration, weights in our names, scale factor).

    The scale factor is None where the folder does not say.

    Errors as `read_folder`.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    kind = config.get("_class_name", config.get("architectures"))
    if kind not in (None, "AutoencoderKL"):
        raise ValueError(
            f"folder {str(path)!r} holds a {kind} alone: read are whole pipelines, with a model_index.json, and "
            "an AutoencoderKL"
        )
    with _said_of(path):
        vae, scale_factor = read_vae(config)
        ddconfig = vae["ddconfig"]
        weights, _ = read_weights(path, "vae", None)
        state = names.vae_from_diffusers(weights, len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"])
        return {"target": KL, "params": vae}, state, scale_factor if "scaling_factor" in config else None


def _check_index(path: Path) -> str:
    """The pipeline that model_index.json names. Raises unless it is one of those that are read, with all its parts."""
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist")
    if not (path / "model_index.json").is_file():
        raise ValueError(f"folder {str(path)!r} is none of diffusers': it holds no model_index.json")
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    known = (*PIPELINES.values(), *ALSO_READ)
    if pipeline not in known:
        raise ValueError(
            f"folder {str(path)!r} holds a {pipeline}: only Stable Diffusion 1 and 2 are read ({known[0]} ...)"
        )
    for name, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name in WEIGHTS or name == "tokenizer":
            wanted = PARTS[name][1]
            if kind not in (wanted, f"{wanted}Fast"):  # CLIPTokenizerFast is the same tokenizer
                raise ValueError(f"folder {str(path)!r} has a {kind} as its {name}: only {wanted} is read")
        elif kind is not None and name not in (*IGNORED, "scheduler"):
            raise ValueError(f"folder {str(path)!r} has a part {name} ({kind}), without which it draws something else")
    missing = [part for part in PARTS if part not in index or not (path / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"folder {str(path)!r} lacks {', '.join(missing)}: it needs {', '.join(PARTS)}")
    return pipeline


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Puts the folder's name before what is wrong with it; a damaged configuration may break the readers in any way."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"folder {str(path)!r}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"folder {str(path)!r} has a damaged configuration ({error!r})") from None


def _concat(channels: int, latent: int, pipeline: str) -> str | None:
    """What the UNet's input holds beside `latent` channels of noised latents; see LatentDiffusion."""
    beside = {latent: None, 2 * latent + 1: "mask_latents"}
    if pipeline == PIPELINES["latents"]:
        beside[2 * latent] = "latents"
    if channels not in beside:
        raise ValueError(
            f"the UNet of this {pipeline} takes {channels} channels where latents have {latent}: known are "
            f"{latent} (text), {2 * latent + 1} (inpainting) and InstructPix2Pix's {2 * latent}"
        )
    return beside[channels]


def _image_size(unet: Mapping[str, Any], levels: int) -> tuple[dict[str, int], list[str]]:
    """Height and width in pixels that the model draws unless told otherwise, and notes."""
    size, notes = unet.get("sample_size"), []
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    if size is None:
        size, notes = 64, ["the size of pictures is assumed: the UNet's configuration has no sample_size"]
    elif isinstance(size, int) and size < 64 and version is not None and tuple(map(int, version.groups())) < (0, 9):
        size, notes = 64, [f"sample_size {size} is taken for 64, as diffusers does for folders before 0.9"]
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height * 2 ** (levels - 1), "width": width * 2 ** (levels - 1)}, notes


def _assumptions(config: Mapping[str, Mapping[str, Any]], layout: str) -> list[str]:
    notes = []
    if "scaling_factor" not in config["vae"]:
        notes.append("the scale factor 0.18215 is assumed: the autoencoder's configuration does not say")
    if config["unet"].get("upcast_attention"):
        notes.append("upcast_attention (attention in float32) is not read: choose the precision when drawing")
    if layout == "openclip":
        notes.append("a text encoder of OpenCLIP; its last block and projection, which are not used, are made up")
    return notes


def _from_diffusers(weights: Mapping[str, State], params: Mapping[str, Any]) -> State:
    """The parts' weights under the names of a whole model."""
    unet, vae, text = (params[f"{part}_config"]["params"] for part in ("unet", "first_stage", "cond_stage"))
    ddconfig = vae["ddconfig"]
    prefix, encoder = PREFIXES["text"] + "transformer.", names.clip_from_transformers(weights["text_encoder"])
    if text["layout"] == "openclip":
        prefix = PREFIXES["text"] + "model."
        encoder = names.openclip_from_transformers(encoder, text["layers"])
    parts = {
        PREFIXES["unet"]: names.unet_from_diffusers(weights["unet"], unet_levels(unet)),
        PREFIXES["first_stage"]: names.vae_from_diffusers(
            weights["vae"], len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"]
        ),
        prefix: encoder,
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def write_folder(
    path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model, its whole configuration and weights, as a folder of diffusers; notes say what is lost in it.

    Args:
        dtype: converts the weights, e.g. torch.float16 to halve the files.

    The text encoder gets the blocks that are run and no projection: the 24th block of Stable Diffusion 2 is left out,
    as in its public folders.

    The folder is written beside `path` and renamed when it is complete: whatever goes wrong, `path` is the old folder
    or the whole new one. An old folder is replaced only if it is empty, or was written by this function and holds
    nothing else; every other one is refused, so that nothing is lost. (Replacing takes two renames. Should the machine
    stop between them, the old folder lies beside `path` as `.NAME.PID.old`.)

    Raises ValueError for a model that diffusers' Stable Diffusion cannot express, naming what, and for a `path` that is
    not replaced; OSError when it cannot be written.
    """
    files, weights, tokenizer, notes = _to_diffusers(config["params"], state)
    with whole_folder(Path(path), WRITTEN) as folder:
        for name, content in files.items():
            write_json(folder / name, content)
        write_tokenizer(folder / "tokenizer", tokenizer.merges, tokenizer.pad, tokenizer.context_length)
        for part, tensors in weights.items():
            # transformers refuses a file that does not say whose tensors these are
            save_file(folder / part / ".".join(WEIGHTS[part][0]), tensors, dtype=dtype, metadata={"format": "pt"})
    return notes


def _to_diffusers(
    params: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict, dict[str, State], Any, list[str]]:
    """(JSON files by name, weights by part, the tokenizer, notes)."""
    configs = {part: params[f"{part}_config"] for part in ("unet", "first_stage", "cond_stage")}
    targets = {part: None if own is None else own["target"] for part, own in configs.items()}
    refuse(
        {
            f"the UNet {targets['unet']}": targets["unet"] != UNET,
            f"the first stage {targets['first_stage']}": targets["first_stage"] != KL,
            f"the conditioner {targets['cond_stage']}": targets["cond_stage"] != TEXT,
            f"concat {params.get('concat')!r}": params.get("concat") not in PIPELINES,
        }
    )
    unet, vae, text = (own["params"] for own in configs.values())
    with torch.device("meta"):
        encoder = instantiate_network(configs["cond_stage"])
    ddconfig, levels, defaults = vae["ddconfig"], unet_levels(unet), params["defaults"]
    factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
    size = [defaults["height"] // factor, defaults["width"] // factor]
    scheduler, notes = write_scheduler(params["schedule"], params["prediction"], defaults)
    files = {
        "unet/config.json": write_unet(unet, size[0] if size[0] == size[1] else size),
        "vae/config.json": write_vae(vae, params["scale_factor"], defaults["height"]),
        "text_encoder/config.json": write_text_encoder(encoder, text),
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, content in files.items():
        if not name.startswith("text_encoder"):
            content |= {"_class_name": PARTS[name.split("/")[0]][1], "_diffusers_version": FORMAT}
    index = {"_class_name": PIPELINES[params.get("concat")], "_diffusers_version": FORMAT, **WRITER}
    unfiltered = {"safety_checker": (None, None), "feature_extractor": (None, None), "requires_safety_checker": False}
    files["model_index.json"] = index | PARTS | unfiltered
    parts = _parts(state, encoder.layout)
    to_transformers = names.openclip_to_transformers if encoder.layout == "openclip" else names.clip_to_transformers
    weights = {
        "unet": names.unet_to_diffusers(parts["unet"], levels),
        "vae": names.vae_to_diffusers(parts["first_stage"], len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"]),
        "text_encoder": to_transformers(parts["text"], encoder.state),
    }
    if encoder.layout == "openclip" or len(weights["text_encoder"]) < len(parts["text"]):
        notes.append(f"of the text encoder {encoder.state} blocks are kept, without a projection: the rest is not used")
    return files, weights, encoder.tokenizer, notes


def _parts(state: Mapping[str, Tensor], layout: str) -> dict[str, State]:
    """The weights of each network under its own names. Raises ValueError for a weight of none."""
    prefixes = PREFIXES | {"text": PREFIXES["text"] + ("model." if layout == "openclip" else "transformer.")}
    parts = {part: {} for part in prefixes}
    for name, tensor in state.items():
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), None)
        if part is None:
            raise ValueError(f"{name} is no weight of this model's UNet, first stage or text encoder")
        parts[part][name.removeprefix(prefixes[part])] = tensor
    return parts
