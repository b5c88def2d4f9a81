"""The checkpoint file: safetensors with the configuration in the header, so that the file alone rebuilds the model."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

CONFIG_KEY = "ldm.config"


def load_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (configuration, tensors) of a checkpoint; the tensors are mapped from the file, not copied.

    Raises FileNotFoundError when there is no such file and ValueError when it is not one of ours or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(path)!r} is not a whole safetensors file ({error})") from None
    if CONFIG_KEY not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} carries no {CONFIG_KEY!r} in its header: it was not written by ldm")
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration (it is no mapping)")
    return config, state


def save_file(
    path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write tensors and configuration atomically: whatever goes wrong, `path` is the old file or the whole new one.

    `dtype` converts floating-point tensors, e.g. torch.float16 to halve the file. OSError when it cannot be written.
    """
    path = Path(path)
    tensors = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in state.items()
    }
    # Only this key: safetensors writes several in random order, and equal models should be equal files.
    metadata = {CONFIG_KEY: json.dumps(config, sort_keys=True)}
    with atomic(path) as temporary:
        try:
            save_safetensors(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write checkpoint {str(path)!r}: {error}") from None


class atomic:
    """`with atomic(path) as temporary:` what is written to `temporary` becomes `path` if the block succeeds."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
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
