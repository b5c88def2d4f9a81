"""Checks of values that come from outside, from configurations and headers of files, by type hints; and how a message
echoes such a value. It imports nothing heavy.
"""

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which images are computed
MOST_FOLDERS = 256  # in a path: each that is missing is made by a recursion
ECHOED = 200  # characters of a value that a message repeats
ONNX_INDEX = "model.json"  # in the folder of a model of `ldm.onnx`
SHIPPED_MODELS = ("digits", "digits-fast", "emoji")  # in ldm/pretrained; a name is also the path of a checkpoint


class Range(NamedTuple):
    """The range of a number, in `Annotated[int, Range(1, 8)]`."""

    low: float = -math.inf
    high: float = math.inf
    infinite: bool = False  # whether infinity is in it, as "no limit"; nan never is

    def __str__(self) -> str:
        if self.high < math.inf:
            return f" from {self.low:g} to {self.high:.12g}"
        return f" of at least {self.low:g}" if self.low > -math.inf else ""


# Hints of constructors. The limits are far above every published network, and keep a file from asking for any work.
Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(1, 2**10)]  # blocks, heads, groups
CountOrNone = Annotated[int, Range(0, 2**10)]
Width = Annotated[int, Range(1, 2**16)]  # channels, features
Levels = Annotated[Sequence[Count], "not empty"]  # a number for each level of a network
Widths = Annotated[Sequence[Width], "not empty"]
Entries = Annotated[int, Range(1, 2**24)]  # tokens, classes, codes
Probability = Annotated[float, Range(0, 1)]  # probabilities
Decay = Annotated[float, Range(0, 0.999999)]  # of an average over steps
Betas = tuple[Decay, Decay]  # of Adam
Rate = Annotated[float, Range(0)]  # learning rates, weights of a loss


def unfit(value: Any, hint: Any) -> str:
    """Return what a value should be by a type hint, such as "an integer"; "" if it is, or if the hint is a class."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated and not isinstance(args[1], Range):
        return unfit(value, args[0]) or ("" if value else "a list of at least one entry")
    if kind is Annotated:
        return _out_of_range(value, args[0], args[1])
    if kind in (Union, UnionType):
        wanted = [unfit(value, arg) for arg in args]
        return "" if "" in wanted else " or ".join(wanted)
    if kind in (int, float):
        return _out_of_range(value, kind, Range())
    if kind is Literal:
        return "" if value in args else " or ".join(map(repr, args))
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind in (str, Path):
        if not isinstance(value, str | Path):
            return "a text"
        return "a text without null characters" if "\0" in str(value) else ""
    if kind is NoneType:
        return "" if value is None else "null"
    if kind in (dict, Mapping):
        wanted = [unfit(entry, args[1]) for entry in value.values()] if isinstance(value, Mapping) and args else []
        return "" if isinstance(value, Mapping) and not any(wanted) else "a mapping"
    if kind in (list, tuple, Sequence):
        return _unfit_list(value, kind, args)
    return ""


def _out_of_range(value: Any, kind: type, limits: Range) -> str:
    largest = 2**63 - 1 if kind is int else math.inf if limits.infinite else sys.float_info.max
    if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool):
        if max(limits.low, -largest) <= value <= min(limits.high, largest):
            return ""
    return f"{'an integer' if kind is int else 'a number'}{limits}"


def _unfit_list(value: Any, kind: type, args: tuple) -> str:
    """Return what a list's entries should be: by one hint for all, or of a tuple by one hint for each."""
    each = args[:1] if kind is not tuple or args[1:] == (...,) else args
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        entries = each * len(value) if len(each) == 1 else each
        if not each or (len(entries) == len(value) and not any(map(unfit, value, entries))):
            return ""
    words = unfit(object(), each[0]) if len(set(each)) == 1 else ""
    return (f"a list of {len(each)} entries" if len(each) > 1 else "a list") + (words and f", each {words}")


def shorten(text: str) -> str:
    """Return a text for a message, of which at most ECHOED characters remain."""
    return text if len(text) <= ECHOED else f"{text[: ECHOED // 2]} ... {text[-ECHOED // 4 :]}"


def shorten_values(message: str) -> str:
    """Return a message in which every value in quotes, and every word, has at most ECHOED characters."""
    return re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"|\S+", lambda match: shorten(match[0]), message)


def as_path(what: str, value: object) -> Path:
    """Return a path of Python's or as text as a Path. ValueError for anything else; `what` begins the message."""
    if not isinstance(value, str | os.PathLike) or isinstance(value := os.fspath(value), bytes):
        raise ValueError(f"{what} {shorten(repr(value))} must be a path: a text or a pathlib.Path")
    return Path(value)


def path_fault(path: str) -> str:
    """Return why a text is not the path of a file or folder, "" if it may be one."""
    if not path:
        return "the path is empty"  # it would be the current folder
    if "\0" in path:
        return f"the path {path!r} has a null character"
    if (depth := len(Path(path).parts)) > MOST_FOLDERS:
        return f"the path has {depth:,} folders within each other: at most {MOST_FOLDERS} are possible"
    return ""


def check_file(path: Path, what: str) -> None:
    """Raise FileNotFoundError where nothing is, ValueError for a folder, device or pipe; `what` begins the message."""
    if path.is_dir():
        raise ValueError(f"{what} {str(path)!r} is a folder, not a file")
    if not path.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
            fetch = f"fetch it first (hf download {path} --local-dir FOLDER) and give that folder"
            hint = f"; if it is a name on the Hugging Face hub: nothing is downloaded here, so {fetch}"
        elif re.fullmatch(r"[\w-]+", str(path)):
            hint = f"; the models that ship: {few(SHIPPED_MODELS)}"
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist{hint}")
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} is a device or a pipe, not a file: save what it gives in a file first")


def few(names: Iterable[object], count: int = 5) -> str:
    """Return the first names for a message, and "..." if there are more."""
    names = [*names]
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "")
