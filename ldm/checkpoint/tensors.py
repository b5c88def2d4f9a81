"""Tensors by name out of a file of any kind, recognised by its content: safetensors, or what torch.save wrote."""

import json
import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ldm.checks import as_path, check_file

State = dict[str, Tensor]

ZIP_START = b"PK\3\4"
PICKLE_START = b"\x80"  # PROTO, in every protocol that torch.save can use
MAX_HEADER = 100_000_000  # bytes of a safetensors header, which its own library limits so
SAFETENSORS_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


class Contents(NamedTuple):
    """What a file holds: tensors by name, the texts of a safetensors header or beside the tensors, and all plain values
    beside the tensors."""

    state: State
    metadata: dict[str, str]
    facts: dict[str, int | float | str]


def read_tensors(path: str | Path) -> Contents:
    """Read a checkpoint without executing anything in it. The tensors are mapped: they take memory once written to.

    The file is opened once, so that what takes its place in the meantime is not mixed with it. In torch's files the
    tensors may be the file itself or lie under "state_dict", once or twice; of what else lies there, `facts` keeps the
    numbers and texts (`global_step`, `epoch`).
    """
    path = as_path("checkpoint", path)
    check_file(path, "checkpoint")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            if len(start) > 8 and start[8:9] == b"{" and struct.unpack_from("<Q", start)[0] < 2**40:  # a length, JSON
                try:
                    return _read_safetensors(file)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"checkpoint {str(path)!r} is not a complete safetensors file ({error})") from None
            if start.startswith((ZIP_START, PICKLE_START)):
                try:
                    from ldm.checkpoint.torch_file import read_torch

                    return read_torch(file)
                except ValueError as error:
                    raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}") from None
    except OSError as error:  # mapping it names no file
        raise type(error)(f"checkpoint {str(path)!r} cannot be read: {error.strerror or error}") from None
    from ldm.checkpoint.foreign import what_it_is

    raise ValueError(f"checkpoint {str(path)!r} {what_it_is(start)}")


def check_finite(what: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError if a weight is NaN or infinite, or becomes so in `dtype`. what: begins the message.

    Every file of weights is checked when it is loaded and when it is written, because what is not finite shows late and
    elsewhere: in images, after training, or in files that were made of it. A tensor's smallest and largest number are
    finite if all are, and cost one pass: 0.04 s/GiB in float32 and 0.06 in float16 on one core, where isfinite takes 2.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        wide = tensor if tensor.itemsize > 1 else tensor.half()  # torch has no aminmax in 8 bits
        limits = torch.stack(torch.aminmax(wide.detach()))
        if not all(map(math.isfinite, limits.tolist())):
            raise ValueError(f"{what} holds weights that are not finite (NaN or infinity), such as those of {name}")
        if dtype is not None and not limits.to(dtype).isfinite().all():
            largest = limits.abs().max().item()
            raise ValueError(
                f"{what} has {largest:.3g} in {name}, too large for {dtype}: use another dtype, such as bf16"
            )


def _read_safetensors(file: BinaryIO) -> Contents:
    """Map the tensors that the header describes: 8 bytes of length, JSON, and the tensors without a gap.

    The library opens the file a second time for the tensors, which may be another file by then.
    """
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    begin = 8 + struct.unpack_from("<Q", data)[0]
    if begin > min(len(data), MAX_HEADER):
        raise ValueError(f"its header ends at byte {begin}, and the file at {len(data)}")
    header = json.loads(data[8:begin], object_pairs_hook=_once)
    metadata = header.pop("__metadata__", None) or {}
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise ValueError("its metadata are not texts")
    state, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (start, end) = _described(name, entry)
        spans.append((start, end))
        if end > len(data) - begin:
            raise ValueError(f"its tensor {name!r} ends at byte {begin + end}, and the file at {len(data)}")
        if (begin + start) % dtype.itemsize:  # torch wants numbers at multiples of their size
            numbers = torch.frombuffer(bytearray(data[begin + start : begin + end]), dtype=dtype)
        elif start < end:
            numbers = torch.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=begin + start)
        else:
            numbers = torch.empty(0, dtype=dtype)
        state[name] = numbers.reshape(shape)
    ends = [0, *(end for _, end in sorted(spans))]
    if [start for start, _ in sorted(spans)] != ends[:-1] or begin + ends[-1] != len(data):
        raise ValueError("its tensors do not fill the file without gaps")
    return Contents(state, metadata, {})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which Python would keep the last of equal names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"its header has {Counter(name for name, _ in pairs).most_common(1)[0][0][:99]!r} twice")
    return found


def _described(name: str, entry: Any) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    """Return a tensor's dtype, shape, first byte and end after its entry in a safetensors header."""
    match entry:
        case {"dtype": str(kind), "shape": list(shape), "data_offsets": [int(start), int(end)]} if kind in _DTYPES:
            valid = all(type(size) is int and size >= 0 for size in shape) and 0 <= start <= end
            if valid and len(shape) <= 64 and end - start == math.prod(shape) * _DTYPES[kind].itemsize:
                return _DTYPES[kind], shape, (start, end)
    raise ValueError(f"its tensor {name[:99]!r} is described as {str(entry)[:99]}")
