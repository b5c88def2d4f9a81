"""Images in tar shards as webdataset writes them, read by position in an order that follows from (seed, epoch).

webdataset's own pipeline streams the files: its order depends on the processes and workers, and an epoch starts only at
its beginning. wids, its sibling, has positions, but unpickles index files that it finds beside the shards. Training
here resumes at any image on any number of processes, so the headers of the members are read once (24,000 images a
second), and a sample is one read of its bytes. Only images, texts, JSON and class numbers are read, by this package;
nothing is unpickled or extracted, so a member's path is only a name.

The order is local, as disks like it. Images of 40 kB a second, of 48 shards of 40 MB on a virtual disk, none in memory:
4,500 in random order, 6,500 with 16 shards mixed, 7,400 with 4, 20,100 one after the other; 29,000 all in memory.

The rule of names is webdataset's: members in a row with equal names up to the first dot of the file are one sample, and
what follows the dot says what it is.
"""

import json
import math
import os
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from glob import glob
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from ldm.checks import Range, check_file, few, shorten
from ldm.data.caption_choice import MOST_CLASSES, Captions, check_class, split_captions, uncaptioned
from ldm.data.finding import MASK, Identity, file_identity
from ldm.data.image_formats import SUFFIXES
from ldm.data.image_set import ImageSet

CAPTIONS = (".txt", ".caption", ".json")
MOST_SHARDS = 2**20
KINDS = ("image", *CAPTIONS, ".cls", MASK)


@dataclass(eq=False, repr=False)
class Shards(ImageSet):
    """The images of tar files on a local disk, in the order of the files.

    A sample is as of an `ImageSet`. Its captions are the lines of .txt or .caption, or the "caption" or "text" of .json
    (a text or a list); its class is the integer in .cls, and `classes` are the lines of classes.txt beside the first
    shard, or the numbers; its mask is the member .mask.png. Other members are not read.

    Raises ValueError, naming the shard, for one that is damaged, compressed, or has an image without caption or class
    where these are read.
    """

    # A path, a glob or a brace range, or a list of them: "DIR/{000..099}.tar". A folder stands for its .tar files.
    root: str | Sequence[str] | None
    _: KW_ONLY
    caption: str | None = None  # for images that have none, or an empty one, which otherwise cannot be used
    # How many shards are shuffled together: shards come in a new order in every epoch, so many at a time, and their
    # images are mixed. Fewer means that a disk reads less here and there.
    mixed: Annotated[int, Range(1)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paths = find_shards(self.root)
        tables = [np.array([*_table(path)], np.int64).reshape(-1, len(KINDS), 2) for path in self.paths]
        self.members = np.concatenate(tables)  # of all images: offset and size of each of KINDS, -1 where there is none
        if not len(self.members):
            raise ValueError(f"{few(self.paths, 3)}: these shards hold no images ({' '.join(sorted(SUFFIXES))})")
        self.starts = np.cumsum([0, *map(len, tables)])  # of each shard's images
        faults = uncaptioned(self) if "caption" in self.reads and self.caption is None else {}
        kept = self.choose(len(self.members), faults)
        self.members, self.starts = self.members[kept], np.searchsorted(kept, self.starts)
        if "caption" in self.reads:
            self.captions = Captions(self, self.caption)
        if "label" in self.reads:
            self.labels = [self._label(index) for index in range(len(self))]
            self.classes = self._classes(self.paths[0].with_name("classes.txt"))

    def __len__(self) -> int:
        return len(self.members)

    def source(self, index: int) -> tuple[bytes, str]:
        return self._content(index, "image"), self.name(index)

    def identity(self, index: int) -> Identity:
        return file_identity(self._shard(index), int(self.members[index, 0, 0]))

    def mask_source(self, index: int) -> tuple[bytes, str] | None:
        there = self.members[index, KINDS.index(MASK), 0] >= 0
        return (self._content(index, MASK), self.name(index, MASK)) if there else None

    def shuffled(self, generator: torch.Generator) -> Iterator[int]:
        """Yield all indices: shards in random order, the images of `mixed` of them at a time shuffled.

        With no more shards than that it is the permutation of all images, as of every other data set.
        """
        count = len(self.paths)
        order = torch.arange(count) if count <= self.mixed else torch.randperm(count, generator=generator)
        for together in order.split(self.mixed):
            parts = [torch.arange(self.starts[shard], self.starts[shard + 1]) for shard in together.tolist()]
            indices = torch.cat(parts)
            yield from indices[torch.randperm(len(indices), generator=generator)].tolist()

    def _shard(self, index: int) -> Path:
        return self.paths[bisect_right(self.starts, index) - 1]

    def _content(self, index: int, kind: str) -> bytes:
        """Return the bytes of a member. To open the file anew takes 8 microseconds, and works in every process."""
        offset, size = self.members[index, KINDS.index(kind)].tolist()
        with open(self._shard(index), "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int, kind: str = "image") -> str:
        """Return the shard and the name of a member, from its header, the block before its content."""
        with open(self._shard(index), "rb") as file:
            file.seek(self.members[index, KINDS.index(kind), 0] - tarfile.BLOCKSIZE)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        return f"{self._shard(index)}: {header.name}"

    def _text(self, index: int, kind: str) -> str | None:
        if self.members[index, KINDS.index(kind), 0] < 0:
            return None
        try:
            return self._content(index, kind).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name(index, kind)} is not UTF-8 text: {error}") from error

    def own_captions(self, index: int) -> list[str]:
        """Return the captions of the first of an image's members that has some; [] if there are none, or empty ones."""
        for kind in CAPTIONS:
            text = self._text(index, kind)
            if text and (found := self._json_captions(index, text) if kind == ".json" else split_captions(text)):
                return found
        return []

    def _json_captions(self, index: int, text: str) -> list[str]:
        try:
            content = json.loads(text)
            given = content.get("caption", content.get("text", []))
        except (ValueError, AttributeError, RecursionError):
            given = None
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            where = f"{self.name(index, '.json')} is not of the form"
            raise ValueError(f'{where} {{"caption": "a red kite"}}: {shorten(repr(text))}')
        return [one.strip() for one in texts if one.strip()]

    def _label(self, index: int) -> int:
        text = self._text(index, ".cls")
        if text is None:
            raise ValueError(f"{self.name(index)} is of no class: write its number, from 0, to a member .cls beside it")
        number = int(text) if text.strip().isdecimal() and len(text) < 100 else -1
        return check_class(number, MOST_CLASSES, f"{self.name(index, '.cls')}: {shorten(repr(text))}")

    def _classes(self, path: Path) -> list[str]:
        """Return the names of the classes, which a file may list, or else their numbers."""
        count = max(self.labels) + 1
        if not path.is_file():
            return [str(number) for number in range(count)]
        names = split_captions(path.read_text(encoding="utf-8-sig"))
        if not count <= len(names) <= MOST_CLASSES:
            known = f"{path} names {len(names):,} classes, one in a line"
            raise ValueError(f"{known}: the shards have class {count - 1}, and at most {MOST_CLASSES:,} are possible")
        return names


def find_shards(root: str | Sequence[str] | None) -> list[Path]:
    """Return the files that paths, folders, globs and brace ranges name; those of a glob or folder sorted by name."""
    if root is None:
        raise ValueError("no shards are given: name them with data.params.root='DIR/{000..099}.tar'")
    found: list[Path] = []
    for text in [root] if isinstance(root, str) else root:
        if "://" in text or text.startswith("pipe:"):
            raise ValueError(f"shards are files on a local disk, and {shorten(repr(text))} is none: fetch them first")
        for name in [text] if os.path.exists(text) else _braces(text):  # Path.exists raises for a long name
            if os.path.isdir(name):
                paths = sorted(Path(name).glob("*.tar"))
            else:
                paths = [Path(match) for match in ([name] if os.path.exists(name) else sorted(glob(name)))]
            if not paths:
                raise FileNotFoundError(f"there are no shards {shorten(repr(name))}: give DIR/{{000..099}}.tar or such")
            for path in paths:
                check_file(path, "shard")
            found += paths
            _check_count(len(found), text)
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise ValueError(f"{few(twice)}: this shard is named twice")
    return found


def _check_count(count: int, text: str) -> None:
    if count > MOST_SHARDS:
        raise ValueError(f"{shorten(repr(text))} names {count:,} shards or more: at most {MOST_SHARDS:,} are possible")


def _braces(text: str) -> Iterator[str]:
    """Yield the names of a brace range, as in a shell."""
    if "{" not in text:
        return iter([text])
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise ValueError(f"brace ranges such as {text!r} need webdataset's package: pip install webdataset") from None
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", text)
    limits = ([int(part[:99] or 1) for part in one] for one in ranges)  # Python converts no more than 4,300 digits
    _check_count(math.prod(abs(last - first) // max(1, step) + 1 for first, last, step in limits), text)
    try:
        return braceexpand(text)
    except ValueError as error:  # unbalanced
        raise ValueError(f"shards {shorten(repr(text))}: {error}") from None


def _table(path: Path) -> Iterator[list[tuple[int, int]]]:
    """Yield offset and size of each of KINDS, for each sample of a shard that has an image."""
    for key, members in _samples(path):
        images = [place for suffix, place in members.items() if suffix in SUFFIXES]
        if len(images) > 1:
            raise ValueError(f"{path}: the sample {key!r} has {len(images)} images: each has one, of one format")
        if images:
            yield [*images, *(members.get(kind, (-1, 0)) for kind in KINDS[1:])]


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield key and members of each sample of a shard: suffix -> offset and size of the content, in bytes.

    Raises ValueError for a damaged one, where the damage begins.
    """
    size, last, members = path.stat().st_size, "", {}
    with open(path, "rb") as file:
        try:
            opened: Any = tarfile.open(fileobj=file, mode="r:")  # the colon: not compressed
            with opened as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # it would keep all of them
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if member.issparse():  # it says the size of the file, and not how much of it is stored
                        raise tarfile.ReadError(f"{member.name!r} is sparse: write the shard without that (tar -S)")
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    if not member.isreg() or not stem or not suffix:
                        continue
                    key = f"{folder}/{stem}"
                    if key != last and members:
                        yield last, members
                        members = {}
                    last = key
                    if f".{suffix.lower()}" in members:
                        raise tarfile.ReadError(f"it has two members {member.name}")
                    members[f".{suffix.lower()}"] = (member.offset_data, member.size)
                file.seek(tar.offset)  # tarfile takes a damaged header for the end
                if any(file.read(tarfile.BLOCKSIZE)):
                    raise tarfile.ReadError(f"no member begins at byte {tar.offset:,}")
        # the last two for headers of names: one after the other without end, or of a size that no memory holds
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            kind = "is not a tar file, or a compressed or damaged one"
            raise ValueError(f"shard {str(path)!r} {kind}: {error}") from error
    if members:
        yield last, members
