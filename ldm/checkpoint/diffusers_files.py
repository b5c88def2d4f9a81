"""The files of a diffusers folder: JSON, weights in their variants and shards, and writing a folder as a whole."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.file import atomic
from ldm.checkpoint.tensors import read_sharded, read_tensors

WEIGHTS = {  # how the names of files begin and end, the preferred first
    "unet": (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
    "vae": (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
    "text_encoder": (("model", "safetensors"), ("pytorch_model", "bin")),
}
WRITER = {"_written_by": "ldm"}  # our mark in model_index.json; diffusers skips what begins with an underscore


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. FileNotFoundError, or ValueError when it is anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: it is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object")
    return found


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    """OSError when it cannot be written."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """UTF-8 with "\\n" at the ends of lines, on every system. OSError when it cannot be written."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode())


def read_weights(folder: Path, part: str, variant: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The weights of a part's folder, from one file or from shards, mapped; and of which variant they are.

    variant: as in `read_folder`. Raises FileNotFoundError when there are none or a shard is missing.
    """
    file = _find(folder, part, variant)
    if file is None and variant is None:
        others = _variants(folder, part)
        if len(others) > 1:
            raise FileNotFoundError(f"{str(folder)!r} has its weights in the variants {', '.join(others)}: name one")
        variant = others[0] if others else None
    elif file is None:
        variant = None
    file = _find(folder, part, variant) if file is None else file
    if file is None:
        raise FileNotFoundError(f"{str(folder)!r} holds no weights ({' or '.join(map('.'.join, WEIGHTS[part]))})")
    return (read_sharded(file) if file.suffix == ".json" else read_tensors(file)).state, variant


def _find(folder: Path, part: str, variant: str | None) -> Path | None:
    mark = "" if variant is None else f".{variant}"
    for beginning, ending in WEIGHTS[part]:
        index = f"{beginning}.{ending}"
        # versions differ in where the variant of an index stands
        for name in (f"{beginning}{mark}.{ending}", f"{index}.index{mark}.json", f"{index}{mark}.index.json"):
            if (folder / name).is_file():
                return folder / name
    return None


def _variants(folder: Path, part: str) -> list[str]:
    pattern = "|".join(
        rf"{a}\.(\w+)\.{b}|{a}\.{b}\.index\.(\w+)\.json|{a}\.{b}\.(\w+)\.index\.json" for a, b in WEIGHTS[part]
    )
    matches = [match for name in os.listdir(folder) if (match := re.fullmatch(pattern, name))]
    return sorted({next(filter(None, match.groups())) for match in matches})


@contextmanager
def whole_folder(path: Path, files: Set[str]) -> Iterator[Path]:
    """`with whole_folder(path, files) as temporary:` what is written there becomes `path` if the block succeeds.

    files: the relative paths of all that is written. A folder that is there already is replaced only if it is empty, or
    bears our mark and holds none but these files: a ValueError otherwise, so that nothing is lost.
    """
    path = Path(os.path.abspath(path))
    _check_replaceable(path, files)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(path: Path, files: Set[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file: a folder is to be written there, so name another")
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    index = path / "model_index.json"
    ours = index.is_file() and read_json(index).items() >= WRITER.items()
    if found and not (ours and found <= files):
        strange = sorted(found - files if ours else found)
        raise ValueError(
            f"folder {str(path)!r} already holds {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}, which "
            "would be lost: name another folder, or empty this one"
        )


def _rename(temporary: Path, path: Path) -> None:
    """Put the complete folder in its place, in two steps: none replaces a folder that is not empty in one."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
