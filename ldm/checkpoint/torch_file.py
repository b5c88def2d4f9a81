"""torch's own checkpoint files, the zip format and the one before it: what the pickle describes, and its tensors.

The file is mapped copy-on-write: a tensor takes no memory of its own until it is written to, and writing to it leaves
the file alone. Every number that the pickle or the zip file's directory gives is checked before anything is made of it.
"""

import math
import mmap
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoint.pickled import Storage, StoredTensor, read_pickle

ZIP_START = b"PK\3\4"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
MAX_NUMBER, MAX_DIMENSIONS = 2**48, 64  # of a size, stride or offset: torch calculates with 64 bits

_NUMBERS = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
_NEWER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)  # in untyped storages
DTYPES = {
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"{module}.{name}Storage": dtype for name, dtype in _NUMBERS.items() for module in ("torch", "torch.cuda")},
    **{str(dtype): dtype for dtype in _NEWER},
}


class Record(NamedTuple):
    """Where bytes lie in the file: `length` of them from `start`; inflated, `size` of them with the checksum `crc`,
    which is 0 where torch was told to leave checksums out."""

    start: int
    length: int
    size: int
    deflated: bool = False
    crc: int = 0


class TorchFile:
    """A file that torch.save wrote: `value` is what its pickle describes, and `tensor` makes a tensor of that.

    Both raise ValueError, in words that follow "cannot be read:", for what is damaged, absurd or no such file.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # What is compressed or repeats itself takes more memory than its file: so far it may go.
            self.limit = self.left = 64 * 2**20 + 50 * len(self.bytes)
            self.made: dict[str, torch.UntypedStorage] = {}
            if self.bytes[:4] == ZIP_START:
                self.records = _zip_records(file, self.bytes)
                if "byteorder" in self.records and self._read(self.records["byteorder"]) != b"little":
                    raise ValueError("it was not written on a little-endian machine")
                self.value, _ = read_pickle(BytesIO(self._read(self.records["data.pkl"])))
            else:
                self.value, self.records = _legacy_records(self.bytes)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor, on the CPU and without gradient; tensors of one storage share its memory."""
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
            raise ValueError(f"its size {size} is absurd in a file of {len(self.bytes)} bytes")
        return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)

    def _memory(self, storage: Storage) -> torch.UntypedStorage:
        """The storage's numbers, once for all its tensors: mapped if they lie in the file as they are, else read."""
        if storage.key not in self.made:
            record = self.records.get(f"data/{storage.key}")
            if record is None or record.size != storage.elements * _dtype(storage.kind).itemsize:
                found = "no record" if record is None else f"a record of {record.size} bytes, which is not its size"
                raise ValueError(f"its storage {storage.key[:99]!r} has {found}")
            if record.size == 0:
                numbers = torch.empty(0, dtype=torch.uint8)
            elif record.deflated or record.start % 8:  # torch wants numbers to lie at multiples of their size
                numbers = torch.frombuffer(bytearray(self._read(record)), dtype=torch.uint8)
            else:
                numbers = torch.frombuffer(self.bytes, dtype=torch.uint8, count=record.size, offset=record.start)
            self.made[storage.key] = numbers.untyped_storage()
        return self.made[storage.key]

    def _read(self, record: Record) -> bytes:
        """A copy of the record, inflated and held against its checksum, which mapped records, gigabytes, are not."""
        self.left -= record.size
        if self.left < 0:
            raise ValueError(f"its records inflate to absurd sizes for a file of {len(self.bytes)} bytes")
        content = self.bytes[record.start : record.start + record.length]
        if not record.deflated:
            if record.crc not in (0, zlib.crc32(content)):
                raise ValueError(f"a record of {record.size} bytes is damaged (its checksum is another)")
            return content
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # zip files leave out zlib's header
        try:
            content = inflater.decompress(content, record.size + 1)
        except zlib.error as error:
            raise ValueError(f"a compressed record is damaged ({error})") from None
        if len(content) != record.size or not inflater.eof or inflater.unused_data or zlib.crc32(content) != record.crc:
            raise ValueError(f"a compressed record is damaged (it does not inflate to its {record.size} bytes)")
        return content


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"its kind of numbers ({name!r}) is not read here")
    return DTYPES[name]


def _zip_records(file: BinaryIO, data: mmap.mmap) -> dict[str, Record]:
    """The records in torch's zip file, by their names in its one folder."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except Exception as error:  # a damaged directory breaks zipfile in any way: BadZipFile, struct.error, OSError ...
        raise ValueError(f"it is no whole zip file ({error})") from None
    names = [entry.filename for entry in listed]
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or len(set(names)) != len(names):
        some = ", ".join(repr(name[:99]) for name in names[:5])
        raise ValueError(f"it is a zip file, but not one that torch.save wrote: it holds {some or 'nothing'}")
    entries = {entry.filename.removeprefix(roots[0]): entry for entry in listed if entry.filename.startswith(roots[0])}
    if "constants.pkl" in entries:
        raise ValueError("it is a TorchScript program, not a checkpoint")
    return {name: _zip_record(entry, data) for name, entry in entries.items()}


def _zip_record(entry: zipfile.ZipInfo, data: mmap.mmap) -> Record:
    """Where the entry's bytes lie: behind a local header, whose length is in the header itself."""
    header, deflated = entry.header_offset, entry.compress_type == zipfile.ZIP_DEFLATED
    if 0 <= header <= len(data) - 30 and data[header : header + 4] == ZIP_START:
        start = header + 30 + sum(struct.unpack_from("<HH", data, header + 26))  # lengths of its name and extra field
        known = deflated or (entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size)
        if known and start + entry.compress_size <= len(data) and not entry.flag_bits & 1:  # bit 0: encrypted
            return Record(start, entry.compress_size, entry.file_size, deflated, entry.CRC)
    raise ValueError(f"its record {entry.filename[:99]!r} is damaged, or stored in a way that torch does not use")


def _legacy_records(data: mmap.mmap) -> tuple[Any, dict[str, Record]]:
    """Five pickles (magic number, version, machine, value, storage keys), then each storage: its count and numbers."""
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
        records[f"data/{key}"] = Record(start + 8, size, size)
        start += 8 + size
    if start != len(data):
        raise ValueError(f"it has {len(data)} bytes, and its storages end at {start}")
    return value, records
