"""What someone who mistyped a name may have meant. Only a mistake imports it."""

import argparse
from collections.abc import Collection, Iterable, Iterator


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is the fewest typing mistakes away, or None if none is near.

    A name of up to 3 letters has no near ones, one of up to 6 is near with one mistake, a longer one with two: a hint
    that is wrong is worse than none. One of over 64 has none either, as to look for it would take long.
    """
    if len(name) > 64:
        return None
    distance, found = min(((_mistakes(name.lower(), other.lower()), other) for other in known), default=(3, ""))
    return found if distance <= min((len(name) - 1) // 3, 2) else None


def did_you_mean(names: Iterable[object], known: Collection[str]) -> str:
    """Return "; did you mean NEAR?" for each unknown one of the names that has a near one."""
    near = [nearest_name(str(name), known) for name in names if name not in known]
    return "".join(f"; did you mean {name}?" for name in near if name is not None)


def explain_argument(arg: str, parser: argparse.ArgumentParser) -> str:
    """Say what is wrong with an argument that the parser and its sub-commands do not take."""
    name = arg.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {arg!r}: a value with spaces needs quotes"
    actions = [action for action in _actions(parser) if action.option_strings]
    listed = {a.dest: a.option_strings[0] for a in reversed(actions) if a.help != argparse.SUPPRESS}
    known = {  # each long option, of an old name the one in its place, which `--help` lists
        option[2:].replace("_", "-"): listed[action.dest] if action.help == argparse.SUPPRESS else option
        for action in actions
        for option in action.option_strings
        if option.startswith("--") and action.dest in listed
    }
    near = nearest_name(name.lstrip("-").replace("_", "-"), known)
    return f"unknown option {name}" + (f"; did you mean {known[near]}?" if near is not None else "")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _mistakes(a: str, b: str) -> int:
    """Count the letters that are added, left out, wrong or swapped: the distance of Damerau and Levenshtein."""
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)))
            if i > 1 and j > 1 and a[i - 2 : i] == other + b[j - 2]:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
