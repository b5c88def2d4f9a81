"""Files that are complete or not there, and locks that end with their process. Imports nothing heavy."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import fcntl
except ImportError:  # on Windows, where files are complete too, but nothing is locked or swept
    fcntl = None

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic(path: str | Path, wanted: int | None = None, new: bool = False) -> Iterator[Path]:
    """`with atomic(path) as temporary:` what is written to `temporary` becomes `path` if the block succeeds.

    A link stays: the file that it leads to is replaced. The temporary file is locked, so that one whose process was
    killed is known, and taken over by the next write of that file or removed by `sweep`.

    Args:
        wanted: how many bytes the file needs, for the message where the disk is full.
        new: raise FileExistsError where `path` exists, even if another process made it during the block.

    Raises:
        OSError: naming `path`; before anything is written, for what is neither a regular file nor missing.
    """
    path = writable_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _temporary(path)
    except OSError as error:
        raise _explained(error, path, None) from None
    try:
        yield temporary
        os.chmod(temporary, _mode(path))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # a rename that survives a power cut needs its data on the disk first
        _rename(temporary, path, new)
    except BaseException as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        with suppress(OSError):
            os.truncate(temporary, 0)  # `file` is open: a file that is only unlinked would keep its space
        temporary.unlink(missing_ok=True)  # before the message, which has the space that is free then
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary), str(path)):
            raise _explained(error, path, written if wanted is None else wanted) from None
        raise
    finally:
        file.close()  # from here on the name of the temporary file is another writer's


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically; a device or a pipe, of which nothing can be replaced, as it is."""
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_text(text, encoding="utf-8")
        return
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_png(path: Path, image: "Image") -> None:
    """Write an image as PNG, atomically, whatever the path's suffix."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


@contextmanager
def explained(path: Path, wanted: int) -> Iterator[None]:
    """Name the file, and the bytes that it needs, in an error of writing it in another way."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, str(path)):
            raise _explained(error, path, wanted) from None
        raise


def _rename(temporary: Path, path: Path, new: bool) -> None:
    if new:
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces a file
            return temporary.unlink()
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            open(path, "xb").close()
    os.replace(temporary, path)


def writable_target(path: str | Path) -> Path:
    """Return the path of the file to replace, links resolved. OSError unless it is a regular file or missing."""
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: give the path of a file")
    if real.is_symlink() or (real.exists() and not real.is_file()):
        what = "a link to itself" if real.is_symlink() else "a device or a pipe"
        raise OSError(f"{str(path)!r} is {what}, not a file that can be replaced: give the path of a file")
    return real


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Return a temporary file beside `path`, empty, and the open file that holds its lock."""
    numbers = count()
    while True:
        temporary = path.with_name(f".{path.name[:60]}.{next(numbers)}.tmp")  # a name may have 255 bytes
        try:
            file = open(temporary, "xb")
        except FileExistsError:
            file = take_over(temporary)
            if file is None:
                continue
            os.truncate(temporary, 0)
        else:
            if _lock(file) is False or not _is(file, temporary):  # a sweep was quicker
                file.close()
                continue
        if fcntl is None:
            file.close()  # Windows renames no open file
        return temporary, file


def take_over(path: Path) -> BinaryIO | None:
    """Open and lock a file that a process locked which is dead; None if one that lives may have it."""
    try:
        file = open(path, "r+b")
    except OSError:  # gone, or another user's
        return None
    if _lock(file) and _is(file, path):
        return file
    file.close()
    return None


def sweep(folder: Path) -> None:
    """Remove the temporary files in a folder whose processes were killed."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and (file := take_over(path)) is not None:
            with file:
                path.unlink(missing_ok=True)


def claim(path: Path) -> BinaryIO | None:
    """Open and lock a file, made if missing; None if another process has it. To release it, unlink and close it.

    With the name of a temporary file, `sweep` removes what a killed process left.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
        if (locked := _lock(file)) is not False and _is(file, path):
            return file
        file.close()
        if locked is False:
            return None  # otherwise the holder released it, and removed the file, in between


class Lock:
    """A lock on a folder, held by a file `.lock` in it, until `release` or the end of the process, kill -9 included.

    On file systems without locks nothing is locked.
    """

    def __init__(self, folder: Path, refusal: str) -> None:
        """Raise ValueError(refusal) if another process or thread holds the lock."""
        self.path, self.made = folder / ".lock", not folder.exists()
        file = claim(self.path)
        if file is None:
            raise ValueError(refusal)
        self.file = file
        if hasattr(os, "register_at_fork"):  # a worker that outlives this process must not hold it
            os.register_at_fork(after_in_child=self.file.close)

    def release(self) -> None:
        """Remove the file, and the folder if it was made for it and nothing else is in it."""
        if self.file.closed:
            return
        self.path.unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):
                self.path.parent.rmdir()
        self.file.close()


def _lock(file: BinaryIO) -> bool | None:
    """Lock an open file: True, or False if it is locked already, or None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file still has this path, which it was opened by."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _mode(path: Path) -> int:
    """Return the permissions of the file that is replaced, or those of a new one."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)  # there is no other way to read it
    os.umask(umask)
    return 0o666 & ~umask


def _explained(error: OSError, path: Path, wanted: int | None) -> OSError:
    """Return the error in a sentence that names the file and, where the disk is full, the bytes."""
    reason = error.strerror or str(error)
    if wanted is not None and error.errno in _FULL:
        reason += f" (it needs {wanted:,} bytes; {shutil.disk_usage(path.parent).free:,} are free on that disk)"
    return type(error)(f"cannot write {str(path)!r}: {reason}")
