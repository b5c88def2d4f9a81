"""A folder of images: with captions, with a sub-folder for each class, or with neither."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from ldm.checks import Range
from ldm.data.folder_captions import read_captions, read_classes
from ldm.data.image_files import SUFFIXES, check_image
from ldm.data.image_set import ImageSet


class Folder(ImageSet):
    """The images below `root`, including sub-folders, sorted by name.

    A sample is as of an `ImageSet`. The captions are the lines of NAME.txt or NAME.caption beside the image, else the
    "text" of its line in root/metadata.jsonl, which may be a list, where "file_name" is the path of the image from
    root: {"file_name": "sub/a.png", "text": "a red kite"}; or in root/captions.csv, whose first line is file_name,text.
    The class is the sub-folder of root that the image lies in; `classes` are sorted by name.

    Args:
        root: The folder. None is the placeholder in configs that a user must replace.
        size: Pixels of the square to make: the shorter side is resized to it (Lanczos) and the longer is cropped.
        channels: 3, or 1 for grey.
        crop: "center", or "random", at a place that is a function of (seed, epoch, index).
        flip: Mirror half of the images, likewise as a function of (seed, epoch, index).
        seed: Of crops, mirroring and captions.
        caption: For images that have none, or an empty one, one for all or by their paths from root; without it every
            image needs one.
        paths: Only these images below `root`, instead of all.
        buckets: Shapes (width, height) to make instead of the square: each image gets the one nearest in aspect ratio,
            which `shapes` lists. Images of different shapes cannot share a batch (`groups`).
        shuffle_tags_after: Shuffle the comma-separated tags of a caption, all but the first so many, anew in each
            epoch; None leaves them in order.
        reads: What a sample has. In training it follows from the stage: an autoencoder needs no captions.

    Raises ValueError, naming the file, for an image without caption or class where these are read, a caption without
    image, a bad line or a file that is not an image. An image damaged after its header is found only when it is read.
    """

    def __init__(
        self,
        root: str | Path | None,
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        caption: str | Mapping[str, str] | None = None,
        paths: list[Path] | None = None,
        buckets: Sequence[Sequence[int]] | None = None,
        shuffle_tags_after: Annotated[int, Range(0)] | None = None,
        reads: Sequence[str] = ("image", "caption"),
    ):
        if root is None:
            raise ValueError("no folder of images is given: name it with data.params.root=DIR (or root)")
        super().__init__(size, channels, crop, flip, seed, buckets, shuffle_tags_after, reads)
        self.root = Path(root)
        everything = find_images(self.root)
        self.paths = everything if paths is None else paths
        if "caption" in reads:
            self.captions = read_captions(self.root, self.paths, everything, caption)
        if "label" in reads:
            self.classes, self.labels = read_classes(self.root, self.paths, everything)
        for path in self.paths:
            check_image(path)
        self.set_shapes()

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> tuple[Path, str]:
        return self.paths[index], str(self.paths[index])


def find_images(root: Path, empty: bool = False) -> list[Path]:
    """Return the images below a folder, sorted by name. FileNotFoundError if there are none, unless it may be empty."""
    if empty and not root.is_dir():
        return []
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give one that holds images")
    files = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    # Hidden folders hold what editors and notebooks leave there.
    paths = sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts))
    if not paths and not empty:
        raise FileNotFoundError(f"{root} holds no images ({' '.join(sorted(SUFFIXES))})")
    return paths
