"""A folder of images: with captions, with a sub-folder for each class, or with neither."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ldm.checks import few
from ldm.data.finding import MASK, find_images
from ldm.data.folder_captions import read_captions, read_classes
from ldm.data.image_set import ImageSet


@dataclass(eq=False, repr=False)
class Folder(ImageSet):
    """The images below `root`, including sub-folders, sorted by name.

    A sample is as of an `ImageSet`. The captions are the lines of NAME.txt or NAME.caption beside the image, else the
    "text" (or "caption") of its line in root/metadata.jsonl, which may be a list, where "file_name" is the path of the
    image from root: {"file_name": "sub/a.png", "text": "a red kite"}; or in root/captions.csv, whose first line is
    file_name,text. The class is the sub-folder of root that the image lies in; `classes` are sorted by name.

    Every image is read once, unless it is known, so that none is found to be damaged in the middle of training. Raises
    ValueError, naming the file, for an image without caption or class where these are read, a caption without image or
    a bad line.
    """

    root: str | Path | None  # the folder. None is the placeholder in configs that a user must replace
    _: KW_ONLY
    # For images that have none, or an empty one, which otherwise cannot be used: one for all, which may be "", or by
    # their paths from root.
    caption: str | Mapping[str, str | None] | None = None
    # Only these images below `root`; none: all. Kept as texts, since 100,000 Paths take 20 MB more.
    paths: Sequence[str | Path] = ()

    def __post_init__(self) -> None:
        if self.root is None:
            raise ValueError("no folder of images is given: name it with data.params.root=DIR (or root)")
        super().__post_init__()
        self.root = Path(self.root)
        everything = find_images(self.root)
        paths = [*map(Path, self.paths)] or everything
        self.paths = [*map(str, paths)]
        if self.mask is None and (ignored := [path for path in paths if path.with_suffix(MASK).is_file()]):
            what = "have a mask beside them, which denoising stages use with data.params.mask=file"
            print(f"note: {len(ignored)} of {len(paths)} images {what}: {few(ignored, 3)}", file=sys.stderr)
        faults, unused = {}, []
        if "caption" in self.reads:
            self.captions, faults, unused = read_captions(self.root, paths, everything, self.caption)
        if "label" in self.reads:
            self.classes, self.labels = read_classes(self.root, paths, everything)
        kept = self.choose(len(paths), faults, unused)
        self.paths = [self.paths[i] for i in kept]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> tuple[Path, str]:
        return Path(self.paths[index]), str(self.paths[index])

    def mask_source(self, index: int) -> tuple[Path, str] | None:
        path = Path(self.paths[index]).with_suffix(MASK)
        return (path, str(path)) if path.is_file() else None
