"""What data sets of a user's own images share, wherever the images lie: how a sample is made of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from torch.utils.data import Dataset

from ldm.checks import Range
from ldm.data.caption_choice import choose_caption
from ldm.data.captions import Caption
from ldm.data.image_files import read_image
from ldm.data.transforms import Transform


class ImageSet(Dataset):
    """Images, and what `reads` names of them. A sample is a dict:
        image    float32 (channels, height, width) in [-1, 1]
        caption  str, one of the image's captions, as a function of (seed, epoch, index)
        label    int, the number of its class

    A subclass has `__len__` and `source`, and sets what it reads of all images: `captions`, some for each, and `labels`
    with `classes`, their names; then it calls `set_shapes`.

    Args:
        size, crop, flip, seed, buckets: As in `Transform`.
        channels: 3, or 1 for grey.
        shuffle_tags_after: As in `choose_caption`.
        reads: What a sample has.
    """

    captions: Sequence[Sequence[str]]
    labels: Sequence[int]
    classes: Sequence[str]

    def __init__(
        self,
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        buckets: Sequence[Sequence[int]] | None = None,
        shuffle_tags_after: Annotated[int, Range(0)] | None = None,
        reads: Sequence[str] = ("image", "caption"),
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is 1 (grey) or 3 (colour), not {channels!r}")
        self.transform = Transform(size, crop, flip, seed, buckets)
        self.size, self.channels, self.epoch = size, channels, 0
        self.augments = self.transform.augments
        self.seed, self.shuffle_tags_after, self.reads = seed, shuffle_tags_after, tuple(reads)

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """Return an image's file, or the bytes of it, and what errors call it."""
        raise NotImplementedError

    def set_shapes(self) -> None:
        """Find the shape (width, height) that each image gets; with buckets that opens every image."""
        if self.transform.buckets is None:
            self.shapes, self.groups = [(self.size, self.size)] * len(self), None
        else:
            self.shapes = [self.transform.shape(*self._read(index).size) for index in range(len(self))]
            self.groups = self.shapes

    def _read(self, index: int) -> Image.Image:
        source, name = self.source(index)
        return read_image(source, self.channels, name)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption(self, index: int) -> Caption:
        """Return the caption of an image in this epoch, without digit or style."""
        return Caption(choose_caption(self.captions[index], self.seed, self.epoch, index, self.shuffle_tags_after))

    def texts(self) -> list[str]:
        return [text for captions in self.captions for text in captions]

    def without_image(self, index: int) -> dict[str, Any]:
        """Return a sample without its image, which is not read."""
        sample: dict[str, Any] = {"caption": self.caption(index).text} if "caption" in self.reads else {}
        return sample | ({"label": self.labels[index]} if "label" in self.reads else {})

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        image = self.transform(self._read(index), self.epoch, index, self.shapes[index])
        return {"image": image, **self.without_image(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]
