"""Tensors by name from a file of any kind, recognised by content, and other files named."""

import builtins
import json
import mmap
import os
import random
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path

import pickle_files
import pytest
import torch
from conftest import refused
from pickle_files import call, mapping, name, storage, tensor, write_legacy, write_zip
from safetensors.torch import save_file as save_safetensors
from torch import nn

from ldm.checkpoint.diffusers_files import read_sharded
from ldm.checkpoint.tensors import Contents, check_finite, read_tensors
from ldm.saving import vanishing


def write_packed(tensors: dict, path: Path, kind: int) -> None:
    """Write torch's file with its records compressed."""
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def state() -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.randn(3, 4),
        "model.half": torch.randn(5).half(),
        "model.brain": torch.randn(5).bfloat16(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 2),
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin", ""])
def test_content_decides_not_the_name(tmp_path, suffix):
    path, tensors = tmp_path / f"a{suffix}", state()
    save_safetensors(tensors, path, {"format": "pt", "note": "é"})
    found = read_tensors(str(path))
    assert isinstance(found, Contents) and same(found.state, tensors)
    assert found.metadata == {"format": "pt", "note": "é"} and found.facts == {}
    for zipped in (True, False):
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        found = read_tensors(path)
        assert same(found.state, tensors) and found.metadata == {} and found.facts == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_nesting_and_facts(tmp_path, zipped):
    tensors = OrderedDict(state())
    facts = {"global_step": 470_000, "epoch": 4, "version": "1.4.2", "lr": 0.5}
    extra = facts | {"callbacks": {}, "rest": [1], "on": True}

    def read(value):
        torch.save(value, tmp_path / "a", _use_new_zipfile_serialization=zipped)
        return read_tensors(tmp_path / "a")

    assert read({**extra, "state_dict": tensors}).facts == facts
    assert same(read({**extra, "state_dict": tensors}).state, tensors)
    twice = read({"epoch": 5, "state_dict": {**extra, "state_dict": tensors}})
    assert same(twice.state, tensors) and twice.facts == facts | {"epoch": 5}
    beside = read({**extra, **tensors, "optimizer": {"a": torch.ones(2)}})
    assert same(beside.state, tensors) and beside.facts == facts
    with pytest.raises(ValueError, match="holds no tensors by name, but entries such as 'state_dict'"):
        read({"state_dict": {"state_dict": {"state_dict": tensors}}})


def test_unread_tensors_are_not_missed_in_silence(tmp_path):
    quantized = call(name("torch._utils", "_rebuild_qtensor"), storage())
    write_zip(tmp_path / "a", mapping(w=tensor(), q=quantized))
    refused("its tensor 'q' is of an unsupported kind \\('torch._utils._rebuild_q", read_tensors, tmp_path / "a")
    write_zip(tmp_path / "a", mapping(w=tensor(), wrong=tensor(offset=1)))
    refused("^checkpoint '.*a' cannot be read: its tensor 'wrong' is damaged: its size ", read_tensors, tmp_path / "a")


def test_the_state_of_a_run_is_named(tmp_path):
    torch.save({"step": 5, "networks": {"a": torch.ones(2)}, "ema": {}, "optimizer_0": {}}, tmp_path / "resume.pt")
    refused("is the state of a training run, which --resume continues", read_tensors, tmp_path / "resume.pt")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (nn.Linear(2, 2), "an object of 'torch.nn.modules.linear.Linear': save its state_dict\\(\\) instead"),
        ({"model": nn.Linear(2, 2)}, "entries such as 'model'"),
        ({}, "nothing"),
        ({"state_dict": {}}, "nothing"),
        ([torch.zeros(1)], "a value of type list"),
        (torch.zeros(1), "a single tensor"),
        ({0: torch.zeros(1)}, "nothing"),
        (7, "a value of type int"),
    ],
)
def test_files_without_named_tensors(tmp_path, value, sentence):
    torch.save(value, tmp_path / "a")
    message = f"^checkpoint '.*a' cannot be read: it holds no tensors by name, but {sentence}$"
    refused(message, read_tensors, tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: the download or copy did not finish"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf<html lang=en>" + b" " * 1000, "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n", "is a git-lfs pointer"),
        (b"Entry not found", "is neither safetensors nor torch's format \\(it begins with b'Entry no'\\)"),
        (b"\0" * 100, "is neither"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "is neither"),
        (b"PK\5\6" + b"\0" * 18, "is neither"),
        (b"PK\3\4" + b"\0" * 18, "cannot be read: it is not a complete zip file"),
        (b"\x80", "cannot be read: its pickle is damaged"),
        (b"\x80\x02}.", "cannot be read: it is a pickle, but not one that torch.save wrote"),
        (b"\x10\0\0\0\0\0\0\0{}", "is not a complete safetensors file"),
        (b'{"a": [1, 2]}      ', "is neither"),
    ],
)
def test_other_files_are_named(tmp_path, content, sentence):
    (tmp_path / "a").write_bytes(content)
    refused(f"^checkpoint '{tmp_path / 'a'}' {sentence}", read_tensors, tmp_path / "a")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_failed_mapping_names_the_file(tmp_path, monkeypatch, kind):
    save_safetensors(state(), tmp_path / "a") if kind == "safetensors" else torch.save(state(), tmp_path / "a")

    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fail)
    refused("^checkpoint '.*a' cannot be read: Cannot allocate", read_tensors, tmp_path / "a", error=OSError)


def test_a_safetensors_header_that_names_a_tensor_twice(tmp_path):
    entry = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused("is not a complete safetensors file .its header has 'w' twice", read_tensors, tmp_path / "a")


def test_no_file(tmp_path):
    refused("^checkpoint '.*nowhere' does not exist$", read_tensors, tmp_path / "nowhere", error=FileNotFoundError)
    refused(f"^checkpoint '{tmp_path}' is a folder, not a file$", read_tensors, tmp_path)
    hub = "hub: nothing is downloaded here, so fetch it first .hf download runwayml/sd --local-dir FOLDER"
    refused(hub, read_tensors, "runwayml/sd", error=FileNotFoundError)


@pytest.mark.parametrize("write", [save_safetensors, torch.save, partial(write_packed, kind=zipfile.ZIP_DEFLATED)])
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path, monkeypatch, write):
    """The file is replaced as soon as it is opened, and a second opening would find the new one."""
    old, new = ({f"w{i}": torch.full((1000,), value) for i in range(3)} for value in (1.0, 2.0))
    write(old, tmp_path / "a")
    write(new, tmp_path / "b")
    opened = builtins.open

    def replacing(file, *args, **options):
        found = opened(file, *args, **options)
        os.replace(tmp_path / "b", tmp_path / "a")
        monkeypatch.setattr(builtins, "open", opened)
        return found

    monkeypatch.setattr(builtins, "open", replacing)
    assert same(read_tensors(tmp_path / "a").state, old)
    assert same(read_tensors(tmp_path / "a").state, new)


def test_damaged_safetensors(tmp_path):
    """Truncated, flipped or replaced anywhere: a sentence, or tensors."""
    save_safetensors(state(), tmp_path / "a", {"format": "pt"})
    content = (tmp_path / "a").read_bytes()
    for length in range(len(content)):
        (tmp_path / "b").write_bytes(content[:length])
        refused("^checkpoint '.*b' is (empty|neither|not a complete safetensors file)", read_tensors, tmp_path / "b")
    (tmp_path / "b").write_bytes(content + b"\0")
    refused("is not a complete safetensors file", read_tensors, tmp_path / "b")
    rng = random.Random(0)
    for _ in range(600):
        damaged, place = bytearray(content), rng.randrange(len(content))
        damaged[place] = rng.choice((damaged[place] ^ 1 << rng.randrange(8), rng.randrange(256), ord('"'), ord("9")))
        (tmp_path / "b").write_bytes(damaged)
        with suppress(ValueError):
            read_tensors(tmp_path / "b")


def header(path, **tensors) -> None:
    """A safetensors file with a header of one's own and 16 bytes of numbers."""
    text = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]},
        {"dtype": "X32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]},
    ],
)
def test_absurd_safetensors(tmp_path, entry):
    header(tmp_path / "a", w=entry)
    refused("^checkpoint '.*a' is not a complete safetensors file \\([^\n]+\\)$", read_tensors, tmp_path / "a")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    tensors, path = state(), tmp_path / f"model.{kind}.index.json"
    parts = (["model.weight", "steps"], ["model.half", "model.brain", "mask", "none"])
    shards = {f"model-{i}.{kind}": keys for i, keys in enumerate(parts, 1)}
    for shard, names in shards.items():
        part = {key: tensors[key] for key in names}
        if kind == "bin":
            torch.save(part, tmp_path / shard)
        else:
            save_safetensors(part, tmp_path / shard, {"format": "pt"})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.write_text(json.dumps(index))
    found = read_sharded(path)
    assert same(found, tensors)

    index["weight_map"]["more"] = f"model-1.{kind}"
    path.write_text(json.dumps(index))
    refused("^the shards of '.*index.json' lack 1 of its tensors \\(more\\)$", read_sharded, path)
    index["weight_map"]["more"] = f"model-3.{kind}"
    path.write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=f"'.*index.json' names the shard 'model-3.{kind}', which is missing"):
        read_sharded(path)
    for elsewhere in ("../a", str(tmp_path / f"model-1.{kind}"), "", 7):
        index["weight_map"]["more"] = elsewhere
        path.write_text(json.dumps(index))
        refused("^index '.*index.json' names ", read_sharded, path, error=(ValueError, FileNotFoundError))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 100_000]
)
def test_damaged_indices(tmp_path, content):
    (tmp_path / "a.index.json").write_text(content)
    refused("^index '.*a.index.json' is damaged, or not an index of shards", read_sharded, tmp_path / "a.index.json")
    refused("^index '.*b.index.json' does not exist$", read_sharded, tmp_path / "b.index.json", error=FileNotFoundError)


AUDITED = """
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
import encodings.cp437  # zipfile's, for names
import pickle_files
import ldm.checkpoint.torch_file
from ldm.checkpoint.tensors import read_tensors

events = set()
active = False
sys.addaudithook(lambda event, arguments: active and events.add(event))
pickle_files.register_extensions()
for path in sorted(Path(sys.argv[1]).glob("*.ckpt")):
    if path.name != "inner.ckpt":
        active = True
        with suppress(ValueError):
            assert read_tensors(path).state["w"].sum() == 15
            print("read")
        active = False
print(sorted(events), pickle_files.FIRED)
"""


def test_nothing_runs(warm_python, tmp_path):
    """Files with every payload, anywhere in them. Python itself reports what the reading process does: it opens and
    maps files, and neither imports, compiles, looks up nor starts anything."""
    pickle_files.prepare(tmp_path)
    payloads = pickle_files.payloads(tmp_path)
    for i, payload in enumerate(payloads.values()):
        write_zip(tmp_path / f"{i}.zip.ckpt", mapping(evil=payload, w=tensor()))
        write_legacy(tmp_path / f"{i}.legacy.ckpt", mapping(evil=payload, w=tensor()))
        write_legacy(tmp_path / f"{i}.before.ckpt", mapping(w=tensor()), {i % 5: payload})
    done = warm_python(AUDITED, tmp_path, cwd=tmp_path)
    *read, events = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert events == "['mmap.__new__', 'open'] []"
    refused = ["BINPERSID", "BINPERSID of a call", "PERSID", "a persistent id that is called"]
    assert len(read) == 3 * (len(payloads) - len(refused))
    assert not (tmp_path / "hit").exists()


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_number_that_is_not_finite_is_found(bad, dtype):
    weight = torch.ones(3, 5).to(dtype)
    state = {"a": weight, "none": torch.empty(0), "ids": torch.arange(3), "b": weight.clone()}
    check_finite("it", state)
    state["b"][2, 4] = bad
    refused("it holds weights that are not finite .* of b", check_finite, "it", state)


def test_numbers_that_a_dtype_cannot_hold_are_found():
    state = {"a": torch.tensor([1.0, -65519.0])}
    check_finite("it", state, torch.float16)  # which rounds it to its largest, 65504
    state["a"][1] = -65520.0
    refused("it has 6.55e.04 in a, too large for torch.float16", check_finite, "it", state, torch.float16)
    check_finite("it", state, torch.bfloat16)


def test_numbers_that_become_zero_are_noted():
    small = {"a": torch.full((100,), 1e-9), "b": torch.ones(300), "c": torch.zeros(9), "i": torch.arange(3)}
    assert vanishing(small, torch.bfloat16) == vanishing(small, None) == []
    assert "25.0% of the nonzero weights are too small for torch.float16" in vanishing(small, torch.float16)[0]
    small["a"][:96] = 0
    small["a"][96] = 1
    assert vanishing(small, torch.float16) == []  # 3 of 304
