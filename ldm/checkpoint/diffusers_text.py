"""CLIP's text encoder and tokenizer: ours <-> the files of transformers' folders, of any version.

Versions before 5 read vocab.json and merges.txt (slow) or tokenizer.json (fast); later ones write tokenizer.json alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ldm.checkpoint.diffusers_config import arguments, refuse
from ldm.checkpoint.diffusers_files import read_json, write_json, write_text
from ldm.checkpoint.structure import CLIP_SETTINGS, OPENCLIP_SETTINGS

TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
START, END = "<|startoftext|>", "<|endoftext|>"
# transformers' word pattern for CLIP
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# SHA-256 of CLIP's own 48,894 merges, one per line: a model with these need not carry them
CLIP_MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def read_text_encoder(config: Mapping[str, Any], merges: list[str] | None, pad: int) -> dict[str, Any]:
    """CLIPTextModel's configuration, and what `read_tokenizer` gives -> our TextEncoder's parameters.

    What has the exact GELU comes from OpenCLIP (Stable Diffusion 2) and gets its layout, with the last block that
    diffusers leaves out (see `openclip_from_transformers`) and is not run; quick GELU is OpenAI's CLIP.
    """
    own = read_text_sizes(config)
    if config.get("use_attention_mask"):
        raise ValueError("the text encoder has use_attention_mask true: Stable Diffusion's does not mask its padding")
    openclip = own["activation"] == OPENCLIP_SETTINGS["activation"]
    tokenizer = {} if merges is None else {"merges": merges}
    eos = own["vocab_size"] - 1
    if pad != (0 if openclip else eos):
        tokenizer["pad"] = "eos" if pad == eos else pad
    return {
        **(OPENCLIP_SETTINGS if openclip else CLIP_SETTINGS),
        **own,
        "layers": own["layers"] + openclip,
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def read_text_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What CLIPTextModel's configuration says of the tower, in TextEncoder's terms; the rest by its own defaults.

    Raises ValueError for what our text tower has not.
    """
    own = TEXT_DEFAULTS | {key: value for key, value in config.items() if key in TEXT_DEFAULTS}
    activations = (CLIP_SETTINGS["activation"], OPENCLIP_SETTINGS["activation"])
    known = {"hidden_act": activations, "layer_norm_eps": (1e-5,), "intermediate_size": (4 * own["hidden_size"],)}
    for key, values in known.items():
        if own[key] not in values:
            raise ValueError(f"the text encoder has {key} {own[key]!r}: known is {' or '.join(map(str, values))}")
    return {
        "width": own["hidden_size"],
        "layers": own["num_hidden_layers"],
        "heads": own["num_attention_heads"],
        "activation": own["hidden_act"],
        "vocab_size": own["vocab_size"],
        "context_length": own["max_position_embeddings"],
    }


def write_text_encoder(encoder: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
    """A TextEncoder (it may be on the meta device) and its parameters -> CLIPTextModel's configuration.

    Its blocks are those that are run; nothing says in a folder that there were more.
    """
    own = arguments(type(encoder), params)
    refuse(
        {
            "pooled text beside the tokens (pooled)": own["pooled"],
            "text states without the final norm (layer hidden)": own["layer"] == "hidden",
            "a text encoder of no blocks": encoder.state < 1,
        }
    )
    tokenizer = encoder.tokenizer
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.sot,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "hidden_act": own["activation"],
        "hidden_size": own["width"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * own["width"],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": own["context_length"],
        "num_attention_heads": own["heads"],
        "num_hidden_layers": encoder.state,
        "projection_dim": own["width"],
        "torch_dtype": "float32",
        "vocab_size": own["vocab_size"],
    }


def vocabulary(merges: Sequence[str]) -> list[str]:
    """The names of all tokens in the order of their ids: 256 bytes, the same as ends of words, merges, start, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # one printable character per byte, in CLIP's order
    return letters + [letter + "</w>" for letter in letters] + [m.replace(" ", "") for m in merges] + [START, END]


def write_tokenizer(folder: Path, merges: Sequence[str], pad: int, context_length: int) -> None:
    """Write vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    pad: the id that fills prompts up: the end of text (Stable Diffusion 1) or 0, which is "!" (Stable Diffusion 2).
    transformers takes a pad token for a special one, wherever it stands: as with every Stable Diffusion 2 folder, an
    exclamation mark in a prompt is the token 0 there, and 256 in our tokenizer and open_clip's.
    """
    names = vocabulary(merges)
    ids = {name: i for i, name in enumerate(names)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": names[pad]}
    write_json(folder / "vocab.json", ids, indent=None)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    write_json(folder / "tokenizer.json", _fast(ids, merges, names[pad]), indent=None)
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": context_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", settings | special)


def _fast(ids: Mapping[str, int], merges: Sequence[str], pad: str) -> dict[str, Any]:
    """tokenizer.json: the `tokenizers` library's own format, its merges as strings, which every version reads."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = sorted({ids[name] for name in (START, END, pad)})
    names = {i: name for name, i in ids.items()}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **plain} for i in added],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, ids[END]],
            "cls": [START, ids[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": dict(ids),
            "merges": list(merges),
        },
    }


def read_tokenizer(folder: Path) -> tuple[list[str] | None, int]:
    """(merges, or None for CLIP's own, and the id of the pad token) of a folder; our Tokenizer's terms.

    Raises ValueError when files are missing or damaged, and when the tokens are not bytes, merges, start and end in
    CLIP's order: tokens that were added, by textual inversion say, are such a case.
    """
    ids, merges = _vocabulary_files(folder)
    expected = {name: i for i, name in enumerate(vocabulary(merges))}
    strange = sorted(name for name, i in ids.items() if expected.get(name) != i)
    if strange or len(ids) != len(expected):
        named = f": {', '.join(strange[:5])}" if strange else ""
        raise ValueError(
            f"the vocabulary in {str(folder)!r} is not bytes, merges, start and end in CLIP's order ({len(strange)} "
            f"of its tokens are not in their place{named}), so this model's prompts cannot be read"
        )
    pad = END  # transformers' CLIPTokenizer's default
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / file) if (folder / file).is_file() else {}
        pad = settings.get("pad_token") or pad
    pad = pad["content"] if isinstance(pad, dict) else pad
    if pad not in ids:
        raise ValueError(f"the pad token {pad!r} in {str(folder)!r} is none of the vocabulary's")
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    return (None if digest == CLIP_MERGES else merges), ids[pad]


def _vocabulary_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """(name -> id, merges "left right") from vocab.json and merges.txt, or else from tokenizer.json."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
        return read_json(folder / "vocab.json") | added, merges
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{str(folder)!r} has neither vocab.json with merges.txt nor tokenizer.json")
    whole = read_json(folder / "tokenizer.json")
    try:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
        added = {token["content"]: token["id"] for token in whole["added_tokens"]}
        return {**whole["model"]["vocab"], **added}, merges
    except (KeyError, TypeError):
        raise ValueError(f"{str(folder / 'tokenizer.json')!r} holds no byte-pair vocabulary") from None
