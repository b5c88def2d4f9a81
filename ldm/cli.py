"""What scripts share: the option parser and option types. It imports nothing heavy."""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.checks import LARGEST_FLOAT, path_fault, shorten_values


class Parser(argparse.ArgumentParser):
    """An argparse parser in which `-` and `_` are the same in long options, and a mistake is one sentence, status 2.

    Options cannot be abbreviated: an abbreviation could change its meaning with a new option.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)  # a script's docstring, as written
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does, with every long option in the spelling in which it was added.

        A text (`--prompt`) may begin with a dash, unless it is an option's name; a path and a number (-1e-3) with one.
        """
        args = sys.argv[1:] if args is None else list(args)
        end = args.index("--") if "--" in args else len(args)  # what follows `--` are values
        spelled, options = {_canonical(name): name for name in self._option_string_actions}, []
        for arg in (_respell(arg, spelled) for arg in args[:end]):
            known = arg.partition("=")[0] in self._option_string_actions
            if arg.startswith("-") and not known and options and self._takes(options[-1], arg):
                options[-1] += f"={arg}"
            else:
                options.append(arg)
        self._check_repeated(options)
        return super().parse_known_args(options + args[end:], namespace)

    def _takes(self, option: str, value: str) -> bool:
        """Return whether an option takes one value, and one that begins with a dash may be meant for it."""
        action = self._option_string_actions.get(option)
        if action is None or action.nargs not in (None, 1) or action.choices:
            return False
        return action.type in (None, str) or not value.startswith("--")

    def _check_repeated(self, args: Sequence[str]) -> None:
        """Refuse two options that set the same thing; note where one is given twice, of which the last counts."""
        given: dict[str, list[str]] = {}
        for arg in args:
            name = arg.partition("=")[0]
            action = self._option_string_actions.get(name)
            if isinstance(action, argparse._StoreAction | argparse._StoreConstAction):
                given.setdefault(action.dest, []).append(name)
        for first, *others in given.values():
            if set(others) - {first}:
                self.error(f"{first} and {(set(others) - {first}).pop()} set the same thing: give one of them")
            if others and self._option_string_actions[first].nargs != 0:
                print(f"note: {first} is given {1 + len(others)} times: the last one counts", file=sys.stderr)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Read an option's values as argparse does; refuse what cannot be a path, as the empty one of "$UNSET"."""
        if action.type in (Path, absolute_path) and (faults := [*filter(None, map(path_fault, arg_strings))]):
            raise argparse.ArgumentError(action, faults[0])
        return super()._get_values(action, arg_strings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with options and positional arguments in any order.

        An unknown option ends the program with the nearest known one in the message.
        """
        commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        parse = self.parse_known_args if commands else self.parse_known_intermixed_args
        parsed, unknown = parse(args, namespace)
        if unknown:
            from ldm.spelling import explain_argument  # only a mistake needs it

            self.error(explain_argument(unknown[0], self))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one sentence (argparse would put the usage, a screenful, before it) and exit with status 2."""
        self.exit(2, f"error: {shorten_values(message)} ({self.prog} --help lists the options)\n")


class Allow(argparse.Action):
    """The option --allow: let configurations build classes of a package, installed or in the current folder."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        # The environment, because processes that load data build such classes, too.
        os.environ["LDM_ALLOW"] = ",".join(filter(None, [os.environ.get("LDM_ALLOW"), values]))
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


ALLOW: dict[str, Any] = {"action": Allow, "metavar": "PACKAGE", "default": argparse.SUPPRESS}
ALLOW["help"] = "package whose classes a configuration or checkpoint may build; repeatable"


def _canonical(option: str) -> str:
    return option.replace("_", "-") if option.startswith("--") else option


def _respell(arg: str, spelled: dict[str, str]) -> str:
    """Turn `--n-samples=4` into `--n_samples=4` if the option was added so; keep anything unknown."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return spelled.get(_canonical(name), name) + equals + value


def int_range(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Return an option type: an integer from low to high."""
    return _number_type(int, "an integer", low, high)


def finite_float(low: float = -math.inf, high: float = math.inf, infinite: bool = False) -> Callable[[str], float]:
    """Return an option type: a number from low to high; infinity only with `infinite`, nan never."""

    def read(text: str) -> float:
        value = float(text)
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise ValueError
        return value

    if not infinite:
        low, high = max(low, -LARGEST_FLOAT), min(high, LARGEST_FLOAT)
    return _number_type(read, "a finite number", low, high)


def _number_type(read: Callable[[str], Any], words: str, low: float, high: float) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        try:
            value = read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        if not low <= value <= high:
            limit = f"at least {low:g}" if value < low else f"at most {high:g}"
            raise argparse.ArgumentTypeError(f"{value} is out of range: it must be {limit}")
        return value

    return number


def absolute_path(text: str) -> str:
    """Option type: an absolute path, so that a run can be resumed from any folder."""
    return str(Path(text).resolve())


def device_name(text: str) -> str:
    """Option type: the name of a device that computes."""
    if text.partition(":")[0] == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} holds no numbers: use auto, cpu, cuda or mps")
    return text


def check_writable(path: Path | None) -> None:
    """Raise OSError if a file could not be written there; nothing is made."""
    if path is not None:
        if path.is_dir():
            raise IsADirectoryError(f"{path} cannot be written, as it is a folder: name a file")
        check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise OSError, with the reason, if files could not be written into a folder, to be made then; nothing is made."""
    for there in (folder, *folder.parents):
        try:
            with tempfile.TemporaryFile(dir=there):
                return
        except OSError as error:
            if not isinstance(error, FileNotFoundError) or there.is_symlink():
                raise OSError(f"cannot write into the output folder {folder}: {error.strerror}") from None
