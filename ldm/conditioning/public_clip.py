"""Load public CLIP text encoders by name: transformers' folders, the Hugging Face hub, and open_clip's weights.

Sizes, heads, activation and padding are read from the configuration beside the weights: no default fits all, and the
number of heads and the activation cannot be seen in the weights.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.diffusers_files import read_json, read_weights
from ldm.checkpoint.diffusers_names import clip_from_transformers
from ldm.checkpoint.diffusers_text import TOKENIZER_FILES, read_text_sizes, read_tokenizer
from ldm.checkpoint.networks import TEXT_TARGET, Found
from ldm.checkpoint.structure import misfits
from ldm.checkpoint.tensors import check_finite, read_tensors
from ldm.conditioning.text import TextEncoder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What public files hold besides the text tower: the image tower, the heads that compare the two, and old buffers.
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
NOT_TEXT_OPENCLIP = ("visual.", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


def load_text_encoder(
    name: str, layer: str = "last", layer_index: int | None = None, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load a text encoder with its public weights, frozen, in eval mode, on the CPU.

    Args:
        name: a local folder in transformers' layout (CLIPModel or CLIPTextModel: config.json with model.safetensors or
            pytorch_model.bin, also in shards); a model of the Hugging Face hub, such as
            "openai/clip-vit-large-patch14" (Stable Diffusion 1), from the local cache or downloaded; or, of open_clip,
            "ARCHITECTURE/TAG", such as "ViT-H-14/laion2b_s32b_b79k" (Stable Diffusion 2), or "ARCHITECTURE/FILE".
        layer, layer_index: as in TextEncoder. Stable Diffusion 2 has "penultimate".
        dtype: of the weights; those that have it already stay mapped from their file.
    """
    params, state = read_text_encoder(name)
    try:
        with torch.device("meta"):  # nothing is initialised that the file will overwrite
            encoder = TextEncoder(**params, layer=layer, layer_index=layer_index)
    except ValueError as error:
        raise ValueError(f"text encoder {name!r} cannot be built: {error}") from None
    expected = {key: tuple(p.shape) for key, p in encoder.state_dict().items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    if expected != found:
        wrong = misfits(expected, found)
        raise ValueError(f"the weights of text encoder {name!r} do not fit its configuration: {wrong}")
    encoder.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
    return encoder.eval().requires_grad_(False)


def read_text_encoder(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return TextEncoder's arguments except the layer, and its parameters, mapped from their file."""
    architecture, _, weights = name.partition("/")
    if Path(name).is_dir():
        return _from_transformers(name, Path(name))
    if weights and _open_clip_config(architecture) is not None:
        return _from_open_clip(name, architecture, weights)
    return _from_transformers(name, _download(name))


def read_clip_folder(path: Path) -> Found:
    """Read the folder of a CLIP, as transformers saves it, as `ldm.load` takes parts of models."""
    params, state = read_text_encoder(str(path))
    return Found({"target": TEXT_TARGET, "params": params}, state, [])


def _from_transformers(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        params = transformers_params(read_json(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"text encoder {name!r} is not one that we know: {error}") from None
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))  # in a folder of diffusers
    files = [place / file for place in (folder, beside) for file in ("vocab.json", "tokenizer.json")]
    if words := next((file.parent for file in files if file.is_file()), None):  # if not, the vocabulary is CLIP's
        merges, pad, _, added = read_tokenizer(words)
        if added:
            raise ValueError(f"text encoder {name!r} has tokens that were added ({', '.join(added.values())})")
        params["tokenizer"] = {"pad": pad} if merges is None else {"pad": pad, "merges": merges}
    state = clip_from_transformers(read_weights(folder, "text_encoder", variant=None)[0])
    return params, {f"transformer.{key}": t for key, t in state.items() if not key.startswith(NOT_TEXT)}


def transformers_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return TextEncoder's arguments from a config.json of transformers' CLIPModel or CLIPTextModel."""
    kind = config.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise ValueError(f"its model_type is {kind!r}, and must be 'clip' or 'clip_text_model'")
    if kind == "clip":  # in old files, text_config_dict holds the arguments that text_config was made from, and wins
        config = config.get("text_config_dict") or config.get("text_config") or {}
    return {"layout": "transformers", **read_text_sizes(config)}


def _download(repository: str) -> Path:
    """Return the folder of a hub model in the local cache; missing files are downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError:  # there is no such file, or it is not in the cache and there is no connection
            return None

    try:
        folder = Path(hf_hub_download(repository, "config.json")).parent
        for file in TOKENIZER_FILES:
            fetch(file)
        weights = next((path for file in WEIGHTS if (path := fetch(file)) is not None), None)
        if weights is not None and weights.suffix == ".json":
            for shard in sorted(set(read_json(weights).get("weight_map", {}).values())):
                fetch(shard)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text encoder {repository!r} is not a folder, not a model of open_clip, and cannot be loaded from the "
            f"Hugging Face hub or its local cache: {_first_line(error)}"
        ) from None
    return folder


def _open_clip_models() -> Path:
    """Return the folder of open_clip's architectures, NAME.json each, without importing the package."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return Path("open_clip is not installed")
    return Path(spec.origin).parent / "model_configs"


def _open_clip_config(architecture: str) -> dict[str, Any] | None:
    """Return open_clip's settings of an architecture, or those that the program registered there, or None."""
    path = _open_clip_models() / f"{architecture}.json"
    if path.is_file():
        return read_json(path)
    open_clip = sys.modules.get("open_clip")  # `open_clip.add_model_config` registers
    registered = open_clip is not None and architecture in open_clip.list_models()
    return open_clip.get_model_config(architecture) if registered else None


def open_clip_params(architecture: str, name: str | None = None) -> dict[str, Any]:
    """Return TextEncoder's arguments except the layer for open_clip's architecture; name: for messages."""
    name, config = name or architecture, _open_clip_config(architecture)
    if config is None:
        raise ValueError(
            f"the text encoder's arch {architecture!r} is unknown to open_clip: register it by "
            "open_clip.add_model_config, or use one of open_clip.list_models()"
        )
    text = dict(config["text_cfg"])
    sizes = {key: text.pop(key, None) for key in ("width", "layers", "heads", "vocab_size", "context_length")}
    if text or None in sizes.values():
        raise ValueError(
            f"text encoder {name!r} is not CLIP's own, the only one that is supported: its open_clip configuration "
            f"has {', '.join(config['text_cfg'])}"
        )
    activation = "quick_gelu" if config.get("quick_gelu", False) else "gelu"
    return {"layout": "openclip", **sizes, "activation": activation, "projection_dim": config["embed_dim"]}


def _from_open_clip(name: str, architecture: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    params = open_clip_params(architecture, name)
    path, quick = _open_clip_weights(name, architecture, weights)
    state = {key.removeprefix("module."): tensor for key, tensor in read_tensors(path).state.items()}
    state = {"model." + key: tensor for key, tensor in state.items() if not key.startswith(NOT_TEXT_OPENCLIP)}
    check_finite(f"checkpoint {str(path)!r}", state)
    scale = state.get("model.logit_scale")
    if scale is not None and scale.shape == (1,):  # in some files
        state["model.logit_scale"] = scale[0]
    return params | ({"activation": "quick_gelu"} if quick else {}), state


def _open_clip_weights(name: str, architecture: str, weights: str) -> tuple[Path, bool]:
    """Return the file, and whether open_clip's list of weights says that it was trained with quick GELU."""
    if Path(weights).is_file():
        return Path(weights), False
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    known = get_pretrained_cfg(architecture, weights)
    if not known:
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise ValueError(f"text encoder {name!r}: {weights!r} is neither a file nor a tag of {architecture} ({tags})")
    try:
        return Path(download_pretrained(known)), known.get("quick_gelu", False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"text encoder {name!r} cannot be downloaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
