"""A folder of images: with captions, with a sub-folder for each class, or with neither."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from ldm.checks import Range, few
from ldm.data.finding import MASK, find_images
from ldm.data.folder_captions import read_captions, read_classes
from ldm.data.image_files import Alpha
from ldm.data.image_set import ImageSet, Mask, OnError
from ldm.data.transforms import Resize


class Folder(ImageSet):
    """The images below `root`, including sub-folders, sorted by name.

    A sample is as of an `ImageSet`. The captions are the lines of NAME.txt or NAME.caption beside the image, else the
    "text" of its line in root/metadata.jsonl, which may be a list, where "file_name" is the path of the image from
    root: {"file_name": "sub/a.png", "text": "a red kite"}; or in root/captions.csv, whose first line is file_name,text.
    The class is the sub-folder of root that the image lies in; `classes` are sorted by name.

    Args:
        root: The folder. None is the placeholder in configs that a user must replace.
        size: Pixels of the square to make.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        crop: "center", or "random", at a place that is a function of (seed, epoch, index).
        flip: Mirror half of the images, likewise as a function of (seed, epoch, index).
        seed: Of crops, mirroring and captions.
        caption: For images that have none, or an empty one, one for all or by their paths from root, which may be "";
            without it an image that has none cannot be used.
        paths: Only these images below `root`, instead of all.
        buckets: Shapes (width, height) to make instead of the square: each image gets the one nearest in aspect ratio,
            which `shapes` lists. Images of different shapes cannot share a batch (`groups`).
        shuffle_tags_after: Shuffle the comma-separated tags of a caption, all but the first so many, anew in each
            epoch; None leaves them in order.
        reads: What a sample has. In training it follows from the stage: an autoencoder needs no captions.
        alpha: "keep" with 2 and 4 channels; "composite" with 1 and 3. None: as the channels say.
        background: The colour that transparency is composited over, such as white or "#808080".
        on_error: "refuse" raises ValueError for images that cannot be used, such as damaged ones, and lists them;
            "skip" leaves them out, and lists them as a note.
        cache_dir: A folder that keeps what is known of the images, for this and other runs: by a file's path, size and
            time of change, its width and height, and the hash of its content.
        resize: "shorter" crops an image to the square, or its bucket's aspect ratio, and resizes it (Lanczos); "exact"
            resizes all of it, distorted; "none" cuts the square or bucket out of the image, which may not be smaller.
        mask: What weighs the loss of denoising over an image: "file", the grey image NAME.mask.png beside NAME.png, of
            its size, or "alpha", its own. White counts, black does not; an image without a mask counts whole. Without
            this argument NAME.mask.png is not read, nor taken for an image.

    Every image is read once, unless it is known, so that none is found to be damaged in the middle of training. Raises
    ValueError, naming the file, for an image without caption or class where these are read, a caption without image or
    a bad line.
    """

    def __init__(
        self,
        root: str | Path | None,
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        caption: str | Mapping[str, str | None] | None = None,
        paths: list[Path] | None = None,
        buckets: Sequence[Sequence[int]] | None = None,
        shuffle_tags_after: Annotated[int, Range(0)] | None = None,
        reads: Sequence[str] = ("image", "caption"),
        alpha: Alpha | None = None,
        background: str = "white",
        on_error: OnError = "refuse",
        resize: Resize = "shorter",
        cache_dir: str | None = None,
        mask: Mask | None = None,
    ):
        if root is None:
            raise ValueError("no folder of images is given: name it with data.params.root=DIR (or root)")
        fields = shuffle_tags_after, reads, alpha, background, on_error, resize, cache_dir, mask
        super().__init__(size, channels, crop, flip, seed, buckets, *fields)
        self.root = Path(root)
        everything = find_images(self.root)
        self.paths = everything if paths is None else paths
        if mask is None and (ignored := [path for path in self.paths if path.with_suffix(MASK).is_file()]):
            what = "have a mask beside them, which denoising stages use with data.params.mask=file"
            print(f"note: {len(ignored)} of {len(self.paths)} images {what}: {few(ignored, 3)}", file=sys.stderr)
        faults: dict[int, str] = {}
        if "caption" in reads:
            self.captions, faults = read_captions(self.root, self.paths, everything, caption)
        if "label" in reads:
            self.classes, self.labels = read_classes(self.root, self.paths, everything)
        kept = self.choose(len(self.paths), faults)
        self.paths = [self.paths[i] for i in kept]

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, index: int) -> tuple[Path, str]:
        return self.paths[index], str(self.paths[index])

    def mask_source(self, index: int) -> tuple[Path, str] | None:
        path = self.paths[index].with_suffix(MASK)
        return (path, str(path)) if path.is_file() else None
