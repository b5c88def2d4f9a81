"""Images of a data set of Hugging Face's library `datasets`: in a folder, or fetched from the hub by name."""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from ldm.checks import few, shorten
from ldm.data.caption_choice import MOST_CLASSES, Captions, check_class, number_classes, uncaptioned
from ldm.data.image_set import ImageSet


@dataclass(eq=False, repr=False)
class HuggingFace(ImageSet):
    """The rows of a data set, in their order, with a column of images, one of captions and one of classes.

    A sample is as of an `ImageSet`. A caption is a text or a list of texts; a class is a number from 0 or a text.
    Images are read by this package, so in its formats only, and no code of a data set runs.
    """

    root: str | None  # a folder that `save_to_disk` wrote, a folder or file of Parquet or Arrow, or a name on the hub
    _: KW_ONLY
    caption: str | None = None  # for images that have none, or an empty one, which otherwise cannot be used
    split: str | None = None  # the part to train on. None: the only one, or "train"
    subset: str | None = None  # of a name on the hub, which of its data sets
    # Whether to fetch a name from the hub; Hugging Face's library keeps what was fetched in its own folder.
    download: bool = False
    image: str = "image"  # the name of the column of images
    text: str = "text"  # the name of the column of captions
    label: str = "label"  # the name of the column of classes

    def __post_init__(self) -> None:
        super().__post_init__()
        root, reads = self.root, self.reads
        if root is None:
            raise ValueError("no data set is given: name a folder, or a data set of the hub, with data.params.root")
        if self.mask == "file":
            raise ValueError("mask 'file' is for folders and shards: a data set of Hugging Face has 'alpha' only")
        data = load_split(root, self.split, self.subset, self.download)
        for what, option in {"image": "image", "caption": "text", "label": "label"}.items():
            name = getattr(self, option)
            if what in reads and name not in data.column_names and (what != "caption" or self.caption is None):
                raise ValueError(
                    f"{root!r} has no column {name!r} of the {what}s, only {few(data.column_names, 20)}: name it with "
                    f"data.params.{option}"
                )
        self.rows = range(len(data))
        self.paths = [Path(file["filename"]) for file in data.cache_files]  # which say whether two data sets are one
        self.images = _column(data, self.image)
        self.own = _column(data, self.text) if self.text in data.column_names else None
        self.rows = self.choose(len(data), uncaptioned(self) if "caption" in reads and self.caption is None else {})
        if "caption" in reads:
            self.captions = Captions(self, self.caption)
        if "label" in reads:
            self.labels, self.classes = self._classes(data, self.label)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """Return what errors call an image."""
        return f"{self.root}: row {self.rows[index]}"

    def source(self, index: int) -> tuple[Path | bytes, str]:
        found = self.images[self.rows[index]][self.image]
        content, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, found)
        if isinstance(content, bytes):
            return content, self.name(index)
        if not isinstance(path, str):
            raise ValueError(f"{self.name(index)}: the image {shorten(repr(found))} is neither bytes nor a path")
        return Path(path), self.name(index)

    def own_captions(self, index: int) -> list[str]:
        """Return the captions of an image; [] if there are none, or empty ones."""
        found = None if self.own is None else self.own[self.rows[index]][self.text]
        texts = [found] if isinstance(found, str) else found or []
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise ValueError(f"{self.name(index)}: the caption {shorten(repr(found))} is not a text")
        return [one.strip() for one in texts if one.strip()]

    def _classes(self, data: Any, column: str) -> tuple[list[int], list[str]]:
        """Return the number of each image's class and the names of all classes."""
        every = list(data[column])
        found, names = [every[row] for row in self.rows], getattr(data.features[column], "names", None)
        if all(isinstance(one, str) for one in found):
            names, found = number_classes(found)
        for index, one in enumerate(found):
            check_class(one, MOST_CLASSES if names is None else len(names), f"{self.name(index)}: {shorten(repr(one))}")
        return found, list(map(str, range(max(found) + 1))) if names is None else names


def load_split(root: str, split: str | None, subset: str | None, download: bool) -> Any:
    """Return a split of a data set; raise ValueError or OSError, in a sentence, where there is none."""
    try:
        import datasets
    except ImportError:
        raise ValueError("a data set of Hugging Face needs its library: pip install datasets") from None
    folder = Path(root)
    for name, value in (("subset", subset), ("download", download)):
        if value and folder.exists():
            raise ValueError(f"{name} is for names on the hub, and {root!r} is here: leave it out")
    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data: Any = datasets.load_from_disk(root)
        elif folder.exists():
            files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
            kinds = [kind for kind in ("parquet", "arrow") if any(file.suffix == f".{kind}" for file in files)]
            if not kinds:
                raise FileNotFoundError(f"{root!r} has neither Parquet nor Arrow files, nor what save_to_disk writes")
            # By the name of the format: a script in the folder is not looked for.
            where = (root, None) if folder.is_dir() else (None, root)
            data = datasets.load_dataset(kinds[0], None, *where)
        elif download:
            data = datasets.load_dataset(root, subset, trust_remote_code=False)
        else:
            what = "is neither a folder nor a file: if it is a name on the Hugging Face hub,"
            raise FileNotFoundError(f"{root!r} {what} data.params.download=true fetches it")
    except Exception as error:  # of many kinds; some messages have several lines
        if isinstance(error, FileNotFoundError) and not download:
            raise
        raise ValueError(f"the data set {root!r} cannot be read: {' '.join(str(error).split())[:400]}") from error
    if isinstance(data, dict):
        wanted = split or (next(iter(data)) if len(data) == 1 else "train")
        if wanted not in data:
            raise ValueError(f"{root!r} has no split {wanted!r}, only {few(data, 20)}: set data.params.split")
        if split is None and len(data) > 1:
            note = f"{root!r} has the splits {few(data, 20)}, of which 'train' is used: data.params.split names another"
            print(f"note: {note}", file=sys.stderr)
        return data[wanted]
    if split is not None and split != str(data.split):
        raise ValueError(f"{root!r} has no split {split!r}, it is one data set: leave out data.params.split")
    return data


def _column(data: Any, name: str) -> Any:
    """Return a column alone, so that a row reads nothing else; images not decoded, which is this package's part."""
    from datasets import Image

    only = data.with_format(None).select_columns([name])
    return only.cast_column(name, Image(decode=False)) if isinstance(data.features[name], Image) else only
