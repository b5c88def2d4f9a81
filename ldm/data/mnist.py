"""MNIST (LeCun et al. 1998) from files in torchvision's layout, ROOT/MNIST/raw/*-ubyte, plain or .gz.

The 28 x 28 images are padded, not resized, to 32 x 32: two pixels of background on each side. For small teaching models
they can be reduced instead, to 14 x 14 for example, by averaging squares of pixels.
"""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.data.captioned import CaptionedDigits, subset
from ldm.data.captions import Captioner

SIDE = 28
_FILES = {"train": "train", "test": "t10k"}
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049  # the first four bytes of an IDX file: type uint8, three or one dimensions


class MNIST(CaptionedDigits):
    """60,000 training or 10,000 test digits with captions, float32 (1, 32, 32) in [-1, 1], background -1.

    Args:
        root: The folder that holds MNIST/raw; by default the environment variable LDM_DATA, else ./data.
        split: "train" or "test".
        first, last: Only the first or last so many images; configs train on first=55000 and validate on last=5000.
        seed, frames, styled, filler: See `captions.Captioner`.
        download: Let torchvision download the files (11 MB) into root if they are missing.
        pool: Side of the squares that are averaged, 1 for none: 2 gives (1, 14, 14), rounded to 256 values and not
            padded. Captions still state the style measured at full size.
        pad: Whether to pad images that are not averaged; False gives (1, 28, 28).
    """

    def __init__(
        self,
        root: str | None = None,
        split: str = "train",
        first: int | None = None,
        last: int | None = None,
        seed: int = 0,
        frames: str = "train",
        styled: float = 0.5,
        filler: float = 0.0,
        download: bool = False,
        pool: int = 1,
        pad: bool = True,
    ):
        if pool < 1 or SIDE % pool:
            raise ValueError(f"pool {pool} does not divide MNIST's {SIDE} pixels: use 1, 2, 4, 7 or 14")
        captioner = Captioner(seed, frames, styled, filler)
        pixels, labels = read_mnist(root, split, download)
        chosen = subset(len(pixels), first, last)
        images = rearrange(torch.from_numpy(pixels[chosen]), "n h w -> n 1 h w")
        padded = F.pad(images, (2, 2, 2, 2))  # n 1 28 28 -> n 1 32 32
        super().__init__(padded, torch.from_numpy(labels[chosen]).long(), captioner)
        if pool > 1 or not pad:
            self.images = F.avg_pool2d(images.float(), pool).round().to(torch.uint8)  # n 1 28/pool 28/pool


def read_mnist(root: str | None, split: str, download: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 (n, 28, 28) and labels uint8 (n,), writable, and check that they fit each other.

    Args are as of `MNIST`.
    """
    if split not in _FILES:
        raise ValueError(f"MNIST's split is 'train' or 'test', not {split!r}")
    folder = Path(os.environ.get("LDM_DATA", "data") if root is None else root)
    if download:
        _download(folder, split)
    prefix = folder / "MNIST" / "raw" / _FILES[split]
    images_path, labels_path = (_find(Path(f"{prefix}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
    images = _read_idx(images_path, _IMAGES_MAGIC)
    labels = _read_idx(labels_path, _LABELS_MAGIC)
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images_path} is corrupt: its images are {images.shape[1:]}, not 28 x 28")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path} has {len(labels)} labels for the {len(images)} images of {images_path}")
    if len(labels) == 0:
        raise ValueError(f"{images_path} holds no images")
    if labels.max() > 9:
        raise ValueError(f"{labels_path} is corrupt: it has a label {labels.max()}, but the digits end at 9")
    return images, labels


def _find(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"neither {path} nor {path.name}.gz exists: set LDM_DATA to the folder that holds MNIST/raw, or "
        "download it: ldm train ... data.params.download=true"
    )


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Read an IDX file (http://yann.lecun.com/exdb/mnist): magic, sizes as big-endian int32, bytes in C order."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is corrupt: {error}") from error
    size = 4 * (1 + magic % 256)  # the magic number's last byte counts the dimensions
    header = np.frombuffer(content[:size], ">i4") if len(content) >= size else np.zeros(1)
    if header[0] != magic:
        raise ValueError(f"{path} is not the MNIST file of that name: it does not start with the number {magic}")
    shape = tuple(int(size) for size in header[1:])
    body = np.frombuffer(content, np.uint8, offset=header.nbytes)
    if min(shape) < 0 or body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is corrupt: it has {body.size} bytes of data, but its header says {shape}")
    return body.reshape(shape).copy()


def _download(root: Path, split: str) -> None:
    from torchvision.datasets import MNIST as Torchvision  # here: seconds of import that a plain run does not need

    try:
        Torchvision(str(root), train=split == "train", download=True)
    except RuntimeError as error:
        raise OSError(f"MNIST could not be downloaded to {root}: {error}") from error
