"""Reading a pickle without running it.

A pickle is a program for a small stack machine, and Python's own machine imports and calls whatever the program names.
(With its look-ups overridden it still hashes: a key of a million nested tuples ends the process.) The machine below has
nothing to call with: a class or function that the program names stays a `Name`, a text that is never looked up; an
object that it wants made is `Inert`, save the few plain things that `_made` knows; attributes, items or elements for
anything but a plain dict or list go nowhere. `pickletools.genops` of the standard library, a disassembler, cuts the
bytes into instructions (protocols 0 to 5) and checks their lengths. One class is known by what it holds: of a
`torch.nn.ParameterDict`, in which embeddings of textual inversion are kept, the parameters are taken.

A tensor comes out as `StoredTensor`, the numbers that describe it: `torch_file` checks them and makes the tensor.
"""

from dataclasses import dataclass
from pickletools import genops
from typing import Any, BinaryIO

# Against files that are small and fill the memory: an instruction is as short as a byte and takes up to 100 in memory,
# and a long text can be named again and again. The limit is reached in 5 s; Stable Diffusion 1 has 34,000.
MAX_INSTRUCTIONS = 3_000_000
MAX_NAME = 1000

LITERALS = frozenset(  # the instructions whose argument is the value
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)


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
    """A view of a storage, in whatever the pickle gives for it; without `dtype`, the storage's kind tells it."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    dtype: str | None = None


class Parameters(dict):
    """A torch.nn.ParameterDict: parameters by name, which the pickle gives as one of its attributes."""


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """The value of the pickle that begins at the file's position, and every storage that it mentions, by key.

    The value is made of dict (only items whose keys are strings), list, tuple, str, bytes, bytearray, int, float, bool,
    None and the classes above. ValueError says what is wrong with bytes that are no whole pickle.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(genops(file)):
            if count == MAX_INSTRUCTIONS:
                raise ValueError(f"it has more than {MAX_INSTRUCTIONS} instructions")
            machine.step(opcode.name, argument)
        return machine.take(1)[0], machine.storages
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"its pickle is damaged: {str(error)[:200]}") from None


class _Machine:
    """A pickle's stack and memo. `step` has the instructions for plain values, `ask` those that run code in Python."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def take(self, count: int) -> list[Any]:
        """The topmost `count` values, which leave the stack."""
        height = len(self.stack) - count
        if count < 0 or height < 0:
            raise ValueError("it takes more from the stack than there is")
        taken = self.stack[height:]
        del self.stack[height:]
        return taken

    def take_to_mark(self) -> list[Any]:
        return self.take(len(self.stack) - self.marks.pop())

    def step(self, opcode: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match opcode:
            case _ if opcode in LITERALS:
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(None if opcode == "NONE" else opcode == "NEWTRUE")
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append(() if opcode == "EMPTY_TUPLE" else [] if opcode == "EMPTY_LIST" else {})
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(opcode[-1]))))
            case "TUPLE" | "LIST":
                values = self.take_to_mark()
                stack.append(tuple(values) if opcode == "TUPLE" else values)
            case "DICT":
                items = self.take_to_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = self.take(2) if opcode == "SETITEM" else self.take_to_mark()
                _set_items(stack[-1], items)
            case "APPEND" | "APPENDS":
                elements = self.take(1) if opcode == "APPEND" else self.take_to_mark()
                if type(stack[-1]) is list:
                    stack[-1].extend(elements)
            case "DUP":
                stack.append(stack[-1])
            case "POP_MARK":
                self.take_to_mark()
            case "POP" if self.marks[-1:] == [len(stack)]:
                self.marks.pop()
            case "POP":
                self.take(1)
            case "PROTO" | "FRAME" | "STOP" | "READONLY_BUFFER":
                pass
            case _:
                self.ask(opcode, argument)

    def ask(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self.take(2)))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(_name("copyreg", str(argument)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_made(*self.take(2)))
            case "NEWOBJ_EX":
                maker, arguments, _ = self.take(3)
                stack.append(_made(maker, arguments))
            case "INST":
                stack.append(_made(_name(*argument.split(" ", 1)), self.take_to_mark()))
            case "OBJ":
                maker, *arguments = self.take_to_mark()
                stack.append(_made(maker, arguments))
            case "BUILD":
                (attributes,) = self.take(1)
                held = attributes.get("_parameters") if type(attributes) is dict else None
                if type(stack[-1]) is Parameters and type(held) is dict:
                    stack[-1].update(held)
            case "EMPTY_SET" | "NEXT_BUFFER":
                stack.append(Inert(opcode))
            case "FROZENSET":
                self.take_to_mark()
                stack.append(Inert(opcode))
            case "ADDITEMS":
                self.take_to_mark()
            case "BINPERSID":
                stack.append(self.persistent(*self.take(1)))
            case _:
                raise ValueError(f"{opcode} has no place in a checkpoint")

    def persistent(self, value: Any) -> Storage | Name:
        """What a persistent id stands for: a storage, or the class of a module in the format before zip files."""
        match value:
            case ("module", Name(), _, _):
                return value[1]
            case ("storage", Name(), str(), _, int()) | ("storage", Name(), str(), _, int(), None):
                storage = Storage(value[1].text, value[2], value[4])
                if self.storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"it describes the storage {storage.key!r} in two ways")
                return storage
        raise ValueError("it has a persistent id that is no storage")


def _set_items(target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("it has a key without a value")
    if type(target) is dict:
        target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)


def _name(module: Any, name: Any) -> Name:
    if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
        raise ValueError("it names a class or function by something that is no name")
    return Name(f"{module}.{name}")


def _made(maker: Any, arguments: Any) -> Any:
    """What `maker(*arguments)` stands for: a dictionary, a tensor or a parameter, and all else is inert."""
    name = maker.text if isinstance(maker, Name) else "no function"
    match name, arguments:
        case "torch._tensor._rebuild_from_type_v2", (Name(), _, _, _):  # of a subclass, or with attributes
            name, arguments = arguments[0].text, arguments[2]
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch.nn.modules.container.ParameterDict", ():
            return Parameters()
        case "torch._utils._rebuild_tensor", (storage, offset, size, stride):
            return StoredTensor(storage, offset, size, stride)
        case "torch._utils._rebuild_tensor_v2", (storage, offset, size, stride, _, _):
            return StoredTensor(storage, offset, size, stride)
        case "torch._utils._rebuild_tensor_v3", (storage, offset, size, stride, _, _, Name(dtype)):
            return StoredTensor(storage, offset, size, stride, dtype)
        case "torch._utils._rebuild_parameter", (data, _, _):
            return data
        case "torch._utils._rebuild_parameter_with_state", (data, _, _, _):
            return data
    return Inert(name)
