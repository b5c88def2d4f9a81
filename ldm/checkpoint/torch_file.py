"""torch's own checkpoint files, the zip format and the one before it: what the pickle describes, and its tensors.

The file is mapped copy-on-write: a tensor takes no memory of its own until it is written to, and writing to it leaves
the file alone. Every number that the pickle or the zip file's directory gives is checked before anything is made of it.
"""

import math
import mmap
import struct
import zipfile
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.pickled import Inert, Storage, StoredTensor, read_pickle
from ldm.checkpoint.tensors import ZIP_START, Contents

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
MAX_NUMBER, MAX_DIMENSIONS = 2**48, 64  # of a size, stride or offset: torch calculates with 64 bits

_NUMBERS = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
}
_NEWER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)  # in untyped storages
STORAGE_DTYPES = {
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"{module}.{name}Storage": dtype for name, dtype in _NUMBERS.items() for module in ("torch", "torch.cuda")},
    **{str(dtype): dtype for dtype in _NEWER},
}


class Record(NamedTuple):
    """`size` bytes of the file: from `start`, or, where they are compressed, what the zip file's `entry` unpacks to."""

    start: int
    size: int
    entry: zipfile.ZipInfo | None = None


class TorchFile:
    """A file that torch.save wrote: `value` is what its pickle describes, and `tensor` makes a tensor of that.

    It must stay open while tensors are made.

    ValueError says that it is damaged, impossible or another kind of file, in words that follow "cannot be read:".
    """

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # What is compressed or repeats itself takes more memory than its file: this is how far it may go.
        self.limit = self.left = 64 * 2**20 + 50 * len(self.bytes)
        self.made: dict[str, torch.UntypedStorage] = {}
        if self.bytes[:4] == ZIP_START:
            self.archive, self.records = _zip_records(file, self.bytes)
            if "byteorder" in self.records and self._read(self.records["byteorder"]) != b"little":
                raise ValueError("it was not written on a little-endian machine")
            self.value, _ = read_pickle(BytesIO(self._read(self.records["data.pkl"])))
        else:
            self.value, self.records = _legacy_records(self.bytes)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Return the tensor, on the CPU and without gradient; tensors of one storage share its memory."""
        storage, offset, size, stride = stored.storage, stored.offset, stored.size, stored.stride
        if not (isinstance(storage, Storage) and type(size) is type(stride) is tuple and len(size) == len(stride)):
            raise ValueError("it has no storage, size or stride")
        numbers = (offset, *size, *stride)
        if len(size) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_NUMBER for n in numbers):
            raise ValueError("its size, stride or offset is out of range")
        dtype = _dtype(storage.kind if stored.dtype is None else stored.dtype)
        memory = self._memory(storage)
        reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        if (offset + reach) * dtype.itemsize > memory.nbytes():
            raise ValueError(f"its size {size} with stride {stride} from {offset} on reaches beyond its storage")
        if math.prod(max(n, 1) for n in size) * dtype.itemsize > self.limit:
            raise ValueError(f"its size {size} is too large for a file of {len(self.bytes)} bytes")
        return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)

    def _memory(self, storage: Storage) -> torch.UntypedStorage:
        """Return the storage's numbers, once for all its tensors: mapped if possible, else read."""
        if storage.key not in self.made:
            record = self.records.get(f"data/{storage.key}")
            if record is None or record.size != storage.elements * _dtype(storage.kind).itemsize:
                found = "no record" if record is None else f"a record of {record.size} bytes, which is not its size"
                raise ValueError(f"its storage {storage.key[:99]!r} has {found}")
            if record.size == 0:
                numbers = torch.empty(0, dtype=torch.uint8)
            elif record.entry is not None or record.start % 8:  # torch wants numbers at multiples of their size
                numbers = torch.frombuffer(bytearray(self._read(record)), dtype=torch.uint8)
            else:
                numbers = torch.frombuffer(self.bytes, dtype=torch.uint8, count=record.size, offset=record.start)
            self.made[storage.key] = numbers.untyped_storage()
        return self.made[storage.key]

    def _read(self, record: Record) -> bytes:
        """Return a copy of the record, unpacked and checked against its checksum, which mapped records are not."""
        self.left -= record.size
        if self.left < 0:
            raise ValueError(f"its records unpack to absurd sizes for a file of {len(self.bytes)} bytes")
        if record.entry is None:
            return self.bytes[record.start : record.start + record.size]
        record.entry.CRC = record.entry.CRC or None  # 0 where torch wrote no checksums; None is not checked
        try:
            with self.archive.open(record.entry) as packed:
                content = packed.read(record.size)
        except Exception as error:  # zipfile and zlib fail on damage in many ways
            raise ValueError(f"a record of {record.size} bytes is damaged ({error})") from None
        if len(content) != record.size:
            raise ValueError(f"a record of {record.size} bytes is damaged (it unpacks to {len(content)})")
        return content


def _dtype(name: str) -> torch.dtype:
    if name not in STORAGE_DTYPES:
        raise ValueError(f"its dtype ({name!r}) is not supported")
    return STORAGE_DTYPES[name]


def _zip_records(file: BinaryIO, data: mmap.mmap) -> tuple[zipfile.ZipFile, dict[str, Record]]:
    """Return torch's zip file and the records in it, by their names in its one folder."""
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged directory breaks zipfile in any way: BadZipFile, struct.error, OSError ...
        raise ValueError(f"it is not a complete zip file ({error})") from None
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or len(set(names)) != len(names):
        some = ", ".join(repr(name[:99]) for name in names[:5])
        raise ValueError(f"it is a zip file, but not one that torch.save wrote: it holds {some or 'nothing'}")
    entries = {name.removeprefix(roots[0]): archive.getinfo(name) for name in names if name.startswith(roots[0])}
    if "constants.pkl" in entries:
        raise ValueError("it is a TorchScript program, not a checkpoint")
    return archive, {name: _zip_record(name, entry, data) for name, entry in entries.items()}


def _zip_record(name: str, entry: zipfile.ZipInfo, data: mmap.mmap) -> Record:
    """Return where the entry's bytes are: behind a local header, which says how long it is itself."""
    header, stored = entry.header_offset, entry.compress_type == zipfile.ZIP_STORED
    if 0 <= header <= len(data) - 30 and data[header : header + 4] == ZIP_START:
        start = header + 30 + sum(struct.unpack_from("<HH", data, header + 26))  # lengths of its name and extra field
        known = entry.compress_size == entry.file_size if stored else entry.compress_type == zipfile.ZIP_DEFLATED
        if known and start + entry.compress_size <= len(data) and not entry.flag_bits & 1:  # bit 0: encrypted
            mapped = stored and name.startswith("data/") and start % 8 == 0
            return Record(start, entry.file_size, None if mapped else entry)
    raise ValueError(f"its record {entry.filename[:99]!r} is damaged, or stored in a way that torch does not use")


def _legacy_records(data: mmap.mmap) -> tuple[Any, dict[str, Record]]:
    """Read five pickles (magic number, version, machine, value, storage keys), then each storage: count and numbers."""
    if read_pickle(data)[0] != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one that torch.save wrote")
    read_pickle(data)
    machine, _ = read_pickle(data)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was not written on a little-endian machine")
    value, storages = read_pickle(data)
    keys, _ = read_pickle(data)
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise ValueError("its list of storages is damaged")
    records, start = {}, data.tell()
    for key in keys:
        elements = storages[key].elements
        if not 0 <= elements <= MAX_NUMBER or data[start : start + 8] != struct.pack("<q", elements):
            raise ValueError(f"its storage {key[:99]!r} is damaged or missing")
        size = elements * _dtype(storages[key].kind).itemsize
        records[f"data/{key}"] = Record(start + 8, size)
        start += 8 + size
    if start != len(data):
        raise ValueError(f"it has {len(data)} bytes, and its storages end at {start}")
    return value, records


def read_torch(opened: BinaryIO) -> Contents:
    """Return the tensors in what torch.save wrote; nothing in it is executed."""
    file = TorchFile(opened)
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
        facts = _plain(level) | facts
        return Contents(state, {name: fact for name, fact in facts.items() if isinstance(fact, str)}, facts)
    match level:
        case {"step": int(), "networks": dict(), "ema": dict()}:  # our `RunFolder.save_state`
            model = "the model is the model.safetensors that the run leaves beside it when it has finished"
            raise ValueError(f"it is the state of a training run, which --resume continues; {model}")
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
