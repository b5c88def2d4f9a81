"""The captions and classes of a folder's images: NAME.txt or NAME.caption beside NAME.png, tables, or sub-folders."""

import csv
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from posixpath import normpath
from typing import Any
from unicodedata import normalize

from ldm.checks import few, shorten
from ldm.data.caption_choice import number_classes, split_captions
from ldm.data.finding import find_files, is_skipped

SIDECARS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "captions.csv")  # the first two are Hugging Face's
JSON_LINE = '{"file_name": "a.png", "text": "a caption"}'


def read_captions(
    root: Path, paths: Sequence[Path], everything: Sequence[Path], otherwise: str | Mapping[str, str | None] | None
) -> tuple[list[list[str]], dict[int, str], list[Path]]:
    """Return the captions of each of `paths`, of the images `everything` below `root`, what is wrong, by index, and
    the caption files that belong to no image.

    An image's captions are the lines of the first of its own files (`_own_files`) that has one, else what the tables
    list. `otherwise` is the caption of images that have none, or an empty one: one for all, or by their paths from
    root. Programs that write captions leave an empty file when they fail. It is not taken for the empty prompt, which
    is the null condition: that would train what guidance leads away from.

    Raises ValueError for a folder without captions, and, naming the file, for a caption without image or a bad line.
    """
    names, every = ([path.relative_to(root).as_posix() for path in some] for some in (paths, everything))
    listed, files = _read_tables(root, set(every)), _caption_files(root)
    others = otherwise if isinstance(otherwise, Mapping) else dict.fromkeys(names, otherwise)
    captions: list[list[str]] = []
    faults, empty = {}, []
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        try:
            own, source = _own_captions(path, _own_files(files, name), listed.get(name))
        except ValueError as error:  # its file is not text
            own, source, faults[index] = [], path, str(error)
        other = others.get(name)
        captions.append(own or ([] if other is None else [other]))
        if own == []:
            empty.append(source)
        if not captions[-1] and index not in faults:
            faults[index] = f"the caption of {source} is empty" if own == [] else f"{path} has no caption"
    if len(faults) == len(paths) and not empty:
        raise ValueError(
            f"none of the {len(paths)} images in {root} has a caption: write {paths[0].stem}.txt beside "
            f"{paths[0].name}, or a line in captions.csv, or train without (configs/folder/unconditional.yaml)"
        )
    if empty and not faults and any(map(any, captions)):
        note = f"{len(empty)} captions are empty, and the caption for all is used instead: {few(empty, 3)}"
        print(f"note: {note}", file=sys.stderr)
    known = {path for name in every for path in _own_files(files, name)}
    return captions, faults, sorted({path for some in files.values() for path in some} - known)


def has_captions(root: Path, paths: Sequence[Path]) -> bool:
    """Return whether there are captions of some of these images below `root`."""
    files = _caption_files(root)
    owned = (_own_files(files, path.relative_to(root).as_posix()) for path in paths)
    return any((root / name).is_file() for name in TABLES) or any(owned)


def _form(name: str) -> str:
    """Return the one form of a path from the root: systems differ in its separators and accents (NFC, NFD)."""
    return normpath(normalize("NFC", name.replace("\\", "/")))


def _caption_files(root: Path) -> dict[str, list[Path]]:
    """Return the caption files below a folder by the form of their paths from there, without suffix."""
    files = defaultdict(list)
    for path in find_files(root, SIDECARS):
        files[_form(path.relative_to(root).with_suffix("").as_posix())].append(path)
    return files


def _own_files(files: Mapping[str, list[Path]], name: str) -> list[Path]:
    """Return the files that may have an image's captions, the first first: NAME.txt, NAME.caption, NAME.png.txt ..."""
    stem, _, _ = name.rpartition(".")
    return [
        path
        for key in (stem, name)
        for path in sorted(files.get(_form(key), ()), key=lambda path: SIDECARS.index(path.suffix.lower()))
    ]


def _own_captions(path: Path, files: Sequence[Path], listed: list[str] | None) -> tuple[list[str] | None, Path]:
    """Return the captions of an image and the file that has them; [] if all are empty, None if it has none."""
    found = None, path
    for file in files:
        found = split_captions(_read_text(file)), file
        if found[0]:
            return found
    return found if listed is None else (listed, path)


def _read_tables(root: Path, names: set[str]) -> dict[str, list[str]]:
    """Return the captions that the tables of a folder list, by the path of the image from there; [] if all are empty.

    Several lines of an image, or a list in one, are captions to choose from.
    """
    listed: dict[str, list[str]] = defaultdict(list)
    forms = {_form(name): name for name in names}
    for path in (root / name for name in TABLES):
        rows = _json_rows if path.suffix == ".jsonl" else _csv_rows
        for number, given, text in rows(path) if path.is_file() else ():
            where = f"{path}, line {number}:"
            name = given if not isinstance(given, str) or given in names else forms.get(_form(given))
            if not isinstance(name, str):
                raise ValueError(f"{where} there is no image {shorten(repr(given))} below {root}")
            texts = text if isinstance(text, list) else [text]
            if wrong := [one for one in texts if not isinstance(one, str)]:
                raise ValueError(f"{where} the caption {shorten(repr(wrong[0]))} is not a text")
            listed[name] += filter(None, map(str.strip, texts))
    return listed


def _json_rows(path: Path) -> Iterator[tuple[int, Any, Any]]:
    """Yield number, file name and text of each line."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines: captions may have U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield number, row["file_name"], row["text" if "text" in row else "caption"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not of the form {JSON_LINE}: {line[:80]!r}") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, Any, Any]]:
    """Yield line number, file name and text of each row. Spreadsheets separate by commas, semicolons or tabs."""
    text = _read_text(path)
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    rows = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        columns = rows.fieldnames or []
        caption = "text" if "text" in columns else "caption"
        if [columns.count(name) for name in ("file_name", caption)] != [1, 1]:
            raise ValueError(
                f"{path} needs a first line that names its columns, file_name,text, once each, not "
                f"{shorten(repr(columns))}"
            )
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {rows.line_num}, has not the {len(columns)} fields of the first line: "
                    f'put a caption that has {separator!r} in quotes, as in a.png{separator}"red{separator} round"'
                )
            yield rows.line_num, row["file_name"], row[caption]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}, is not a line of a csv file: {error}") from None


def read_classes(root: Path, paths: Sequence[Path], everything: Sequence[Path]) -> tuple[list[str], list[int]]:
    """Return the classes, and the number of the class of each of `paths`, of the images `everything` below `root`.

    The classes are the sub-folders of `root`, sorted. Raises ValueError for an image that lies in none.
    """
    places = [path.relative_to(root).parts for path in everything]
    if outside := [path for path, parts in zip(everything, places, strict=True) if len(parts) == 1]:
        raise ValueError(
            f"{few(outside, 3)} is of no class ({len(outside)} of {len(places)} images): each class is a sub-folder of "
            f"{root}, by its name"
        )
    classes, numbers = number_classes([parts[0] for parts in places])
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not is_skipped(entry.name)}
    if empty := sorted(folders - {parts[0] for parts in places}):
        print(f"note: folders without images are left out: {few(empty, 3)}", file=sys.stderr)
    labels = dict(zip(everything, numbers, strict=True))
    return classes, [labels[path] for path in paths]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
