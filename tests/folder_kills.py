"""A folder whose writer is killed at each line in turn; a module of its own, since small processes fork quickly."""

import itertools
import os
import signal
import sys
from functools import partial
from pathlib import Path

from ldm.checkpoint import atomic, atomic_folder


def replace_folder(path: Path, text: str = "new") -> None:
    with atomic_folder.atomic_folder(path) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def kill_at(lines, frame, event, _):
    """Trace the lines of what writes folders, and kill the process at the one where the count is 0."""
    if frame.f_code.co_filename not in (atomic.__file__, atomic_folder.__file__):
        return None
    if event == "line" and next(lines) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return partial(kill_at, lines)


def kill_at_every_line(path: Path, swaps: bool) -> list[str]:
    """Return what the folder holds after each kill, and at last "finished"; `swaps`: where the system swaps folders."""
    if not swaps:
        atomic_folder._swap = lambda *_: False
    outcomes: list[str] = []
    while len(outcomes) == 0 or outcomes[-1] != "finished":
        replace_folder(path, "old")
        child = os.fork()
        if child == 0:
            sys.settrace(partial(kill_at, itertools.count(-len(outcomes))))
            replace_folder(path)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert path.is_dir() or not swaps
        try:
            with atomic_folder.atomic_folder(path):
                raise RuntimeError
        except RuntimeError:
            pass
        outcomes.append("finished" if status == 0 else (path / "a").read_text())
        assert sorted(path.parent.iterdir()) == [path] and sorted(path.iterdir()) == [path / "a", path / "b"]
        assert (path / "a").read_text() == (path / "b").read_text()
    return outcomes


if __name__ == "__main__":
    print(*kill_at_every_line(Path(sys.argv[1]), sys.argv[2] == "swap"))
