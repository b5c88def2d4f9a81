"""Read a pickle without running it.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever the program names.
(Even with its look-ups overridden it hashes: a key of 100,000 nested tuples ends the process.) The machine below calls
nothing: a class or function that the program names stays a `Name`, a text that is never looked up; an object that it
wants made is `Inert`, except for the few plain things that `_make` knows; attributes and items are kept for plain dicts
and lists alone. `pickletools` of the standard library, a disassembler, cuts the bytes into instructions (protocols 0 to
5), checks their lengths, and says what each takes from the stack.
"""

from dataclasses import dataclass
from pickletools import genops, markobject
from typing import Any

# Against small files that fill the memory: an instruction is as short as a byte and takes up to 100 bytes in memory,
# and a long text can be named again and again. The limit is reached in 5 s; Stable Diffusion 1 has 34,000.
MAX_INSTRUCTIONS = 3_000_000
MAX_NAME = 1000


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names, such as `torch.FloatStorage`."""

    text: str


@dataclass(frozen=True, slots=True)
class Inert:
    """Stands where the pickle wants an object; `maker` names what would have made it."""

    maker: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers outside the pickle: the class's name (`torch.FloatStorage`), the record's name, the count."""

    kind: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage, as the pickle describes it, unchecked; without `dtype`, it is that of the storage."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: str | None = None


class Parameters(dict):
    """A torch.nn.ParameterDict, in which textual inversion keeps its embeddings: its parameters are an attribute."""


def read_pickle(file: Any) -> tuple[Any, dict[str, Storage]]:
    """Return the value of the pickle at the position of a file or mmap, and every storage that it mentions, by key.

    The value is made of dict (only items whose keys are strings), list, tuple, str, bytes, bytearray, int, float, bool,
    None and the classes above. ValueError when the bytes are not a complete pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[Any, Any] = {}
    storages: dict[str, Storage] = {}

    def take(count: int) -> list[Any]:
        height = len(stack) - count
        if count < 0 or height < 0:
            raise ValueError("it takes more from the stack than there is")
        taken = stack[height:]
        del stack[height:]
        return taken

    try:
        for count, (opcode, argument, _) in enumerate(genops(file)):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {MAX_INSTRUCTIONS} instructions")
            name, takes = opcode.name, opcode.stack_before
            if name in LITERALS:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "POP" and marks[-1:] == [len(stack)]:
                marks.pop()
            elif name == "DUP":
                stack.append(stack[-1])
            elif name in MAKERS:
                values = take(len(stack) - marks.pop()) if markobject in takes else []
                values = take(takes.index(markobject) if markobject in takes else len(takes)) + values
                if name in ("GLOBAL", "INST"):
                    values = [_name(*str(argument).split(" ", 1)), *values]
                elif name in ("EXT1", "EXT2", "EXT4"):
                    values = ["copyreg", str(argument)]
                made = MAKERS[name](*values)
                if isinstance(made, Storage) and storages.setdefault(made.key, made) != made:
                    raise ValueError(f"it describes the storage {made.key!r} in two ways")
                if opcode.stack_after:
                    stack.append(made)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"{name} has no place in a checkpoint")
        return take(1)[0], storages
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"its pickle is damaged: {str(error)[:200]}") from None


def _set_items(target: Any, *items: Any) -> Any:
    if len(items) % 2:
        raise ValueError("it has a key without a value")
    if type(target) is dict:  # other keys than texts could be costly to hash
        target.update(item for item in zip(items[::2], items[1::2], strict=True) if type(item[0]) is str)
    return target


def _extend(target: Any, *elements: Any) -> Any:
    if type(target) is list:
        target.extend(elements)
    return target


def _set_attributes(target: Any, attributes: Any) -> Any:
    held = attributes.get("_parameters") if type(attributes) is dict else None
    if type(target) is Parameters and type(held) is dict:
        target.update(held)
    return target


def _name(module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
        raise ValueError("it names a class or function by something that is not a name")
    return Name(f"{module}.{name}")


def _persistent(value: Any) -> Storage | Name:
    """Return what a persistent id stands for: a storage, or a module's class in the format before zip files."""
    match value:
        case ("module", Name(), _, _):
            return value[1]
        case ("storage", Name(kind), str(key), _, int(elements), *rest) if rest in ([], [None]):
            return Storage(kind, key, elements)
    raise ValueError("it has a persistent id that is not a storage")


def _make(maker: Any, arguments: Any) -> Any:
    """Return what `maker(*arguments)` stands for: a dictionary, a tensor or a parameter; all else is inert."""
    name = maker.text if isinstance(maker, Name) else "no function"
    match name, arguments:
        case "torch._tensor._rebuild_from_type_v2", (Name(), _, _, _):  # of a subclass, or with attributes
            name, arguments = arguments[0].text, arguments[2]
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.nn.modules.container.ParameterDict", ():
            return Parameters()
        case ("torch._utils._rebuild_tensor", (_, _, _, _)) | ("torch._utils._rebuild_tensor_v2", (_, _, _, _, _, _)):
            return StoredTensor(*arguments[:4])
        case "torch._utils._rebuild_tensor_v3", (_, _, _, _, _, _, Name(dtype)):
            return StoredTensor(*arguments[:4], dtype)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (data, _, _, *_):
            return data
    return Inert(name)


LITERALS = frozenset(  # the instructions whose argument is the value
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
MAKERS = {  # instruction -> what it makes of the values that it takes from the stack
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict},
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda *values: values),
    **{"LIST": lambda *values: [*values], "DICT": lambda *items: _set_items({}, *items)},
    **dict.fromkeys(("SETITEM", "SETITEMS"), _set_items),
    **dict.fromkeys(("APPEND", "APPENDS"), _extend),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET", "NEXT_BUFFER"), lambda *_: Inert("a set or buffer")),
    **dict.fromkeys(("GLOBAL", "READONLY_BUFFER", "ADDITEMS", "POP"), lambda value, *_: value),
    "POP_MARK": lambda *_: None,
    **dict.fromkeys(("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"), _name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _make),
    **dict.fromkeys(("INST", "OBJ"), lambda maker, *arguments: _make(maker, arguments)),
    **{"NEWOBJ_EX": lambda maker, arguments, _: _make(maker, arguments), "BUILD": _set_attributes},
    "BINPERSID": _persistent,
}
