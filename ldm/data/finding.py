"""The images of a folder: found, and examined before training, so that none is found to be damaged in the middle."""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm.data.buckets import Shape
from ldm.data.image_files import examine_image
from ldm.images import SUFFIXES


def find_images(root: Path, empty: bool = False) -> list[Path]:
    """Return the images below a folder, sorted by name. FileNotFoundError if there are none, unless it may be empty.

    Links to folders are followed; ValueError if one leads back to a folder that it lies in. Hidden files and folders,
    and __MACOSX, hold what editors, notebooks and archives leave there: they are skipped.
    """
    if empty and not root.is_dir():
        return []
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give one that holds images")
    paths = sorted(_walk(root, ()))
    if not paths and not empty:
        raise FileNotFoundError(f"{root} holds no images ({' '.join(sorted(SUFFIXES))})")
    return paths


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to {real}, which it lies in: remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield folder / entry.name


class Examined(NamedTuple):
    """What an image is before it is transformed."""

    size: Shape  # upright
    fault: str = ""  # what is wrong with it, in a sentence that names it, if it cannot be used
    ignored: str = ""  # what it holds that reading ignores


def examine(source: Callable[[int], tuple[Path | bytes, str]], count: int) -> list[Examined]:
    """Decode `count` images, by as many threads as there are cores: Pillow does it without holding Python's lock.

    source: index -> a file or the bytes of one, and what errors call it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bar = {"desc": "examining images", "unit": "image", "delay": 2, "leave": False}
    with warnings.catch_warnings(), ThreadPoolExecutor(cores) as pool:  # filters are not the threads' own
        return list(tqdm(pool.map(lambda index: _examine(*source(index)), range(count)), total=count, **bar))


def _examine(source: Path | bytes, name: str) -> Examined:
    try:
        if isinstance(source, bytes):
            return Examined(*examine_image(source, name))
        status = source.stat()
        return _examine_file(source, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        return Examined((0, 0), f"{name} is a link to a file that does not exist")
    except (OSError, ValueError) as error:
        return Examined((0, 0), str(error))


@lru_cache(2**20)
def _examine_file(path: Path, changed: int, size: int) -> Examined:
    """Examine a file once, however many stages train on it."""
    try:
        return Examined(*examine_image(path))
    except ValueError as error:
        return Examined((0, 0), str(error))
