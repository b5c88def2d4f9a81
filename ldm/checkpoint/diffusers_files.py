"""The files of a diffusers folder: JSON, and weights in their variants and shards."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.checkpoint.tensors import State, read_tensors
from ldm.checks import check_file, few

_WEIGHTS = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))
WEIGHT_FILES = {  # how the names of files begin and end, the preferred first
    "unet": _WEIGHTS,
    "vae": _WEIGHTS,
    "text_encoder": (("model", "safetensors"), ("pytorch_model", "bin")),
}


@contextmanager
def unchanged(folder: Path, *parts: Path) -> Iterator[None]:
    """Raise ValueError if a file in the folder, or in one of its parts, was replaced by the end of the block."""
    before = _stamps(folder, *parts)
    yield
    if _stamps(folder, *parts) != before:
        raise ValueError(f"folder {str(folder)!r} was changed while it was read: load it again")


def _stamps(*folders: Path) -> dict[Path, tuple[int, int, int]]:
    found = {path: path.stat() for folder in folders for path in folder.iterdir() if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; ValueError when it is anything else."""
    check_file(path, "file")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: it is not a JSON object")
    return found


def read_weights(folder: Path, part: str, variant: str | None) -> tuple[State, str | None]:
    """Return the weights of a part's folder, mapped, and of which variant they are; see `read_pipeline`."""
    found: dict[str | None, Path] = {}  # variant -> its file, the preferred one last
    for a, b in reversed(WEIGHT_FILES[part]):
        # versions differ in where the variant of an index stands
        pattern = rf"{a}(?:\.(\w+))?\.{b}|{a}\.{b}\.index(?:\.(\w+))?\.json|{a}\.{b}(?:\.(\w+))?\.index\.json"
        for name in sorted(os.listdir(folder), reverse=True):
            if match := re.fullmatch(pattern, name):
                found[next(filter(None, match.groups()), None)] = folder / name
    if variant is None and None not in found and len(found) > 1:
        raise FileNotFoundError(f"{str(folder)!r} has its weights in the variants {', '.join(sorted(found))}: name one")
    if variant not in found:
        variant = next(iter(found), None) if variant is None else None
    if variant not in found:
        names = " or ".join(map(".".join, WEIGHT_FILES[part]))
        raise FileNotFoundError(f"{str(folder)!r} holds no weights ({names})")
    file = found[variant]
    return read_sharded(file) if file.suffix == ".json" else read_tensors(file).state, variant


def read_sharded(path: str | Path) -> State:
    """Read all shards that an index names: `model.safetensors.index.json`, `pytorch_model.bin.index.json`."""
    path = Path(path)
    check_file(path, "index")
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
        raise ValueError(f"the shards of {str(path)!r} lack {len(missing)} of its tensors ({few(missing)})")
    return state
