"""Our checkpoint file: safetensors with the configuration in the header, so that the file alone rebuilds the model."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoint.tensors import read_tensors

CONFIG_KEY = "ldm.config"
DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def load_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (configuration, tensors) of a checkpoint; the tensors are mapped from the file, not copied.

    Raises FileNotFoundError when there is no such file and ValueError when it is not one of ours or is damaged.
    """
    state, metadata, _ = read_tensors(path)
    return read_config(path, metadata), state


def read_config(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in a header of ours. ValueError when there is none, or a damaged one."""
    if CONFIG_KEY not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} carries no {CONFIG_KEY!r} in its header: it was not written by ldm")
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("params", {}), dict):
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration (it is no mapping)")
    if not isinstance(config.get("target"), str | None):
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration (its target is {config['target']!r})")
    return config


def save_file(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and configuration atomically: whatever goes wrong, `path` is the old file or the whole new one.

    `dtype` converts floating-point tensors, e.g. torch.float16 to halve the file; `metadata` are further texts for the
    header. Equal contents make equal files. OSError when it cannot be written, ValueError for a dtype that safetensors
    does not have.
    """
    texts = dict(metadata or {}) | ({} if config is None else {CONFIG_KEY: json.dumps(config, sort_keys=True)})
    with atomic(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                _write(file, state, texts, dtype)
        except OSError as error:
            raise OSError(f"cannot write checkpoint {str(path)!r}: {error}") from None


def _write(file: BinaryIO, state: Mapping[str, Tensor], texts: dict[str, str], dtype: torch.dtype | None) -> None:
    """The format's 8 bytes of length, JSON header and tensors. The library would want all of them at once, converted,
    and writes the header's texts in random order; here one tensor at a time is in memory a second time."""
    dtypes = {n: dtype if dtype is not None and t.is_floating_point() else t.dtype for n, t in state.items()}
    unknown = sorted(name for name in state if dtypes[name] not in DTYPES)
    if unknown:
        raise ValueError(f"safetensors has no {dtypes[unknown[0]]}, the dtype of {unknown[0]!r}")
    header: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    end = 0
    order = sorted(state, key=lambda name: (-dtypes[name].itemsize, name))  # so that each number is aligned
    for name in order:
        start, end = end, end + state[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(state[name].shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    file.write(struct.pack("<Q", len(content)) + content)
    for name in order:
        file.write(_content(state[name].detach().to("cpu", dtypes[name])))


def _content(tensor: Tensor) -> Any:
    """The tensor's numbers as a buffer."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def file_hash(path: Path) -> str:
    """The first ten hexadecimal digits of a file's SHA-256, as A1111's users know models.

    Of a folder it is that of the files in it, in the order of their names. FileNotFoundError if there is none.
    """
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:10]


class atomic:
    """`with atomic(path) as temporary:` what is written to `temporary` becomes `path` if the block succeeds.

    IsADirectoryError, before anything is written, where `path` is a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        if self.path.is_dir():
            raise IsADirectoryError(f"{str(self.path)!r} is a folder: a file is to be written there, so name another")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._move()
        finally:
            self.temporary.unlink(missing_ok=True)

    def _move(self) -> None:
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        os.chmod(self.temporary, 0o666 & ~umask)  # safetensors makes files that only their owner may read
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())  # a rename that survives a power cut needs its data on the disk first
        os.replace(self.temporary, self.path)
