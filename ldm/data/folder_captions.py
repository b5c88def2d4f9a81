"""The captions of a folder's images: NAME.txt or NAME.caption beside NAME.png, or Hugging Face's metadata.jsonl."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.checks import few, shorten


def read_captions(
    root: Path, paths: Sequence[Path], everything: Sequence[Path], otherwise: str | Mapping[str, str] | None
) -> list[str]:
    """Return the caption of each of `paths`, of the images `everything` below `root`.

    `otherwise` is the caption of images that have none, or an empty one: one for all, or by their paths from root.
    Raises ValueError, naming the file, for an image without caption, a caption without image or a bad line.
    """
    names = [path.relative_to(root).as_posix() for path in paths]
    listed = _read_metadata(root / "metadata.jsonl", {path.relative_to(root).as_posix() for path in everything})
    others = otherwise if isinstance(otherwise, Mapping) else dict.fromkeys(names, otherwise)
    found = [_own_caption(path, listed.get(name)) for path, name in zip(paths, names, strict=True)]
    captions = [
        _caption(path, text, others.get(name)) for path, name, (text, _) in zip(paths, names, found, strict=True)
    ]
    empty = [source for text, source in found if text == ""]
    if empty and any(captions):
        note = f"{len(empty)} captions are empty, and the caption for all is used instead: {few(empty, 3)}"
        print(f"note: {note}", file=sys.stderr)
    return captions


def _own_caption(path: Path, listed: str | None) -> tuple[str | None, Path]:
    """Return the caption in the first of an image's own files that has one, and that file; "" if all are empty."""
    found = None, path
    for sidecar in (path.with_suffix(".txt"), path.with_suffix(".caption")):
        if sidecar.is_file():
            found = _read_text(sidecar).strip(), sidecar
            if found[0]:
                return found
    return found if listed is None else (listed, path)


def _caption(path: Path, own: str | None, otherwise: str | None) -> str:
    """Return an image's own caption, or the other where it has none.

    Programs that write captions leave an empty file when they fail. It is not taken for the empty prompt, which is the
    null condition: that would train what guidance leads away from.
    """
    if own:
        return own
    if otherwise is not None:
        return otherwise
    if own is None:
        raise ValueError(f"{path} has no caption: write {path.stem}.txt beside it or a line in metadata.jsonl")
    raise ValueError(
        f"the caption of {path} is empty: write one, or set data.params.caption, which may be '', for all such images"
    )


def _read_metadata(path: Path, names: set[str]) -> dict[str, str]:
    """Read captions by file name; {} if there is no such file."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            expected = '{"file_name": "a.png", "text": "a caption"}'
            raise ValueError(f"{path}, line {number}, is not of the form {expected}: {line[:80]!r}") from error
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{path}, line {number}: there is no image {shorten(repr(name))} below {path.parent}")
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: the caption {shorten(repr(text))} is not a text")
        captions[name] = text.strip()
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
