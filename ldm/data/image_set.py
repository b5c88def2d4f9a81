"""What data sets of a user's own images share, wherever the images lie: how a sample is made of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ldm.data.captions import Caption
from ldm.data.image_files import read_image
from ldm.data.transforms import Transform


class ImageSet(Dataset):
    """Images with captions. A sample is {"image": float32 (channels, height, width) in [-1, 1], "caption": str}.

    A subclass sets `captions`, of all images, and has `source`; then it calls `set_shapes`.

    Args:
        size, crop, flip, seed, buckets: As in `Transform`.
        channels: 3, or 1 for grey.
    """

    captions: Sequence[str]

    def __init__(
        self,
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is 1 (grey) or 3 (colour), not {channels!r}")
        self.transform = Transform(size, crop, flip, seed, buckets)
        self.size, self.channels, self.epoch = size, channels, 0
        self.augments = self.transform.augments

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

    def __len__(self) -> int:
        return len(self.captions)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption(self, index: int) -> Caption:
        """Return the caption of an image, without digit or style."""
        return Caption(self.captions[index])

    def texts(self) -> Sequence[str]:
        return self.captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        image = self.transform(self._read(index), self.epoch, index, self.shapes[index])
        return {"image": image, "caption": self.captions[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]
