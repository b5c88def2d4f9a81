"""Tensors by name out of a file of any kind, recognised by its content: safetensors, or what torch.save wrote."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

State = dict[str, Tensor]

ZIP_START = b"PK\3\4"
PICKLE_START = b"\x80"  # PROTO, in every protocol that torch.save can use


class Contents(NamedTuple):
    """What a file holds: tensors by name, a safetensors header's texts, and the plain values beside the tensors."""

    state: State
    metadata: dict[str, str]
    facts: dict[str, int | float | str]


def read_tensors(path: str | Path) -> Contents:
    """Read a checkpoint without executing anything in it. The tensors are mapped: they take memory once written to.

    In torch's files the tensors may be the file itself or lie under "state_dict", once or twice; of what else lies
    there, `facts` keeps the numbers and texts (`global_step`, `epoch`).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} is a folder, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    with open(path, "rb") as file:
        start = file.read(512)
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack_from("<Q", start)[0] < 2**40:  # a length, then JSON
        return _read_safetensors(path)
    if start.startswith((ZIP_START, PICKLE_START)):
        try:
            return _read_torch(path)
        except ValueError as error:
            raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}") from None
    raise ValueError(f"checkpoint {str(path)!r} {_what_it_is(start)}")


def read_sharded(path: str | Path) -> State:
    """Read all shards that an index names: `model.safetensors.index.json`, `pytorch_model.bin.index.json`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"index {str(path)!r} does not exist")
    try:
        shards = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"index {str(path)!r} is damaged, or not an index of shards ({error})") from None
    state: State = {}
    for shard in sorted(set(map(str, shards.values()))):
        if not shard or Path(shard).name != shard:
            raise ValueError(f"index {str(path)!r} names {shard!r}, which is not a file beside it")
        if not path.with_name(shard).is_file():
            raise FileNotFoundError(f"index {str(path)!r} names the shard {shard!r}, which is missing")
        state |= read_tensors(path.with_name(shard)).state
    missing = sorted(shards.keys() - state.keys())
    if missing:
        raise ValueError(f"the shards of {str(path)!r} lack {len(missing)} of its tensors ({', '.join(missing[:5])})")
    return state


def _what_it_is(start: bytes) -> str:
    """Return, for a file of neither format, what it is instead."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "is empty: the download or copy did not finish"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, saved in place of the file it leads to: download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, which stands for the file: fetch the file itself with `git lfs pull`"
    return f"is neither safetensors nor torch's format (it begins with {start[:8]!r})"


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r} is not a complete safetensors file ({error})") from None
    return Contents(state, metadata, {})


def _read_torch(path: Path) -> Contents:
    from ldm.checkpoint.pickled import Inert, StoredTensor
    from ldm.checkpoint.torch_file import TorchFile

    file = TorchFile(path)
    level, facts = file.value, {}
    for _ in range(2):
        if isinstance(level, dict) and isinstance(level.get("state_dict"), dict):
            facts = _plain(level) | facts
            level = level["state_dict"]
    state = {}
    for name, value in level.items() if isinstance(level, dict) else ():
        if isinstance(value, Inert) and value.maker.startswith("torch._utils._rebuild"):
            raise ValueError(f"its tensor {name!r} is of an unsupported kind ({value.maker!r})")
        if isinstance(value, StoredTensor):
            try:
                state[name] = file.tensor(value)
            except ValueError as error:
                raise ValueError(f"its tensor {name!r} is damaged: {error}") from None
    if state:
        return Contents(state, {}, _plain(level) | facts)
    match level:
        case Inert(maker):
            found = f"an object of {maker!r}: save its state_dict() instead"
        case dict():
            found = f"entries such as {', '.join(repr(name[:99]) for name in list(level)[:5])}" if level else "nothing"
        case StoredTensor():
            found = "a single tensor"
        case _:
            found = f"a value of type {type(level).__name__}"
    raise ValueError(f"it holds no tensors by name, but {found}")


def _plain(level: dict[str, Any]) -> dict[str, int | float | str]:
    return {name: value for name, value in level.items() if type(value) in (int, float, str)}
