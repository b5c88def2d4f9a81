"""The images of a folder: found, and examined before training, so that none is found to be damaged in the middle."""

import os
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.buckets import Shape
from ldm.data.image_files import examine_image
from ldm.data.image_formats import SUFFIXES
from ldm.util import progress_bar

Identity = tuple[bytes, str]  # what names an image's content, and what changes with it
_TABLE = (
    "CREATE TABLE IF NOT EXISTS images (name BLOB PRIMARY KEY, stamp TEXT, width INT, height INT, ignored TEXT, "
    "content BLOB, crc32 INT) WITHOUT ROWID"
)

MASK = ".mask.png"  # after the name of an image, in place of its suffix


def find_images(root: Path, empty: bool = False) -> list[Path]:
    """Return the images below a folder, sorted by name. FileNotFoundError if there are none, unless it may be empty.

    Links to folders are followed; ValueError if one leads back to a folder that it lies in. Hidden files and folders,
    and __MACOSX, hold what editors, notebooks and archives leave there: they are skipped. So are the masks of images.
    """
    if empty and not root.is_dir():
        return []
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give one that holds images")
    paths = find_files(root, SUFFIXES)
    if any(path.name.endswith(MASK) for path in paths):
        named = {path.with_suffix("") for path in paths}
        paths = [path for path in paths if not (path.name.endswith(MASK) and Path(str(path)[: -len(MASK)]) in named)]
    if not paths and not empty:
        raise FileNotFoundError(f"{root} holds no images ({' '.join(sorted(SUFFIXES))})")
    return paths


def find_files(root: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder that have one of these suffixes, in any case, as `find_images` does."""
    return sorted(_walk(root, (), suffixes))


def is_skipped(name: str) -> bool:
    """Return whether a file or folder of this name is not one of the user's own."""
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, above: tuple[str, ...], suffixes: Collection[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to {real}, which it lies in: remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_skipped(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*above, real), suffixes)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                yield folder / entry.name


class Examined(NamedTuple):
    """What an image is before it is transformed."""

    size: Shape  # upright
    ignored: str = ""  # what it holds that reading ignores
    content: bytes = b""  # the hash of its file
    fault: str = ""  # what is wrong with it, in a sentence that names it, if it cannot be used


def examine(
    source: Callable[[int], tuple[Path | bytes, str]],
    count: int,
    identity: Callable[[int], Identity],
    folder: str | Path | None = None,
) -> list[Examined]:
    """Decode `count` images, by as many threads as there are cores: Pillow does it without holding Python's lock.

    What is known of images is not found out again, in this process or, with a folder, by others. Faults are: they may
    come from what is not installed.

    Args:
        source: index -> a file or the bytes of one, and what errors call it.
        identity: index -> as of `file_identity`.
        folder: keeps what is known, in images.sqlite, and has the images' content hashed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with warnings.catch_warnings(), _memory(folder) as memory, ThreadPoolExecutor(cores) as pool:  # filters: of all
        identities = [_identity(identity, i) for i in range(count)]
        found: list[Any] = [_recall(memory, one) for one in identities]
        missing = [i for i, one in enumerate(found) if one is None]
        with progress_bar(total=len(missing), desc="examining images", unit="image", delay=2) as bar:
            for start in range(0, len(missing), 512):
                rows, some = [], missing[start : start + 512]
                made = pool.map(lambda i: _examine(source, i, folder is not None), some)
                for i, one in zip(some, made, strict=True):
                    found[i], row = one, (*identities[i], *one.size, one.ignored, one.content)
                    if not one.fault:
                        rows.append((*row, _checksum(row)))
                    bar.update()
                with memory:  # a transaction: what is known then is kept by a process that is killed
                    memory.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return found


def file_identity(path: Path, place: int = 0) -> Identity:
    """Return the identity of what lies at this place in a file."""
    status = path.stat()
    return os.fsencode(os.path.abspath(path)) + b":%d" % place, f"{status.st_size} {status.st_mtime_ns}"


def _identity(identity: Callable[[int], Identity], index: int) -> Identity:
    try:
        return identity(index)
    except (OSError, ValueError):  # which reading it says, too
        return b"", ""


def _examine(find: Callable[[int], tuple[Path | bytes, str]], index: int, hashed: bool) -> Examined:
    try:
        source, name = find(index)
        if isinstance(source, Path) and not os.path.exists(source):
            return Examined((0, 0), fault=f"{name} is a link to a file that does not exist")
        size, ignored = examine_image(source, name)
        content = source if isinstance(source, bytes) else source.read_bytes() if hashed else b""
        return Examined(size, ignored, sha256(content).digest() if hashed else b"")
    except (OSError, ValueError) as error:
        return Examined((0, 0), fault=str(error))


@contextmanager
def _memory(folder: str | Path | None) -> Iterator[sqlite3.Connection]:
    """Open the table of what is known; one that is damaged is made anew. OSError where it cannot be written."""
    if folder is None:
        yield _HERE
        return
    path = Path(folder) / "images.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=600)) as memory:
            sound = memory.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # not of damage: it shows below
        sound = True
    except sqlite3.DatabaseError:
        sound = False
    if not sound:
        path.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=600)) as memory:
            memory.execute(_TABLE)
            yield memory
    except sqlite3.Error as error:
        raise OSError(f"cannot keep in {str(path)!r} what is known of images: {error}") from None


def _recall(memory: sqlite3.Connection, identity: Identity) -> Examined | None:
    """Return what is known of an image, if it has not changed, and its row has not."""
    row = memory.execute("SELECT * FROM images WHERE name = ? AND stamp = ?", identity).fetchone()
    if row is None or _checksum(row[:-1]) != row[-1]:
        return None
    return Examined(row[2:4], *row[4:6])


def _checksum(row: tuple) -> int:
    return zlib.crc32(repr(row).encode())


_HERE = sqlite3.connect(":memory:", check_same_thread=False)
_HERE.execute(_TABLE)
