"""Files of lines that a user writes: prompts, captions, layouts."""

import os
from pathlib import Path

MOST_TEXT = 1 << 28  # bytes of a file of lines, of which a few copies are in memory


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a UTF-8 text file, without blank ones. ValueError if there is none. what: is in each."""

    def at_once(name: str, flags: int) -> int:  # a pipe without a writer is empty, and not waited for
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=at_once) as file:
        if os.name == "posix":
            os.set_blocking(file.fileno(), True)
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise ValueError(f"{path} has more than {MOST_TEXT >> 20} MiB, which no list of {what}s has")
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: it has to hold one {what} a line") from None
    if not any(lines):
        raise ValueError(f"{path} holds no {what}: write one a line (blank lines are skipped)")
    return [line for line in lines if line]


def read_layout(path: Path) -> str:
    """Return the JSON of a layout's file on one line. ValueError for a file that is not JSON."""
    import json

    try:
        return json.dumps(json.loads(" ".join(read_lines(path, "layout"))), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"layout {str(path)!r} is not JSON: {error}") from None
