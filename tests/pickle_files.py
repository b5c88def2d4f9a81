"""Checkpoint files that torch.save would not write: pickles made of instructions, and zip and legacy files of them."""

import copyreg
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch

FIRED: list[str] = []  # the methods of this file's classes that a pickle made run
EXTENSIONS = {"fire": 200, "Born": 60_000, "Armed": 100_000}  # numbers for EXT1, EXT2 and EXT4


def fire(*args):
    FIRED.append("fire")
    return fire


class Born:
    def __new__(cls, *args, **kwargs):
        FIRED.append("__new__")
        return object.__new__(cls)


class Armed:
    """Notes whatever a pickle can do to an object. Making one is silent."""

    def __hash__(self):
        FIRED.append("__hash__")
        return 1


for method in ("__init__", "__setstate__", "__setitem__", "append", "extend", "add"):
    setattr(Armed, method, lambda self, *args, method=method: FIRED.append(method))


class Property:
    __slots__ = ()
    name = property(fset=lambda self, value: FIRED.append("setter"))


class Reduced:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class PythonsOwn(pickle.Unpickler):
    """What our machine stands in for; it also notes persistent ids."""

    def persistent_load(self, pid):
        FIRED.append("persistent_load")
        return fire


def register_extensions() -> None:
    for attribute, code in EXTENSIONS.items():
        copyreg.add_extension(__name__, attribute, code)


def forget_extensions() -> None:
    for attribute, code in EXTENSIONS.items():
        copyreg.remove_extension(__name__, attribute, code)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    encoded = value.to_bytes(20, "little", signed=True)
    return b"\x8a\x14" + encoded


def row(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", elements: int = 6, kind: str = "FloatStorage", module: str = "torch") -> bytes:
    return b"(" + text("storage") + name(module, kind) + text(key) + text("cpu") + number(elements) + b"tQ"


def tensor(record: bytes = storage(), offset: int = 0, size=(2, 3), stride=(3, 1)) -> bytes:  # noqa: B008
    rest = b"\x89" + call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), record, number(offset), row(*size), row(*stride), rest)


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def program(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


NUMBERS = torch.arange(6, dtype=torch.float32).numpy().tobytes()


def write_zip(path: Path, value: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A zip file with the pickle of `value`, and `data_0=bytes` for the record data/0: six numbers, if not given."""
    records = {"data.pkl": program(value), "data_0": NUMBERS, "version": b"3\n"} | records
    with zipfile.ZipFile(path, "w", compression) as archive:
        for key, content in records.items():
            archive.writestr(f"archive/{key.replace('data_', 'data/')}", content)
    return path


def write_legacy(path: Path, value: bytes, before: dict[int, bytes] | None = None) -> Path:
    """A file of the format before zip with the storage "0" of six numbers. `before[i]` runs first in pickle i of 5."""
    parts = [pickle.dumps(part, 2)[2:-1] for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [value, pickle.dumps(["0"], 2)[2:-1]]
    for i, first in (before or {}).items():
        parts[i] = first + b"0" + parts[i]
    path.write_bytes(b"".join(map(program, parts)) + struct.pack("<q", 6) + NUMBERS)
    return path


def prepare(folder: Path) -> None:
    """Put the files there that two payloads need."""
    (folder / "hubconf.py").write_text(f"def model():\n    open({str(folder / 'hit')!r}, 'w').close()\n")
    torch.save({"a": Reduced(os.system, f"touch {folder / 'hit'}")}, folder / "inner.ckpt")


def payloads(folder: Path) -> dict[str, bytes]:
    """Values that run code when Python unpickles them: they touch the file "hit" in `folder`, or appear in FIRED."""
    hit = str(folder / "hit")
    touch, write = text(f"touch {hit}"), text(f"open({hit!r}, 'w').close()")
    system, module = name("os", "system"), call(name("importlib", "import_module"), text("os"))
    attribute, pickles = name("builtins", "getattr"), call(name("importlib", "import_module"), text("pickle"))
    inner = text(f"cos\nsystem\n(Vtouch {hit}\ntR.")
    own, born, armed = name(__name__, "fire"), name(__name__, "Born"), name(__name__, "Armed") + b")\x81"
    return {
        "os.system": call(system, touch),
        "posix.system": call(name("posix", "system"), touch),
        "subprocess": call(name("subprocess", "call"), b"](" + text("touch") + text(hit) + b"e"),
        "eval": call(name("builtins", "eval"), write),
        "exec": call(name("builtins", "exec"), write),
        "eval as Python 2 named it": call(name("__builtin__", "eval"), write),
        "getattr": call(call(attribute, module, text("system")), touch),
        "__import__": call(call(attribute, call(name("builtins", "__import__"), text("os")), text("system")), touch),
        "a dotted name": call(b"\x80\x04" + name("os", "path.os.system"), touch),
        "operator.attrgetter": call(call(call(name("operator", "attrgetter"), text("system")), module), touch),
        "operator.methodcaller": call(call(name("operator", "methodcaller"), text("system"), touch), module),
        "functools.partial": call(call(name("functools", "partial"), system, touch)),
        "map": call(name("builtins", "list"), call(name("builtins", "map"), system, b"](" + touch + b"e")),
        "torch.hub": call(name("torch.hub", "_load_local"), text(str(folder)), text("model")),
        "torch.load": call(name("torch", "load"), text(str(folder / "inner.ckpt")), b"N", pickles),
        "pickle.loads": call(name("pickle", "loads"), call(name("_codecs", "encode"), inner, text("latin1"))),
        "a tensor's subclass": call(
            name("torch._tensor", "_rebuild_from_type_v2"), system, name("torch", "Tensor"), b"(" + touch + b"t", b"N"
        ),
        "an ordered dict": call(name("collections", "OrderedDict"), b"](](" + armed + b"K\x01ee"),
        "a parameter": call(name("torch._utils", "_rebuild_parameter"), armed + b"Nb", b"\x89", b"N"),
        "REDUCE": call(own),
        "REDUCE of a class": call(born),
        "NEWOBJ": born + b")\x81",
        "NEWOBJ_EX": born + b")}" + text("key") + b"K\x01s\x92",
        "OBJ": b"(" + born + b"o",
        "OBJ with arguments": b"(" + name(__name__, "Armed") + b"K\x01o",
        "INST": f"(i{__name__}\nBorn\n".encode(),
        "BUILD": armed + b"}b",
        "BUILD of a property": name(__name__, "Property") + b")\x81N}" + text("name") + b"K\x01s\x86b",
        "SETITEM": armed + b"K\x01K\x02s",
        "SETITEMS": armed + b"(K\x01K\x02K\x03K\x04u",
        "APPEND": armed + b"K\x01a",
        "APPENDS": armed + b"(K\x01K\x02e",
        "ADDITEMS": armed + b"(K\x01\x90",
        "the hash of a key": b"}" + armed + b"K\x01s",
        "the hash of a key in DICT": b"(" + armed + b"K\x01d",
        "the hash of an element": b"\x8f(" + armed + b"\x90",
        "FROZENSET": b"(" + armed + b"\x91",
        "EXT1": b"\x82" + struct.pack("<B", EXTENSIONS["fire"]) + b")R",
        "EXT2": b"\x83" + struct.pack("<H", EXTENSIONS["Born"]) + b")\x81",
        "EXT4": b"\x84" + struct.pack("<i", EXTENSIONS["Armed"]) + b")\x81}b",
        "STACK_GLOBAL": text(__name__) + text("fire") + b"\x93)R",
        "BINPUT and BINGET": own + b"q\x07" + b"0" + b"h\x07)R",
        "LONG_BINPUT and LONG_BINGET": own + b"r\x07\0\0\0" + b"0" + b"j\x07\0\0\0)R",
        "PUT and GET": own + b"p7\n" + b"0" + b"g7\n)R",
        "MEMOIZE": own + b"\x94" + b"0" + b"h\0)R",
        "a memo entry that changes": b"K\x01q\x07" + own + b"q\x07" + b"0" + b"0" + b"h\x07)R",
        "DUP": own + b"2)R\x86",
        "the result of a call": own + b")R)R",
        "BINPERSID": system + b"Q",
        "BINPERSID of a call": call(own) + b"Q",
        "PERSID": b"Pos.system\n",
        "a persistent id that is called": b"NQ)R",
    }
