"""Files of learned words, in their three formats; nothing in them is executed.

    diffusers   learned_embeds.safetensors or .bin: {word: vectors}
    a1111       WORD.pt of AUTOMATIC1111's web UI: {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors},
                "name": WORD, "step": ...}, or WORD.safetensors: {"emb_params": vectors}
    compvis     embeddings.pt of the textual inversion code: {"string_to_token": {word: token}, "string_to_param":
                nn.ParameterDict of {word: vectors}}, of one word or several

Vectors are (n, d), or (d) for a single one. "*" in the last two is a placeholder: the word is the file's name, as in
AUTOMATIC1111's web UI, and not the "name" inside.
"""

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoint.pickled import StoredTensor
from ldm.checkpoint.tensors import PICKLE_START, ZIP_START, check_finite, read_tensors
from ldm.checkpoint.torch_file import TorchFile
from ldm.checkpoint.writing import save_file, save_torch
from ldm.checks import check_file

WORD_FORMATS = ("diffusers", "a1111", "compvis")
ANY, ANY_TOKEN = "*", 265  # the placeholder, and its token in CLIP's vocabularies
TABLE = "string_to_param"


class LearnedWord(NamedTuple):
    """A word, its vectors (n, d) in float32 and, if known, its training steps and what it is called inside its file."""

    word: str
    vectors: Tensor
    step: int | None = None
    inside: str | None = None


def read_words(path: str | Path, word: str | None = None) -> list[LearnedWord]:
    """Read the learned words of a file in any of the formats; `word` renames a single one."""
    path = Path(path)
    try:
        named, name, step = read_table(path)
        if word is not None and len(named) > 1:
            raise ValueError(f"it holds {len(named)} words ({', '.join(named)}), which cannot all be called {word!r}")
        found = []
        for key, value in named.items():
            inside = name if key == ANY else key
            own = word if word is not None else path.stem.strip() if key == ANY else key
            other = None if unicodedata.normalize("NFC", own) == inside else inside
            found.append(LearnedWord(own, _vectors(own, value), step, other))
        return found
    except ValueError as error:
        raise ValueError(f"embedding {str(path)!r} cannot be read: {error}") from None


def split_word(text: str) -> tuple[Path, str | None]:
    """Return (file, word) of `FILE[=WORD]`; the word is None if not given. Both may contain "="."""
    heads = [text[:i] for i, letter in enumerate(text) if letter == "="]
    if Path(text).exists() or not heads:
        return Path(text), None
    head = next((head for head in heads if Path(head).is_file()), heads[0])
    return Path(head), text[len(head) + 1 :]


def read_table(path: Path) -> tuple[dict[str, Tensor], str | None, int | None]:
    """Return vectors by word, the name inside that "*" stands for, if there is one, and the step."""
    check_file(path, "embedding")
    with open(path, "rb") as opened:
        if not opened.read(len(ZIP_START)).startswith((ZIP_START, PICKLE_START)):
            return _safetensors(path)
        file = TorchFile(opened)
        top: Mapping[str, Any] = file.value if isinstance(file.value, dict) else {}
        table, name, step = top.get(TABLE, top), top.get("name"), top.get("step")
        table = table if isinstance(table, dict) else {}
        found = {key: file.tensor(value) for key, value in table.items() if isinstance(value, StoredTensor)}
    _refuse_others(found)
    name = name if TABLE in top and type(name) is str and name else None
    return found, name, step if type(step) is int else None


def _safetensors(path: Path) -> tuple[dict[str, Tensor], None, None]:
    state = read_tensors(path).state
    _refuse_others(state)
    return ({ANY: state["emb_params"]} if state.keys() == {"emb_params"} else state), None, None


def _refuse_others(found: Mapping[str, Tensor]) -> None:
    if "clip_l" in found or "clip_g" in found:
        raise ValueError("it is a word for Stable Diffusion XL, which is not supported")
    wrong = [key for key, value in found.items() if value.ndim not in (1, 2) or not value.is_floating_point()]
    if not found or wrong or any("." in key and key.endswith(("weight", "bias", "alpha")) for key in found):
        raise ValueError(f"it holds no learned words, but {', '.join(map(repr, list(found)[:3])) or 'no tensors'}")


def _vectors(word: str, value: Tensor) -> Tensor:
    vectors = torch.atleast_2d(value).float()  # (d) or (n, d) -> (n, d)
    if vectors.numel() == 0:
        raise ValueError(f"the vectors of {word!r} are empty")
    check_finite("it", {word: vectors})
    return vectors


def write_words(path: str | Path, learned: LearnedWord, format: str) -> None:
    """Write one word atomically; a1111's and diffusers' as safetensors or torch's file, by the path's suffix.

    In compvis's format the word is "*", as it would have to be a token of the vocabulary.
    """
    word, vectors = learned.word, learned.vectors.detach().cpu().clone()
    check_finite(f"what is to be written to {str(path)!r}", {word: vectors})
    safe = Path(path).suffix == ".safetensors"
    match format:
        case "diffusers":
            content = {word: vectors}
        case "a1111" if safe:
            content = {"emb_params": vectors}
        case "a1111":
            content = {"string_to_token": {ANY: ANY_TOKEN}, TABLE: {ANY: vectors}, "name": word, "step": learned.step}
        case "compvis" if not safe:
            table = nn.ParameterDict({ANY: nn.Parameter(vectors)})
            content = {"string_to_token": {ANY: torch.tensor(ANY_TOKEN)}, TABLE: table, "name": word}
        case _:
            raise ValueError(f"format {format!r} is unknown for {str(path)!r}: it is one of {', '.join(WORD_FORMATS)}")
    save_file(path, content) if safe else save_torch(path, content)
