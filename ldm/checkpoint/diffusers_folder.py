"""Read diffusers' folders of Stable Diffusion 1, 2 and XL, as any version writes them; diffusers is not imported.

model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/      (safety_checker/ and others are ignored)
and of XL         text_encoder_2/  tokenizer_2/
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.checkpoint import diffusers_names as names
from ldm.checkpoint import networks
from ldm.checkpoint.diffusers_config import read_scheduler, read_unet, read_vae
from ldm.checkpoint.diffusers_files import WEIGHT_FILES, read_json, read_weights, unchanged
from ldm.checkpoint.diffusers_text import TokenizerFiles, added_words, read_text_sizes, read_tokenizer, text_params
from ldm.checkpoint.eight_bits import widened
from ldm.checkpoint.family_table import find_concat
from ldm.checkpoint.networks import Config, Found
from ldm.checkpoint.tensors import State
from ldm.checkpoint.xl import sized_text

# concat -> the pipeline that is written; all of them are read
PIPELINES = {
    None: "StableDiffusionPipeline",
    "mask_latents": "StableDiffusionInpaintPipeline",
    "latents": "StableDiffusionInstructPix2PixPipeline",
}
ALSO_READ = ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy")
XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
COMPONENTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "scheduler": None,  # of any class
}
XL_COMPONENTS = {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}  # and the others
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")  # a filter, and IP-Adapter's: not part of the model


def read_pipeline(path: str | Path, variant: str | None = None) -> Found:
    """Read a diffusers folder; the weights are mapped under CompVis's names.

    Names and shapes are not compared with the configuration here.

    Args:
        variant: of the weights' files, such as "fp16"; parts that have none of it are read without. None takes the
            files without a variant, or the only variant where there are no others.
    """
    path = Path(path)
    index = _check_index(path)
    with unchanged(path, *(path / part for part in _components(index))):
        return _read_pipeline(path, index, variant)


def _components(index: Config) -> Mapping[str, str | None]:
    """Return what a pipeline consists of; the refiner of Stable Diffusion XL lacks the first text encoder."""
    if index["_class_name"] not in XL_PIPELINES:
        return COMPONENTS
    lacking = [part for part in ("text_encoder", "tokenizer") if index.get(part) == [None, None]]
    return {part: kind for part, kind in (COMPONENTS | XL_COMPONENTS).items() if part not in lacking}


def _read_pipeline(path: Path, index: Config, variant: str | None) -> Found:
    pipeline = index["_class_name"]
    xl = pipeline in XL_PIPELINES
    parts = [part for part in _components(index) if _kind(part) in WEIGHT_FILES]
    config = {part: read_json(path / part / "config.json") for part in parts}
    with _naming(path):
        unet = read_unet(config["unet"])
        vae, scale_factor = read_vae(config["vae"])
        encoders = [part for part in parts if _kind(part) == "text_encoder"]
        places = [f"embedders.{i}." if xl else "" for i in range(len(encoders))]
        towers = {
            part: _read_tower(path, part, config[part], place) for part, place in zip(encoders, places, strict=True)
        }
        text = _read_sized(towers, config, unet, index) if xl else towers["text_encoder"].config
        scheduler, notes = read_scheduler(read_json(path / "scheduler" / "scheduler_config.json"))
        concat = find_concat(unet["in_channels"] - vae["embed_dim"], vae["embed_dim"], text=True)
        if "num_classes" in unet and not xl:
            raise ValueError(f"the UNet of this {pipeline} takes pooled text, as Stable Diffusion XL's alone does")
        if concat == "latents" and pipeline != PIPELINES["latents"]:
            raise ValueError(f"the UNet of this {pipeline} takes an image's latents, as InstructPix2Pix's alone does")
        size, assumed = _image_size(config["unet"], len(vae["ddconfig"]["ch_mult"]))
    params = {
        "unet_config": {"target": networks.UNET_TARGET, "params": unet},
        "first_stage_config": {"target": networks.KL_TARGET, "params": vae},
        "cond_stage_config": text,
        **scheduler,
        "scale_factor": scale_factor,
        # what the pipelines are called with
        "defaults": {**size, "steps": 50, "scale": 5.0 if xl else 7.5, **scheduler["defaults"]},
        "concat": concat,
    }
    notes = [f"a folder of diffusers, {pipeline}", *notes, *assumed]
    if "scaling_factor" not in config["vae"]:
        notes.append("the scale factor 0.18215 is assumed: the autoencoder's configuration does not say")
    if config["unet"].get("upcast_attention"):
        notes.append("upcast_attention (attention in float32) is not read: choose the precision when you generate")
    if not xl and text["params"]["layout"] == "openclip":
        notes.append("a text encoder of OpenCLIP; stand-ins were supplied for its last block and projection, unused")
    weights, variants = {}, {}
    for part in parts:
        weights[part], variants[part] = read_weights(path / part, _kind(part), variant)
    if variant is not None and variant not in variants.values():
        raise ValueError(f"folder {str(path)!r} holds no weights of the variant {variant!r}")
    notes += [f"{part}/: the weights' variant {own!r}" for part, own in variants.items() if own is not None]
    with _naming(path):
        state, words = _from_diffusers(weights, towers)
        state, widths = widened(state)
        notes += widths
    if words and xl:
        notes.append(f"learned words among its tokens are left out: {' '.join(words)}")
        words = {}
    elif words:
        notes.append(f"learned words among its tokens: {' '.join(words)}")
    return Found({"target": networks.MODEL_TARGET, "params": params}, state, notes, words=words)


class Tower(NamedTuple):
    """A text encoder of a folder: its place in the conditioner, its {"target", "params"} and its tokenizer."""

    place: str
    config: Config
    tokenizer: TokenizerFiles


def _kind(part: str) -> str:
    """Return the part that this one is the second of, or the part itself."""
    return part.removesuffix("_2")


def _read_tower(path: Path, part: str, config: Mapping[str, Any], place: str) -> Tower:
    second = part.removeprefix("text_encoder")  # "" or "_2"
    tokenizer = read_tokenizer(path / f"tokenizer{second}")
    rows = read_text_sizes(config)["vocab_size"]
    sizes = {"vocab_size": min(rows, tokenizer.size)}  # rows behind the vocabulary are those of added words
    params = text_params({**config, **sizes}, tokenizer.merges, tokenizer.pad, complete=place != "")
    if second:
        params["projection_dim"] = _projection(config)
    return Tower(place, {"target": networks.TEXT_TARGET, "params": params}, tokenizer)


def _projection(config: Mapping[str, Any]) -> int:
    """Return the width of the pooled text, which transformers takes to be 512 where the configuration has none."""
    width = config.get("projection_dim", 512)
    if type(width) is not int or width < 1:
        raise ValueError(f"the text encoder has projection_dim {width!r}: it must be a number of features")
    return width


def _read_sized(towers: Mapping[str, Tower], config: Mapping[str, Config], unet: Config, index: Config) -> Config:
    """Return the conditioner of Stable Diffusion XL or of its refiner."""
    size_width = config["unet"].get("addition_time_embed_dim")
    if type(size_width) is not int:
        raise ValueError(f"the UNet has addition_time_embed_dim {size_width!r}: it must be a number of features")
    pooled = _projection(config["text_encoder_2"])
    numbers = 5 if index.get("requires_aesthetics_score", False) else 6
    if (numbers == 5) != (len(towers) == 1):
        raise ValueError("Stable Diffusion XL's refiner alone has one text encoder and requires_aesthetics_score")
    if "num_classes" not in unet or unet["adm_in_channels"] != pooled + numbers * size_width:
        found = f"the UNet takes {unet.get('adm_in_channels', 0)} numbers beside the context"
        raise ValueError(
            f"{found}: this pipeline has {pooled} of pooled text and {numbers} numbers of {size_width} each"
        )
    zeros = index.get("force_zeros_for_empty_prompt", True)
    embedders = [tower.config["params"] for tower in towers.values()]
    return sized_text(embedders, size_width=size_width, zeros_for_empty=zeros)


def read_vae_folder(path: str | Path) -> Found:
    """Read the folder of an autoencoder, with its scale factor if it says one."""
    path = Path(path)
    config = read_json(path / "config.json")
    kind = config.get("_class_name", config.get("architectures"))
    if kind not in (None, "AutoencoderKL"):
        known = "pipelines, with a model_index.json, and an AutoencoderKL"
        raise ValueError(f"folder {str(path)!r} holds a {kind} alone: supported are {known}")
    with _naming(path), unchanged(path):
        vae, scale_factor = read_vae(config)
        state = names.vae_from_diffusers(read_weights(path, "vae", None)[0])
    given = scale_factor if "scaling_factor" in config else None
    return Found({"target": networks.KL_TARGET, "params": vae}, state, [], given)


def _check_index(path: Path) -> Config:
    """Return model_index.json, if it names one of the pipelines that are read, with all its parts."""
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist")
    if not (path / "model_index.json").is_file():
        raise ValueError(f"folder {str(path)!r} is not a diffusers folder: it holds no model_index.json")
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in (known := (*PIPELINES.values(), *ALSO_READ, *XL_PIPELINES)):
        raise ValueError(f"folder {str(path)!r} holds a {pipeline}: supported are {', '.join(known)}")
    components = _components(index)
    for name, entry in index.items():
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        wanted = components.get(name)
        fits = entry == [None, None] or kind in (wanted, f"{wanted}Fast")  # CLIPTokenizerFast is the same tokenizer
        if wanted is not None and not fits:
            raise ValueError(f"folder {str(path)!r} has a {kind} as its {name}: only {wanted} is supported")
        if kind is not None and name not in (*IGNORED, *components):
            raise ValueError(f"folder {str(path)!r} has a part {name} ({kind}), which is not supported")
    missing = [part for part in components if index.get(part) in (None, [None, None]) or not (path / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"folder {str(path)!r} lacks {', '.join(missing)}: it needs {', '.join(components)}")
    return index


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the folder's name before what is wrong with it; a damaged configuration may break the readers in any way."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"folder {str(path)!r}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"folder {str(path)!r} has a damaged configuration ({error!r})") from None


def _image_size(unet: Mapping[str, Any], levels: int) -> tuple[dict[str, int], list[str]]:
    """Return height and width in pixels that the model generates by default, and notes."""
    size, notes = unet.get("sample_size"), []
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    if size is None:
        size, notes = 64, ["the size of images is assumed: the UNet's configuration has no sample_size"]
    elif isinstance(size, int) and size < 64 and version is not None and tuple(map(int, version.groups())) < (0, 9):
        size, notes = 64, [f"sample_size {size} is taken for 64, as diffusers does for folders before 0.9"]
    height, width = (size, size) if isinstance(size, int) else size
    return {"height": height * 2 ** (levels - 1), "width": width * 2 ** (levels - 1)}, notes


def _from_diffusers(weights: Mapping[str, State], towers: Mapping[str, Tower]) -> tuple[State, dict[str, Tensor]]:
    """Return the parts' weights under the names of a complete model, and the vectors of learned words."""
    parts = {
        networks.PREFIXES["unet"]: names.unet_from_diffusers(weights["unet"]),
        networks.PREFIXES["first_stage"]: names.vae_from_diffusers(weights["vae"]),
    }
    words: dict[str, Tensor] = {}
    for part, (place, config, tokenizer) in towers.items():
        prefix, encoder = f"{networks.PREFIXES['text']}{place}transformer.", names.clip_from_transformers(weights[part])
        if config["params"]["layout"] == "openclip":
            prefix = f"{networks.PREFIXES['text']}{place}model."
            if part == "text_encoder_2" and "text_projection.weight" not in encoder:
                raise ValueError(f"{part} lacks text_projection.weight, the projection of the pooled text")
            encoder = names.openclip_from_transformers(encoder, config["params"]["layers"])
        for name in [name for name in encoder if name.endswith("token_embedding.weight")]:
            words |= added_words(tokenizer.added, encoder[name][tokenizer.size :], tokenizer.size)
            encoder[name] = encoder[name][: tokenizer.size]
        parts[prefix] = encoder
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}, words
