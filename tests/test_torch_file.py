"""torch's files, zip and legacy: exact, mapped, checked to the last number, and never run."""

import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import refused
from pickle_files import mapping, name, number, row, storage, tensor, text, write_legacy, write_zip
from torch import nn

from benchmarks.common import process_memory
from ldm.checkpoint.pickled import Inert, StoredTensor
from ldm.checkpoint.torch_file import TorchFile

FORMATS = [(zipped, protocol) for zipped in (True, False) for protocol in (2, 3, 4, 5)]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64)
NEWER = (torch.uint16, torch.uint32, torch.uint64)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, dtype and shape included."""
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def tensors(path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as opened:
        file = TorchFile(opened)
        return {key: file.tensor(value) for key, value in file.value.items() if isinstance(value, StoredTensor)}


def save(value, path, zipped=True, protocol=2):
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize(("zipped", "protocol"), FORMATS)
def test_every_kind_of_tensor_comes_back(tmp_path, zipped, protocol):
    base = torch.randn(4, 6, 2)
    state = {str(dtype): (8 * base).abs().to(dtype) for dtype in FLOATS + OTHERS + NEWER}
    state |= {
        **{"scalar": torch.tensor(3.5), "scalar of a row": base[1, 2, 1]},
        **{"empty": torch.empty(0), "empty of three": torch.empty(3, 0, 2)},
        **{"transposed": base.permute(2, 0, 1), "cut": base[1:, ::2]},
        **{"expanded": torch.arange(77).expand(1, -1), "repeated": torch.ones(1).expand(5, 4)},
        "parameter": nn.Parameter(torch.randn(3)),
        "fixed": nn.Parameter(torch.randn(3), requires_grad=False),
        "grown": torch.randn(2, requires_grad=True),
    }
    state["with an attribute"] = nn.Parameter(torch.randn(2))
    state["with an attribute"].note = "a note"
    save(state, tmp_path / "a", zipped, protocol)
    found = tensors(tmp_path / "a")
    assert list(found) == list(state)
    for key, value in state.items():
        assert equal(found[key], value) and type(found[key]) is torch.Tensor and not found[key].requires_grad, key
    assert found["transposed"].stride() == state["transposed"].stride()


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (False, 2)])
def test_it_agrees_with_torch(tmp_path, zipped, protocol):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))
    save(network.state_dict(), tmp_path / "a", zipped, protocol)
    theirs = torch.load(tmp_path / "a", weights_only=True)
    ours = tensors(tmp_path / "a")
    assert list(ours) == list(theirs) and all(equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_one_storage_share_it(tmp_path, zipped):
    a = torch.zeros(3, 4)
    save({"a": a, "again": a, "row": a[1], "b": torch.zeros(3, 4)}, tmp_path / "a", zipped)
    found = tensors(tmp_path / "a")
    found["a"][1] = 7
    assert found["row"].tolist() == [7] * 4 and torch.equal(found["again"], found["a"])
    assert not found["b"].any()
    assert found["a"].untyped_storage().nbytes() == 48  # not the file, which torch.save would write again
    assert not tensors(tmp_path / "a")["a"].any()  # and none of it is in the file


def test_an_optimizer_and_a_whole_module(tmp_path):
    network = nn.Linear(3, 3)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "params": [0, 1]}]}
    for zipped in (True, False):
        save({"optimizer_states": [optimizer], "module": network}, tmp_path / "a", zipped)
        with open(tmp_path / "a", "rb") as opened:
            file = TorchFile(opened)
        assert file.value["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3
        assert file.value["module"] == Inert("torch.nn.modules.linear.Linear")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_zip_file_is_mapped(tmp_path):
    """40 MB take no private memory to load or to read, and what is written to takes its own pages alone."""
    size = 10_000_000
    torch.save({"a": torch.ones(size), "b": torch.ones(10)}, tmp_path / "a")
    tensors(tmp_path / "a")  # whatever the first use of anything allocates
    before = process_memory()["Anonymous"]
    found = tensors(tmp_path / "a")
    assert found["a"].sum() == size
    assert process_memory()["Anonymous"] - before < 1e6
    found["a"][: size // 4] = 2
    assert process_memory()["Anonymous"] - before == pytest.approx(size, rel=0.2)
    assert tensors(tmp_path / "a")["a"].sum() == size


def test_compressed_and_repacked_files(tmp_path):
    """By ordinary zip tools, which compress, and put stored records wherever they come to lie."""
    state = {"a": torch.randn(50, 50), "b": torch.arange(7), "c": torch.zeros(100_000)}
    torch.save(state, tmp_path / "a")
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a") as old, zipfile.ZipFile(tmp_path / "b", "w", kind) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
        found = tensors(tmp_path / "b")
        assert all(equal(found[key], state[key]) for key in state)
    with zipfile.ZipFile(tmp_path / "a") as old, zipfile.ZipFile(tmp_path / "b", "w", zipfile.ZIP_BZIP2) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused("its record '\\w+/[\\w.]+' is damaged, or stored in a way that torch", tensors, tmp_path / "b")


def test_files_without_checksums(tmp_path):
    """torch can leave them out; they are not needed, only the records' places."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a")
    finally:
        torch.serialization.set_crc32_options(before)
    assert tensors(tmp_path / "a")["a"].tolist() == [1, 1, 1]


def test_crafted_files_are_sound(tmp_path):
    """What the tests below damage, undamaged."""
    expected = torch.arange(6.0).view(2, 3)
    write_zip(tmp_path / "a", mapping(w=tensor()))
    write_legacy(tmp_path / "b", mapping(w=tensor()))
    write_zip(tmp_path / "c", mapping(w=tensor()), zipfile.ZIP_DEFLATED)
    for path in "abc":
        assert torch.equal(tensors(tmp_path / path)["w"], expected)
    assert torch.equal(torch.load(tmp_path / "a", weights_only=True)["w"], expected)


HUGE = 2**62
BAD_TENSORS = {
    "one too many": tensor(size=(7,), stride=(1,)),
    "an offset": tensor(offset=1),
    "an offset to the end": tensor(offset=6, size=(), stride=()),
    "an offset behind the end": tensor(offset=7, size=(0,), stride=(1,)),
    "a negative offset": tensor(offset=-1),
    "a negative size": tensor(size=(-1, 3)),
    "two negative sizes": tensor(size=(-2, -3)),
    "a negative stride": tensor(offset=5, size=(2,), stride=(-1,)),
    "a stride": tensor(stride=(4, 1)),
    "a huge stride": tensor(stride=(HUGE, 1)),
    "a huge size": tensor(size=(HUGE, HUGE)),
    "a size that wraps around": tensor(size=(2**32, 2**32), stride=(0, 0)),
    "a huge offset": tensor(offset=2**64),
    "an absurd expansion": tensor(size=(2**40,), stride=(0,)),
    "an absurd expansion of nothing": tensor(size=(0, 2**40), stride=(0, 0)),
    "fewer strides than sizes": tensor(stride=(1,)),
    "too many dimensions": tensor(size=(1,) * 70, stride=(1,) * 70),
    "a size that is not a tuple": tensor().replace(row(2, 3), b"N"),
    "a size of texts": tensor().replace(row(2, 3), b"(" + text("2") + text("3") + b"t"),
    "a size of fractions": tensor().replace(row(2, 3), b"(G" + struct.pack(">d", 2.0) + number(3) + b"t"),
    "a size of truths": tensor().replace(row(2, 3), b"(\x88\x88t"),
    "no storage": tensor(b"N"),
    "a storage's class": tensor(name("torch", "FloatStorage")),
    "a tensor for a storage": tensor(tensor()),
    "another record": tensor(storage(key="1")),
    "a record outside": tensor(storage(key="../data.pkl")),
    "more numbers than the record": tensor(storage(elements=7)),
    "fewer numbers than the record": tensor(storage(elements=5)),
    "negative numbers": tensor(storage(elements=-6)),
    "a huge number of numbers": tensor(storage(elements=2**64 + 6)),
    "a number beyond all bounds": tensor(
        storage(elements=1).replace(number(1), b"\x8b\xff\xff\0\0" + b"\x7f" * 65_535)
    ),
    "wider numbers": tensor(storage(kind="DoubleStorage")),
    "narrower numbers": tensor(storage(kind="HalfStorage")),
    "quantized numbers": tensor(storage(kind="QInt8Storage")),
    "no kind of numbers": tensor(storage(kind="system", module="os")),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_every_number_is_checked(tmp_path, bad, write):
    refused("^(its|it) [^\n]{10,400}$", tensors, write(tmp_path / "a", mapping(w=BAD_TENSORS[bad])))


def test_what_is_checked_last_is_allowed(tmp_path):
    """The largest that fits, as a control for the refusals above."""
    good = {
        "all": tensor(size=(6,), stride=(1,)),
        "last": tensor(offset=5, size=(), stride=()),
        "nothing": tensor(offset=6, size=(0,), stride=(1,)),
        "overlapping": tensor(size=(4, 3), stride=(1, 1)),
        "expanded": tensor(size=(1000,), stride=(0,)),
        "any stride of one": tensor(size=(1, 6), stride=(12345, 1)),
    }
    for write in (write_zip, write_legacy):
        found = tensors(write(tmp_path / "a", mapping(**good)))
        assert found["all"].tolist() == [0, 1, 2, 3, 4, 5] and found["last"] == 5 and found["nothing"].shape == (0,)
        assert found["overlapping"][3].tolist() == [3, 4, 5]
        assert found["expanded"].sum() == 0 and found["any stride of one"].tolist() == [[0, 1, 2, 3, 4, 5]]


def patched(path: Path, signature: bytes, offset: int, form: str, value: int, which: int = 0) -> None:
    """Overwrite a field of the `which`-th zip header with that signature."""
    content = bytearray(path.read_bytes())
    at = -1
    for _ in range(which + 1):
        at = content.index(signature, at + 1)
    struct.pack_into(form, content, at + offset, value)
    path.write_bytes(content)


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
BAD_FIELDS = {  # signature, offset in the header, form, value, which header: 1 is that of the record data/0
    "stored size": (CENTRAL, 20, "<I", 2**31, 1),
    "stored size, one less": (CENTRAL, 20, "<I", 23, 1),
    "full size": (CENTRAL, 24, "<I", 2**31, 1),
    "full size, one more": (CENTRAL, 24, "<I", 25, 1),
    "header's place": (CENTRAL, 42, "<I", 1, 1),
    "header's place behind the end": (CENTRAL, 42, "<I", 2**31, 1),
    "method": (CENTRAL, 10, "<H", 12, 1),
    "encryption": (CENTRAL, 8, "<H", 1, 1),
    "needed version": (CENTRAL, 6, "<H", 99, 1),
    "name's length": (LOCAL, 26, "<H", 60_000, 1),
    "extra field's length": (LOCAL, 28, "<H", 60_000, 1),
    "local signature": (LOCAL, 0, "<I", 0, 1),
    "directory's place": (END, 16, "<I", 2**31, 0),
    "directory's size": (END, 12, "<I", 2**31, 0),
    "the pickle's size": (CENTRAL, 24, "<I", 2**31, 0),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_entries_with_wrong_numbers(tmp_path, field, compression):
    write_zip(tmp_path / "a", mapping(w=tensor()), compression)
    patched(tmp_path / "a", *BAD_FIELDS[field])
    if field == "stored size, one less" and compression == zipfile.ZIP_DEFLATED:  # the last byte holds no numbers
        assert torch.equal(tensors(tmp_path / "a")["w"], torch.arange(6.0).view(2, 3))
        return
    refused("^(its|it|a) [^\n]{10,400}$", tensors, tmp_path / "a")


def test_compression_bombs(tmp_path):
    """Files that would inflate to 900 times their size: as one record, as the pickle, and as many records."""
    zeros = bytes(80 * 2**20)
    value = mapping(w=tensor(storage(elements=len(zeros) // 4), size=(1,), stride=(1,)))
    write_zip(tmp_path / "a", value, zipfile.ZIP_DEFLATED, data_0=zeros)
    refused("unpack to absurd sizes for a file of \\d{5} bytes", tensors, tmp_path / "a")
    write_zip(tmp_path / "b", b"N", zipfile.ZIP_DEFLATED, **{"data.pkl": zeros})
    refused("unpack to absurd sizes", tensors, tmp_path / "b")
    names = [str(i) for i in range(90)]
    each = {key: tensor(storage(key, 2**18), size=(1,), stride=(1,)) for key in names}
    write_zip(tmp_path / "c", mapping(**each), zipfile.ZIP_DEFLATED, **{f"data_{key}": zeros[: 2**20] for key in names})
    refused("unpack to absurd sizes", tensors, tmp_path / "c")


def test_other_zip_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("model.ckpt", "x")
        archive.writestr("readme.txt", "x")
    refused("but not one that torch.save wrote: it holds 'model.ckpt', 'readme.txt'", tensors, tmp_path / "a")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "b")
    refused("it is a TorchScript program", tensors, tmp_path / "b")
    write_zip(tmp_path / "c", mapping(w=tensor()), byteorder=b"big")
    refused("not written on a little-endian machine", tensors, tmp_path / "c")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "d", "w") as archive:
        for _ in range(2):
            archive.writestr("archive/data.pkl", pickle.dumps({}))
    refused("not one that torch.save wrote", tensors, tmp_path / "d")


def test_other_pickles(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"w": 1}))
    refused("it is a pickle, but not one that torch.save wrote", tensors, tmp_path / "a")
    write_legacy(tmp_path / "b", mapping(w=tensor()))
    content = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(content.replace(b"little_endian", b"little_endiam"))
    refused("not written on a little-endian machine", tensors, tmp_path / "b")
    for damaged in (content[:-1], content[:-24], content + b"\0"):  # the numbers behind the pickles
        (tmp_path / "b").write_bytes(damaged)
        refused(f"it has {len(damaged)} bytes, and its storages end at {len(content)}", tensors, tmp_path / "b")
    (tmp_path / "b").write_bytes(content[:-26])
    refused("its storage '0' is damaged or missing", tensors, tmp_path / "b")


def samples(folder: Path) -> dict[str, bytes]:
    """Small complete files of every kind, as bytes."""
    state = {"state_dict": OrderedDict(a=torch.randn(2, 3), b=torch.zeros(0), c=torch.tensor(1)), "global_step": 3}
    found = {}
    for zipped, protocol in ((True, 2), (True, 4), (False, 2), (False, 4)):
        save(state, folder / "sample", zipped, protocol)
        found[f"{'zip' if zipped else 'legacy'} {protocol}"] = (folder / "sample").read_bytes()
    found["deflated"] = write_zip(folder / "sample", mapping(w=tensor()), zipfile.ZIP_DEFLATED).read_bytes()
    return found


def everything(path: Path) -> None:
    """Read all of a file, in the way that a caller would."""
    with open(path, "rb") as opened:
        file = TorchFile(opened)
        level = file.value.get("state_dict", file.value) if isinstance(file.value, dict) else {}
        for value in level.values() if isinstance(level, dict) else ():
            if isinstance(value, StoredTensor):
                file.tensor(value).clone()


def test_truncated_anywhere(tmp_path):
    for kind, content in samples(tmp_path).items():
        for length in [*range(1, len(content) - 1, max(1, len(content) // 100)), len(content) - 1]:
            (tmp_path / "a").write_bytes(content[:length])
            with pytest.raises(ValueError, match="^(its|it|a) [^\n]{10,400}$"):
                everything(tmp_path / "a")
                pytest.fail(f"{kind} of {length} bytes was read")


def test_damaged_anywhere(tmp_path):
    """Bits flipped, runs of bytes removed, repeated or replaced: read (where unused, or in a number), or ValueError."""
    rng = random.Random(0)
    for content in samples(tmp_path).values():
        damaged = []
        places = [i for i in range(len(content)) if content[i]]  # zeros are padding, mostly
        for place in places[:: max(1, len(places) // 150)] + rng.choices(range(len(content)), k=50):
            damaged.append(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        for _ in range(120):
            start, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64))
            filler = rng.choice((b"", rng.randbytes(length), b"\xff" * length, content[start : start + length] * 2))
            damaged.append(content[:start] + filler + content[start + length :] or b"x")
        for file in damaged:
            (tmp_path / "a").write_bytes(file)
            with suppress(ValueError):
                everything(tmp_path / "a")


def test_a_flip_in_the_pickle_is_told(tmp_path):
    """Names, sizes and strides have a checksum beside them, unlike the numbers, which stay mapped."""
    torch.save({"a": torch.ones(4, 4), "b": torch.zeros(4, 4)}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        size = len(archive.read("a/data.pkl"))
    start = content.index(b"\x80\x02")
    for place in range(start, start + size):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(damaged)
        message = f"^a record of {size} bytes is damaged \\(Bad CRC-32 for file 'a/data.pkl'\\)$"
        refused(message, tensors, tmp_path / "b")
