"""A pickle is read as a tree of plain values, whatever it asks for, and never run."""

import argparse
import io
import os
import pathlib
import pickle
import pickletools
import random
import struct
import sys
import time
import types
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pickle_files
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pickle_files import call, name, number, program, storage, text

from benchmarks.common import process_memory, restart_peak
from ldm.checkpoint import pickled
from ldm.checkpoint.pickled import Inert, Name, Storage, StoredTensor, read_pickle

PLAIN = {
    "numbers": [0, 255, 256, 65_535, 65_536, -1, 2**31, 10**30, -(10**700), 1.5, float("inf"), True, False, None],
    "texts": ["", "é", "x" * 300, "x" * 70_000, "\ud800"],
    "nested": {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, [[1]]]}},
}


def read(content: bytes):
    return read_pickle(io.BytesIO(content))[0]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_what_they_are_in_python(protocol):
    assert read(pickle.dumps(PLAIN, protocol)) == PLAIN
    if protocol > 2:
        texts = [b"", b"\x00\xff", b"b" * 300, bytearray(b"abc")]  # earlier, bytes are calls of _codecs.encode
        assert read(pickle.dumps(texts, protocol)) == (
            texts if protocol == 5 else [*texts[:3], Inert("builtins.bytearray")]
        )
    cycle: list = [()]
    cycle.append((cycle,))
    found = read(pickle.dumps(cycle, protocol))
    assert found[0] == () and found[1][0] is found
    shared = {"a": 1}
    found = read(pickle.dumps([shared, shared], protocol))
    assert found[0] is found[1]


@pytest.mark.parametrize("protocol", range(6))
def test_only_text_keys_are_kept(protocol):
    """Weights have names. Other keys could be costly to hash: numbers that collide, tuples a million deep."""
    value = {"a": 1, 2: 2, (3,): 3, b"4": 4, None: 5, 6.5: 6}
    assert read(pickle.dumps(value, protocol)) == {"a": 1}
    assert read(pickle.dumps({1: 2}, protocol)) == {}
    assert read(pickle.dumps(OrderedDict(a=1, b=2), protocol)) == {"a": 1, "b": 2}


class ModelCheckpoint:
    """A Lightning callback, in a module that exists only while it is pickled."""

    def __init__(self):
        self.best_model_score = torch.tensor(0.5)
        self.best_k_models = {"a.ckpt": np.float64(1.5)}


class AttributeDict(dict):
    pass


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_real_checkpoints_carry_is_inert(protocol, monkeypatch):
    """Objects of libraries, most of which need not be there, beside values that must be read."""
    lightning = types.ModuleType("lightning_that_is_not_here")
    for kind in (ModelCheckpoint, AttributeDict):
        monkeypatch.setattr(kind, "__module__", lightning.__name__)
        setattr(lightning, kind.__name__, kind)
    objects = {
        "callback": ModelCheckpoint(),
        "hyper_parameters": AttributeDict(lr=1e-4),
        "config": OmegaConf.create({"model": {"target": "ldm.X", "params": [1, 2]}}),
        "args": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("a/b")),
        "path": pathlib.PurePosixPath("a/b"),
        **{"size": torch.Size([1, 2]), "dtype": torch.float16, "device": torch.device("cpu")},
        **{"scalar": np.float32(0.5), "array": np.arange(3.0), "complex": 1j, "range": range(3)},
        **{"default": defaultdict(list, a=[1]), "counter": Counter("ab"), "set": {1, 2}, "frozen": frozenset({1})},
        **{"function": os.path.join, "class": ModelCheckpoint, "exception": ValueError("x")},
    }
    sys.modules[lightning.__name__] = lightning
    try:
        content = pickle.dumps({**objects, "global_step": 7, "callbacks": {ModelCheckpoint: {}}, "end": "e"}, protocol)
    finally:
        del sys.modules[lightning.__name__]
    found = read(content)
    assert (found.pop("global_step"), found.pop("callbacks"), found.pop("end")) == (7, {}, "e")
    assert found.keys() == objects.keys()
    for key, value in found.items():
        assert isinstance(value, Name if key in ("dtype", "class", "function") else Inert), key
    assert found["callback"].maker in ("lightning_that_is_not_here.ModelCheckpoint", "copyreg._reconstructor")
    assert "lightning_that_is_not_here" not in sys.modules


def test_tensors_are_descriptions():
    described = Storage("torch.FloatStorage", "0", 6)
    expected = StoredTensor(described, 1, (2, 2), (3, 1))
    arguments = [storage(), number(1), pickle_files.row(2, 2), pickle_files.row(3, 1)]
    hooks = [b"\x89", call(name("collections", "OrderedDict"))]
    plain = call(name("torch._utils", "_rebuild_tensor"), *arguments)
    v2 = call(name("torch._utils", "_rebuild_tensor_v2"), *arguments, *hooks)
    v3 = call(name("torch._utils", "_rebuild_tensor_v3"), *arguments, *hooks, name("torch", "uint16"))
    attributes = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", "_rebuild_tensor_v2"),
        name("elsewhere", "Kind"),
        b"(" + b"".join(arguments + hooks) + b"t",
        b"}",
    )
    assert read_pickle(io.BytesIO(program(plain))) == (expected, {"0": described})
    assert read(program(v2)) == read(program(attributes)) == expected
    assert read(program(v3)) == StoredTensor(described, 1, (2, 2), (3, 1), "torch.uint16")
    for maker, rest in (("_rebuild_parameter", hooks), ("_rebuild_parameter_with_state", [*hooks, b"}"])):
        assert read(program(call(name("torch._utils", maker), v2, *rest))) == expected
    # a conjugated view, and what it is not known how to make, stay unmade
    conjugated = call(name("torch._utils", "_rebuild_tensor_v2"), *arguments, *hooks, b"}" + text("conj") + b"\x88s")
    assert read(program(conjugated)) == Inert("torch._utils._rebuild_tensor_v2")
    assert read(program(call(name("torch._utils", "_rebuild_qtensor"), storage()))) == Inert(
        "torch._utils._rebuild_qtensor"
    )


@pytest.mark.parametrize(
    "value",
    [
        storage().replace(b"storage", b"starage"),
        text("storage") + b"Q",
        b"NQ",
        b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x06tQ",  # a text, no class
        b"(" + text("storage") + name("torch", "FloatStorage") + b"K\0" + text("cpu") + b"K\x06tQ",
        b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + text("6") + b"tQ",
        storage()[:-2] + b"K\x01tQ",  # a view of another storage
        storage() + storage(elements=7),
        storage() + storage(kind="LongStorage"),
        b"P0\n",
    ],
)
def test_bad_persistent_ids(value):
    refused("its pickle is damaged: (it|PERSID) ", read, program(value))
    assert isinstance(read(program(storage() + storage() + storage(key="1"))), Storage)


@pytest.fixture
def hit(tmp_path, monkeypatch):
    """Where payloads leave their mark."""
    pickle_files.prepare(tmp_path)
    pickle_files.FIRED.clear()
    pickle_files.register_extensions()
    yield tmp_path / "hit"
    pickle_files.forget_extensions()


@pytest.mark.parametrize("payload", pickle_files.payloads(Path("nowhere")))
def test_nothing_runs(payload, hit):
    """First in Python's own machine, to see that the payload would run there, then in ours."""
    value = program(pickle_files.payloads(hit.parent)[payload])
    with suppress(Exception):
        pickle_files.PythonsOwn(io.BytesIO(value)).load()
    assert hit.exists() or pickle_files.FIRED, "the payload is a dud"
    hit.unlink(missing_ok=True)
    pickle_files.FIRED.clear()
    with suppress(ValueError):  # bad persistent ids
        found = read(value)
        assert type(found) in (Inert, Name, StoredTensor, dict, list, tuple), found
        assert not isinstance(found, dict) or not found
    assert not hit.exists() and not pickle_files.FIRED


def test_every_instruction_that_calls_has_a_payload():
    """Whatever Python's machine might run code for; the others make or move plain values."""
    quiet = set(pickled.LITERALS) | {
        *("NONE NEWTRUE NEWFALSE EMPTY_LIST EMPTY_TUPLE EMPTY_DICT LIST TUPLE TUPLE1 TUPLE2 TUPLE3 MARK STOP").split(),
        *("POP POP_MARK PROTO FRAME NEXT_BUFFER READONLY_BUFFER").split(),
    }
    used = set()
    for value in pickle_files.payloads(Path("nowhere")).values():
        used |= {opcode.name for opcode, _, _ in pickletools.genops(program(value))}
    assert {opcode.name for opcode in pickletools.opcodes} - quiet <= used


def test_every_instruction_is_known():
    """Each either works on a full stack or is refused by name."""
    refused = {}
    lengths = {-1: b"0\n", -2: b"\0", -3: bytes(4), -4: bytes(4), -5: bytes(8)}  # of empty arguments, by pickletools
    for opcode in pickletools.opcodes:
        kind = opcode.arg
        argument = b"" if kind is None else lengths.get(kind.n, bytes(max(kind.n, 0)))
        argument = {"stringnl": b"''\n", "stringnl_noescape_pair": b"0\n0\n"}.get(getattr(kind, "name", ""), argument)
        stack = b"K\x01q\0" + b"0]}(" + text("a") + text("b")
        try:
            read(stack + opcode.code.encode("latin-1") + argument + b".")
        except ValueError as error:
            refused[opcode.name] = str(error).removeprefix("its pickle is damaged: ")
    assert refused == {
        "PERSID": "PERSID has no place in a checkpoint",
        "BINPERSID": "it has a persistent id that is not a storage",
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "exhausted"),
        (b"\x80\x02", "exhausted"),
        (b".", "takes more from the stack"),
        (b"0.", "takes more from the stack"),
        (b"t.", "pop from empty list"),
        (b"(0t.", "pop from empty list"),
        (b"N(1\x86.", "takes more from the stack"),
        (b"N(0 ", "exhausted|unknown"),
        (b"NN(\x86t.", "takes more from the stack"),
        (b"h\x05.", "5"),
        (b"q\x05.", "list index out of range"),
        (b"}(K\x01u.", "a key without a value"),
        (b"(K\x01d.", "a key without a value"),
        (b"K\x01K\x02\x93.", "by something that is not a name"),
        (b"(o.", "required positional argument"),
        (b"\xff.", "unknown"),
        (b"X\xff\xff\xff\xffabc.", "expected"),
        (b"I" + b"1" * 5000 + b"\n.", "limit"),
        (b"Fx\n.", "could not convert"),
        (b"X\x01\0\0\0\xff.", "codec"),
    ],
)
def test_damage_is_one_sentence(content, reason):
    with pytest.raises(ValueError, match=f"^its pickle is damaged: .*({reason})") as caught:
        read(content)
    assert len(str(caught.value)) < 240 and "\n" not in str(caught.value)


def twice(n: int) -> bytes:
    """A tuple of two, of the one before, n times: 2^n leaves for whoever walks it."""
    return b"K\x01" + b"2\x86" * n


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        (b"]" * 100_000 + b"a" * 99_999, True),  # lists in lists
        (b"K\x01" + b"\x85" * 100_000, True),
        (b"}" + b"K\x01" + b"\x85" * 100_000 + b"Ns", True),  # as a key: hashing it overruns C's stack
        (b"\x8f(" + b"K\x01" + b"\x85" * 100_000 + b"\x90", True),
        (twice(1000), True),
        (call(name("collections", "OrderedDict"), twice(1000)), True),
        (b"(" + twice(1000) + twice(1000) + b"d", True),
        (name("torch._utils", "_rebuild_tensor") + b"q\0" + b"0" + b"h\0(" * 20_000 + b"N" + b"NNNtR" * 20_000, True),
        (text("storage") + twice(1000) + b"\x86Q", False),
        (twice(1000) + b"Q", False),
        (text("x" * 100_000) + b"q\0" + b"h\0h\0\x93" * 10_000, False),  # 2 GB of names
        (b"(" * 100_000, False),
        (b"\x8e" + struct.pack("<Q", 2**62) + b"x", False),
        (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x", False),
        (b"\x8b" + struct.pack("<i", -1) + b"x", False),
        (b"\x95" + struct.pack("<Q", 2**63 - 1) + b"N", True),
    ],
    ids=range(16),
)
def test_bombs(value, fine):
    restart_peak()
    before, start = process_memory()["VmHWM"], time.perf_counter()
    if fine:
        read(program(value))
    else:
        refused("its pickle is damaged", read, program(value))
    assert process_memory()["VmHWM"] - before < 100 * 2**20 and time.perf_counter() - start < 10


def test_the_number_of_instructions_is_limited(monkeypatch):
    monkeypatch.setattr(pickled, "MAX_INSTRUCTIONS", 1000)
    assert len(read(program(b"(" + b"N" * 996 + b"t"))) == 996  # with PROTO and STOP
    refused("has more than 1000 instructions", read, program(b"(" + b"N" * 997 + b"t"))


def test_truncated_and_flipped_anywhere():
    """Only ValueError comes out of any prefix and of any bit flip."""
    values = [PLAIN["nested"], OrderedDict(a=1), argparse.Namespace(x=Path("a")), np.float32(1), {"s": {1, 2}}]
    for protocol in range(6):
        content = pickle.dumps(values, protocol)
        for length in range(len(content)):
            refused("its pickle is damaged", read, content[:length])
        rng = random.Random(protocol)
        for _ in range(1500):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 1, 3))):
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            with suppress(ValueError):
                read(bytes(damaged))


# Any instruction with a plausible argument, so that programs get far enough to meet one another's leavings.
TEXT = st.sampled_from(
    ["storage", "torch", "FloatStorage", "collections", "OrderedDict", "_rebuild_tensor_v2", "0", ""]
)
ARGUMENTS = {
    "uint1": st.binary(min_size=1, max_size=1),
    "uint2": st.binary(min_size=2, max_size=2),
    "int4": st.integers(0, 3).map(lambda n: struct.pack("<i", n)),
    "uint4": st.integers(0, 3).map(lambda n: struct.pack("<I", n)),
    "unicodestring4": TEXT.map(lambda t: text(t)[1:]),
    "stringnl_noescape_pair": st.tuples(TEXT, TEXT).map(lambda pair: "\n".join(pair).encode() + b"\n"),
    "long1": st.integers(-(2**70), 2**70).map(lambda n: number(n)[1:]),
    "float8": st.binary(min_size=8, max_size=8),
}


@st.composite
def instructions(draw) -> bytes:
    opcode = draw(st.sampled_from(pickletools.opcodes))
    argument = b""
    if opcode.arg is not None:
        argument = draw(ARGUMENTS.get(opcode.arg.name, st.binary(max_size=12)))
    return opcode.code.encode("latin-1") + argument


@settings(max_examples=400, deadline=None)
@given(st.lists(instructions(), max_size=30))
def test_any_program_is_read_or_refused(steps):
    with suppress(ValueError):
        read(b"NN](" + b"".join(steps) + b".")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content):
    with suppress(ValueError):
        read(content)


def test_a_parameter_dict_is_what_its_parameters_are():
    """torch.nn.ParameterDict alone is known by an attribute, and only where that is a dictionary of texts."""
    maker = name("torch.nn.modules.container", "ParameterDict") + b")\x81"

    def built(attributes: bytes) -> bytes:
        return program(maker + b"q\x07" + attributes + b"b" + b"0h\x07")  # looked up again after its attributes

    inner = b"}(" + text("a") + number(1) + number(2) + number(3) + b"u"
    assert read(built(b"}(" + text("training") + b"\x88" + text("_parameters") + inner + b"u")) == {"a": 1}
    for attributes in (b"N", b"](K\x01e", b"}", b"}" + text("_parameters") + b"](K\x01K\x02es"):
        assert read(built(attributes)) == {}
    other = program(name("torch.nn", "Module") + b")\x81}" + text("_parameters") + inner + b"sb")
    assert read(other) == Inert("torch.nn.Module")
    assert read(program(b"}}" + text("_parameters") + inner + b"sb")) == {}
