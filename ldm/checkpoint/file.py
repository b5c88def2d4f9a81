"""Our checkpoint file: safetensors with the configuration in the header, so that the file alone rebuilds the model."""

import errno
import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoint.atomic import atomic
from ldm.checkpoint.networks import check_targets
from ldm.checkpoint.tensors import SAFETENSORS_DTYPES, check_finite, read_tensors
from ldm.checks import check_file

CONFIG_KEY = "ldm.config"
STEP_KEY = "ldm.step"  # of a run's checkpoints: how many steps they were trained
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def load_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (configuration, tensors) of a checkpoint of ours; the tensors are mapped from the file, not copied.

    path: a file, or the folder of a run, whose newest checkpoint is meant.
    """
    path = checkpoint_at(path)
    state, metadata, _ = read_tensors(path)
    check_finite(f"checkpoint {str(path)!r}", state)
    return read_config(path, metadata), state


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in a run's folder that was trained longest: its result, or a `model-STEP.safetensors`."""
    kept = [path for path in folder.glob("model-*.safetensors") if re.fullmatch(r"model-\d+", path.stem)]
    newest = max(kept, key=lambda path: int(path.stem[6:]), default=None)
    result = folder / "model.safetensors"
    if newest is None or not result.is_file():
        return result if result.is_file() else newest
    steps = int(read_tensors(result).metadata.get(STEP_KEY, 2**63))  # more than any other, if it does not say
    return result if steps >= int(newest.stem[6:]) else newest


def checkpoint_at(path: str | Path) -> Path:
    """Return the path of a checkpoint: of a run's folder the newest one in it, of anything else the path itself."""
    path = Path(path)
    if not (path / "config.yaml").is_file() or (path / "model_index.json").exists():  # the latter: diffusers'
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise FileNotFoundError(
            f"the run in {str(path)!r} has no checkpoint yet: finish it with --resume, or resume it with "
            "loop.keep_every=N, which keeps one every N steps"
        )
    return newest


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
        check_targets(config)
        if "target" in config:
            config.setdefault("params", {})
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

    Equal contents make equal files. ValueError where a weight is not finite, or too large for `dtype`. A model whose
    path ends in .ckpt, .pt, .pth or .bin is written in torch's format, as {"state_dict": tensors} beside the texts,
    which `torch.load(path, weights_only=True)` reads.

    Args:
        dtype: converts floating-point tensors, e.g. torch.float16 to halve the file.
        metadata: further texts for the header.
    """
    check_finite(f"what is to be written to {str(path)!r}", state, dtype)
    texts = dict(metadata or {}) | ({} if config is None else {CONFIG_KEY: json.dumps(config, sort_keys=True)})
    dtypes = {n: dtype if dtype is not None and t.is_floating_point() else t.dtype for n, t in state.items()}
    if Path(path).suffix.lower() in TORCH_SUFFIXES:
        if config is None:
            raise ValueError(f"{str(path)!r} has the name of torch's format, and safetensors is written: end it so")
        tensors = {name: t.detach().to("cpu", dtypes[name]).contiguous() for name, t in state.items()}
        return save_torch(path, {"state_dict": tensors, **texts})
    with atomic(path, sum(t.numel() * dtypes[n].itemsize for n, t in state.items())) as temporary:
        with open(temporary, "wb") as file:
            _write(file, state, texts, dtypes)


def _write(file: BinaryIO, state: Mapping[str, Tensor], texts: dict[str, str], dtypes: dict[str, torch.dtype]) -> None:
    """Write the format's 8 bytes of length, JSON header and tensors. The library wants all of them at once, converted,
    and writes the header's texts in random order; here one tensor at a time is in memory a second time."""
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


def save_torch(path: str | Path, content: Any) -> None:
    """Write what `torch.save` takes, atomically."""
    with atomic(path, _bytes(content)) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError:  # torch's for a full disk, which says "unexpected pos 64 vs 0"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _bytes(content: Any) -> int:
    """Return how many bytes the tensors have in nested mappings and sequences."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    values = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return sum(map(_bytes, values))


def file_hash(path: Path) -> str:
    """Return the first ten hexadecimal digits of a file's SHA-256, as A1111's users know models.

    Of a folder it is that of the files in it, in the order of their names.
    """
    digest = hashlib.sha256()
    if not path.is_dir():
        check_file(path, "file")
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:10]
