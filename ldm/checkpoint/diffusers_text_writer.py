"""The text encoders and tokenizers of a diffusers folder that is written, as transformers has them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.checkpoint import diffusers_names as names
from ldm.checkpoint import networks
from ldm.checkpoint.diffusers_config import arguments
from ldm.checkpoint.diffusers_folder import XL_COMPONENTS
from ldm.checkpoint.diffusers_text import CLIP_KEYS, vocabulary
from ldm.checkpoint.networks import Config
from ldm.checkpoint.structure import EMBEDDERS
from ldm.checkpoint.tensors import State

CANNOT_EXPRESS = "diffusers' Stable Diffusion cannot express this model"


class TextPart(NamedTuple):
    """A text encoder: its part of a pipeline, the beginning of our names, its arguments, itself, and blocks to keep."""

    part: str
    prefix: str
    params: Config
    encoder: Any
    layers: int


def text_parts(conditioner: Any, params: Config) -> list[TextPart]:
    """Return the text encoders of a conditioner with these arguments, which is on the meta device."""
    prefix, ends = networks.PREFIXES["text"], {"transformers": "transformer.", "openclip": "model."}
    if "embedders" not in params:
        own = arguments(type(conditioner), params)
        return [TextPart("text_encoder", prefix + ends[conditioner.layout], own, conditioner, conditioner.state)]
    encoders: list[Any] = list(conditioner.embedders)
    layouts = [own.layout for own in encoders]
    refuse({f"text encoders of the layouts {layouts}": layouts != ["transformers", "openclip"][-len(encoders) :]})
    parts = ("text_encoder", "text_encoder_2")[-len(encoders) :]  # the refiner has the second
    return [
        TextPart(part, f"{prefix}{EMBEDDERS}{i}.{ends[own.layout]}", arguments(type(own), given), own, own.layers)
        for i, (part, own, given) in enumerate(zip(parts, encoders, params["embedders"], strict=True))
    ]


def text_class(tower: TextPart) -> tuple[type, Config]:
    """Return the class of transformers, and its arguments."""
    import transformers

    params, tokenizer = tower.params, tower.encoder.tokenizer
    second = tower.part in XL_COMPONENTS
    own: dict[str, Any] = (
        {theirs: params[ours] for ours, theirs in CLIP_KEYS.items()}
        | {"num_hidden_layers": tower.layers, "intermediate_size": params["mlp_width"] or 4 * params["width"]}
        | {"projection_dim": params["projection_dim"] if second else params["width"]}
        | {"bos_token_id": tokenizer.sot, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    )
    name, config = XL_COMPONENTS.get(tower.part, "CLIPTextModel"), transformers.CLIPTextConfig(**own)
    return getattr(transformers, name), {"config": config}


def text_weights(tower: TextPart, state: State) -> State:
    """Return the weights of a text encoder under transformers' names."""
    if tower.encoder.layout == "transformers":
        return names.clip_to_transformers(state, tower.layers)
    found = names.openclip_to_transformers(state, tower.layers)
    if tower.part in XL_COMPONENTS:
        found["text_projection.weight"] = state["text_projection"].T.contiguous()
    return found


def write_vocabulary(folder: Path, merges: Sequence[str]) -> None:
    """Write vocab.json and merges.txt, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {name: i for i, name in enumerate(vocabulary(merges))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_bytes("\n".join(["#version: 0.2", *merges, ""]).encode())


def write_tokenizer(folder: Path, merges: Sequence[str], pad: int, context_length: int) -> Any:
    """Write a tokenizer's files, and return transformers' CLIPTokenizer of them.

    transformers takes the token of the id `pad` for a special one, wherever it stands: as with every Stable Diffusion 2
    folder, an exclamation mark in a prompt is the token 0 there, and 256 in our tokenizer and open_clip's.
    """
    from transformers import CLIPTokenizer

    write_vocabulary(folder, merges)
    settings: dict[str, Any] = {"pad_token": vocabulary(merges)[pad], "model_max_length": context_length}
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def refuse(reasons: Mapping[str, bool]) -> None:
    """Raise ValueError for the reasons that hold."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"{CANNOT_EXPRESS}: {'; '.join(found)}")
