"""Write checkpoints: safetensors with our configuration in the header, or torch's format."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoint.atomic import atomic
from ldm.checkpoint.file import CONFIG_KEY
from ldm.checkpoint.tensors import SAFETENSORS_DTYPES, check_finite

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


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
            write_tensors(file, state, texts, dtypes)


def write_tensors(
    file: BinaryIO, state: Mapping[str, Tensor], texts: dict[str, str], dtypes: dict[str, torch.dtype]
) -> None:
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
    with atomic(path, bytes_of(content)) as temporary:
        try:
            with open(temporary, "wb") as temporary_file:
                torch.save(content, temporary_file)
        except RuntimeError as error:  # for a full disk "unexpected pos 64 vs 0", after Python's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def bytes_of(content: Any) -> int:
    """Return how many bytes the tensors have in nested mappings and sequences."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    values = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return sum(map(bytes_of, values))
