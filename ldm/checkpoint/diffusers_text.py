"""Read CLIP's text encoder and tokenizer from the files of transformers' folders, of any version.

Versions before 5 wrote vocab.json and merges.txt (slow) or tokenizer.json (fast); later ones tokenizer.json alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.checkpoint.diffusers_files import read_json
from ldm.checkpoint.networks import CLIP_SETTINGS, OPENCLIP_SETTINGS, Config
from ldm.checks import few

TEXT_DEFAULTS = {
    **{"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
    **{"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
CLIP_KEYS = {  # our arguments -> theirs with the same values
    **{"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"},
    **{"activation": "hidden_act", "vocab_size": "vocab_size", "context_length": "max_position_embeddings"},
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
START, END = "<|startoftext|>", "<|endoftext|>"
# Of CLIP's own 48,894 merges, one per line: a model with these need not carry them.
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def text_params(config: Mapping[str, Any], merges: list[str] | None, pad: int, complete: bool = False) -> Config:
    """Return TextEncoder's arguments from CLIPTextModel's configuration and what `read_tokenizer` returns.

    What has the exact GELU comes from OpenCLIP (Stable Diffusion 2) and gets its layout, with the last block that
    diffusers leaves out (see `complete_openclip`) and that is not run; quick GELU is OpenAI's CLIP.

    complete: no block is left out, as in Stable Diffusion XL.
    """
    own = read_text_sizes(config)
    if config.get("use_attention_mask"):
        raise ValueError("the text encoder has use_attention_mask true: Stable Diffusion's does not mask its padding")
    openclip = own["activation"] == OPENCLIP_SETTINGS["activation"]
    tokenizer: dict[str, Any] = {} if merges is None else {"merges": merges}
    eos = own["vocab_size"] - 1
    if pad != (0 if openclip else eos):
        tokenizer["pad"] = "eos" if pad == eos else pad
    return {
        **(OPENCLIP_SETTINGS if openclip else CLIP_SETTINGS),
        **own,
        "layers": own["layers"] + (openclip and not complete),
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def read_text_sizes(config: Mapping[str, Any]) -> Config:
    """Return the TextEncoder's arguments that CLIPTextModel's configuration has."""
    own = TEXT_DEFAULTS | {key: value for key, value in config.items() if key in TEXT_DEFAULTS}
    activations = (CLIP_SETTINGS["activation"], OPENCLIP_SETTINGS["activation"])
    known = {"hidden_act": activations, "layer_norm_eps": (1e-5,)}
    for key, values in known.items():
        if own[key] not in values:
            raise ValueError(f"the text encoder has {key} {own[key]!r}: known is {' or '.join(map(str, values))}")
    inner, usual = own["intermediate_size"], 4 * own["hidden_size"]
    return {ours: own[theirs] for ours, theirs in CLIP_KEYS.items()} | ({} if inner == usual else {"mlp_width": inner})


def vocabulary(merges: Sequence[str]) -> list[str]:
    """Return all tokens in the order of their ids: 256 bytes, the same as ends of words, merges, start, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())  # one printable character per byte, in CLIP's order
    return letters + [letter + "</w>" for letter in letters] + [m.replace(" ", "") for m in merges] + [START, END]


class TokenizerFiles(NamedTuple):
    """A tokenizer's merges (None: CLIP's own), the id of its pad token, its size, and tokens added behind, by id."""

    merges: list[str] | None
    pad: int
    size: int
    added: dict[int, str]


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a tokenizer's folder. ValueError for tokens that are not in CLIP's order (bytes, merges, start, end)."""
    ids, merges = _vocabulary_files(folder)
    expected = {name: i for i, name in enumerate(vocabulary(merges))}
    added = {i: name for name, i in ids.items() if i >= len(expected) and name not in expected}  # by textual inversion
    ids = {name: i for name, i in ids.items() if added.get(i) != name}
    strange = sorted(name for name, i in ids.items() if expected.get(name) != i)
    if strange or len(ids) != len(expected):
        named = f"{len(strange)} of its tokens are not in their place" + (": " if strange else "")
        vocabulary_is = f"the vocabulary in {str(folder)!r} is not bytes, merges, start and end in CLIP's order"
        raise ValueError(f"{vocabulary_is} ({named}{few(strange)}), so its prompts cannot be read")
    pad = END  # transformers' CLIPTokenizer's default
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / file) if (folder / file).is_file() else {}
        pad = settings.get("pad_token") or pad
    pad = pad["content"] if isinstance(pad, dict) else pad
    if pad not in ids:
        raise ValueError(f"the pad token {pad!r} in {str(folder)!r} is not in the vocabulary")
    digest = hashlib.sha256("\n".join(merges).encode()).hexdigest()
    return TokenizerFiles(None if digest == CLIP_MERGES_SHA256 else merges, ids[pad], len(expected), added)


def added_words(added: Mapping[int, str], rows: Tensor, size: int) -> dict[str, Tensor]:
    """Return the vectors (n, d) of each added word, from the rows of the token embedding behind the vocabulary.

    Textual inversion names the tokens of a word of several vectors WORD, WORD_1, WORD_2 ...
    """
    words: dict[str, list[int]] = {}
    for i, name in sorted(added.items()):
        word, _, number = name.rpartition("_")
        if word in words and words[word][-1] == i - 1 and number == str(len(words[word])):
            words[word].append(i)
        else:
            words[name] = [i]
    if added and max(added) - size >= len(rows):
        raise ValueError(f"the text encoder has no vector for the token {added[max(added)]!r} of its tokenizer")
    return {word: rows[ids[0] - size : ids[-1] - size + 1].float() for word, ids in words.items()}


def _vocabulary_files(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return (name -> id, merges "left right") from vocab.json and merges.txt, or else from tokenizer.json."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
        return read_json(folder / "vocab.json") | added, merges
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{str(folder)!r} has neither vocab.json with merges.txt nor tokenizer.json")
    content = read_json(folder / "tokenizer.json")
    try:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        return {**content["model"]["vocab"], **added}, merges
    except (KeyError, TypeError):
        raise ValueError(f"{str(folder / 'tokenizer.json')!r} holds no byte-pair vocabulary") from None
