"""Folders that are complete or not there, as the files of `atomic.py` are."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ldm.checkpoint.atomic import Lock


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """`with atomic_folder(path) as temporary:` as `atomic`: the folder `temporary` becomes `path`, which it replaces.

    It is made in a folder beside `path` that has a lock, so that what a killed process left is known, and put right by
    the next write of that folder: where a system cannot swap two folders, `path` may be missing until then.
    """
    path, lock = Path(os.path.realpath(path)), None
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = count()
    while lock is None:
        place = path.with_name(f".{path.name[:60]}.{next(numbers)}.tmp")
        with suppress(ValueError, FileExistsError):  # another process's, or a file's
            lock = Lock(place, "taken")
    temporary, old = place / "new", place / "old"
    if old.exists() and not path.exists():
        os.rename(old, path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if not (path.exists() and _swap(temporary, path)):
            if path.exists():  # no rename replaces a folder that is not empty
                os.rename(path, old)
            os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def _swap(first: Path, second: Path) -> bool:
    """Give each the other's name in one step, as Linux can. False where the system, or the file system, cannot."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange(here, os.fsencode(first), here, os.fsencode(second), flag) == 0
