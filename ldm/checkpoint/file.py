"""Our checkpoint file: safetensors with the configuration in the header, so that the file alone rebuilds the model."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoint.tensors import SAFETENSORS_DTYPES, read_tensors

CONFIG_KEY = "ldm.config"


def load_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (configuration, tensors) of a checkpoint of ours; the tensors are mapped from the file, not copied."""
    state, metadata, _ = read_tensors(path)
    return read_config(path, metadata), state


def read_config(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration in a header of ours."""
    if CONFIG_KEY not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} carries no {CONFIG_KEY!r} in its header: it was not written by ldm")
    try:
        config = json.loads(metadata[CONFIG_KEY])
        if not isinstance(config, dict) or not isinstance(config.get("params", {}), dict):
            raise ValueError("it is not a mapping")
        if not isinstance(config.get("target"), str | None):
            raise ValueError(f"its target is {config['target']!r}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration ({error})") from None
    return config


def save_file(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and configuration atomically: whatever goes wrong, `path` is the old file or the complete new one.

    Equal contents make equal files.

    Args:
        dtype: converts floating-point tensors, e.g. torch.float16 to halve the file.
        metadata: further texts for the header.
    """
    texts = dict(metadata or {}) | ({} if config is None else {CONFIG_KEY: json.dumps(config, sort_keys=True)})
    with atomic(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                _write(file, state, texts, dtype)
        except OSError as error:
            raise OSError(f"cannot write checkpoint {str(path)!r}: {error}") from None


def _write(file: BinaryIO, state: Mapping[str, Tensor], texts: dict[str, str], dtype: torch.dtype | None) -> None:
    """Write the format's 8 bytes of length, JSON header and tensors. The library wants all of them at once, converted,
    and writes the header's texts in random order; here one tensor at a time is in memory a second time."""
    dtypes = {n: dtype if dtype is not None and t.is_floating_point() else t.dtype for n, t in state.items()}
    unknown = sorted(name for name in state if dtypes[name] not in SAFETENSORS_DTYPES)
    if unknown:
        raise ValueError(f"safetensors has no {dtypes[unknown[0]]}, the dtype of {unknown[0]!r}")
    header: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    end = 0
    order = sorted(state, key=lambda name: (-dtypes[name].itemsize, name))  # so that each number is aligned
    for name in order:
        start, end = end, end + state[name].numel() * dtypes[name].itemsize
        entry = {"dtype": SAFETENSORS_DTYPES[dtypes[name]], "shape": list(state[name].shape)}
        header[name] = entry | {"data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    file.write(struct.pack("<Q", len(content)) + content)
    for name in order:
        tensor = state[name].detach().to("cpu", dtypes[name]).contiguous()
        file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def file_hash(path: Path) -> str:
    """Return the first ten hexadecimal digits of a file's SHA-256, as A1111's users know models.

    Of a folder it is that of the files in it, in the order of their names.
    """
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:10]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """`with atomic(path) as temporary:` what is written to `temporary` becomes `path` if the block succeeds.

    IsADirectoryError, before anything is written, where `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that only their owner may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut needs its data on the disk first
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
