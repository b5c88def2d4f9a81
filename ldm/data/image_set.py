"""What data sets of a user's own images share, wherever the images lie: how a sample is made of a file."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.checks import Range, few, shorten, unfit
from ldm.data.buckets import Shape
from ldm.data.caption_choice import choose_caption
from ldm.data.captions import Caption
from ldm.data.finding import Examined, Identity, examine, file_identity
from ldm.data.image_files import Alpha, Reader, read_alpha
from ldm.data.transforms import Buckets, Crop, Resize, Side, Transform

Mask = Literal["file", "alpha"]
NAMED = 20  # images that a message names


@dataclass(eq=False, repr=False)
class ImageSet(Dataset):
    """Images, and what `reads` names of them. A sample is a dict:
        image    float32 (channels, height, width) in [-1, 1]
        caption  str, one of the image's captions, as a function of (seed, epoch, index)
        label    int, the number of its class
        sizes    int64 (6,): `ldm.data.transforms.Transform.sizes`
        mask     float32 (1, height, width) in [0, 1], where `mask` says: the weight of each pixel in a denoising loss

    Its options are the fields below. A subclass adds its own, and has `__len__`, `source` and, for masks in files,
    `mask_source`; it sets what it reads of all images, `captions`, some for each, and `labels` with `classes`, their
    names; then it calls `choose`.
    """

    root: Any  # where the images are
    size: Side  # pixels of the square to make
    channels: int = 3  # 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA
    crop: Crop = "center"  # "random" at a place that is a function of (seed, epoch, index)
    flip: bool = False  # mirror half of the images, likewise as a function of (seed, epoch, index)
    seed: int = 0  # of crops, mirroring and captions
    caption: Any = None  # for images that have none, or an empty one, which otherwise cannot be used; it may be ""
    # Shapes (width, height) to make instead of the square: each image gets the one nearest in aspect ratio, which
    # `shapes` lists. Images of different shapes cannot share a batch (`groups`).
    buckets: Buckets | None = None
    # Shuffle the comma-separated tags of a caption, all but the first so many, anew in each epoch; None leaves them in
    # order.
    shuffle_tags_after: Annotated[int, Range(0)] | None = None
    # What a sample has. In training it follows from the stage: an autoencoder needs no captions.
    reads: Sequence[str] = ("image", "caption")
    alpha: Alpha | None = None  # "keep" with 2 and 4 channels; "composite" with 1 and 3. None: as the channels say
    background: str = "white"  # the colour that transparency is composited over, such as white or "#808080"
    # "refuse" raises ValueError for images that cannot be used, such as damaged ones, and lists them; "skip" leaves
    # them out, and lists them as a note.
    on_error: Literal["refuse", "skip"] = "refuse"
    # "shorter" crops an image to the square, or its bucket's aspect ratio, and resizes it (Lanczos); "exact" resizes
    # all of it, distorted; "none" cuts the square or bucket out of the image, which may not be smaller.
    resize: Resize = "shorter"
    # A folder that keeps what is known of the images, for this and other runs: by a file's path, size and time of
    # change, its width and height, and the hash of its content.
    cache_dir: str | None = None
    # What weighs the loss of denoising over an image: "file", the grey image NAME.mask.png beside NAME.png, of its
    # size (a data set of Hugging Face has none), or "alpha", its own. White counts, black does not; an image without a
    # mask counts whole. Without this NAME.mask.png is not read, nor taken for an image.
    mask: Mask | None = None
    captions: Sequence[Sequence[str]] = field(init=False)
    labels: Sequence[int] = field(init=False)
    classes: Sequence[str] = field(init=False)
    left_out: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        for option in (option for option in fields(self) if option.init):
            if wanted := unfit(value := getattr(self, option.name), option.type):
                raise ValueError(f"{option.name} {shorten(repr(value))} must be {wanted}")
        if self.mask == "alpha" and self.channels in (2, 4):
            raise ValueError(f"mask 'alpha' needs channels 1 or 3: alpha is an image's own with {self.channels}")
        if self.cache_dir is not None and os.path.isfile(self.cache_dir):
            raise ValueError(f"cache_dir {self.cache_dir!r} is a file: name a folder")
        self.transform = Transform(self.size, self.crop, self.flip, self.seed, self.buckets, self.resize)
        self.read = Reader(self.channels, self.alpha, self.background)
        self.augments = self.flip or self.crop == "random"
        self.epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """Return an image's file, or the bytes of it, and what errors call it."""
        raise NotImplementedError

    def identity(self, index: int) -> Identity:
        """Return what an image is known by, from one start to the next."""
        found = self.source(index)[0]
        return (sha256(found).digest(), "") if isinstance(found, bytes) else file_identity(found)

    def mask_source(self, index: int) -> tuple[Path | bytes, str] | None:
        """Return the file of an image's mask as `source` does; None if it has none."""
        raise NotImplementedError

    def choose(self, count: int, faults: Mapping[int, str] | None = None, unused: Sequence[Path] = ()) -> list[int]:
        """Return which of the `count` images are used, keep what is read of these, and set their (width, height).

        Every image is decoded, unless it is known already, so that none is found to be damaged in the middle of
        training, and what is wrong is settled as `on_error` says. `left_out` then has a sentence for each image and
        file that is not used.

        Args:
            faults: what else is wrong, in a sentence that names the file, by index.
            unused: caption files that belong to no image.
        """
        examined = examine(self.source, count, self.identity, self.cache_dir)
        wrong = dict(faults or {})
        for i, one in enumerate(examined):
            if one.fault:
                wrong[i] = one.fault
            elif fault := self.transform.fault(*one.size):
                wrong[i] = f"{self.source(i)[1]} {fault}"
        if self.mask is not None:
            wrong |= self._mask_faults(examined, [i for i in range(count) if i not in wrong])
        kept = [i for i in range(count) if i not in wrong]
        sentences = [wrong[i] for i in sorted(wrong)]
        self.left_out = [*sentences, *(f"{path} has no image" for path in unused)]
        shown = NAMED if self.on_error == "refuse" or not kept else 3
        some = "; ".join(sentences[:shown]) + ("; ..." if len(wrong) > shown else "")
        if wrong and self.on_error == "refuse":
            which = f"{len(wrong)} of {count} images cannot be used"
            raise ValueError(f"{which}: {some} (on_error=skip leaves them out)")
        if wrong and not kept:
            raise ValueError(f"none of {count} images can be used: {some}")
        if wrong:
            print(f"note: {len(wrong)} of {count} images are left out: {some}", file=sys.stderr)
        if unused:
            print(f"note: {len(unused)} caption files belong to no image: {few(unused, 3)}", file=sys.stderr)
        if ignored := [f"{self.source(i)[1]}: {examined[i].ignored}" for i in kept if examined[i].ignored]:
            print(f"note: ignored in {len(ignored)} of {count} images: {few(ignored, 3)}", file=sys.stderr)
        for name in ("captions", "labels"):
            if hasattr(self, name):
                setattr(self, name, [getattr(self, name)[i] for i in kept])
        one: dict[Shape, Shape] = {}  # object for each shape, not for each image
        self.shapes = [one.setdefault(s, s) for s in (self.transform.shape(*examined[i].size) for i in kept)]
        self.originals = [examined[i].size for i in kept] if "sizes" in self.reads else []
        self.hashes = None if self.cache_dir is None else [examined[i].content for i in kept]
        self.groups = None if self.buckets is None else self.shapes
        return kept

    def _mask_faults(self, examined: Sequence[Examined], indices: Sequence[int]) -> dict[int, str]:
        """Return what is wrong with the masks of these images, by index. ValueError if none has a mask."""

        def look(index: int) -> tuple[bool, str]:  # whether there is a mask, and what is wrong with it
            name, (width, height) = self.source(index)[1], examined[index].size
            try:
                mask = self._read_mask(index)
            except (OSError, ValueError) as error:
                return True, str(error)
            if mask is None:
                return False, ""
            if mask.size != (width, height):
                return True, f"the mask of {name} is {mask.width} x {mask.height} pixels, and it {width} x {height}"
            cut = self.transform.crop == "center"  # a random crop shows another part in every epoch
            seen = self.transform.mask(mask, 0, index, self.transform.shape(width, height)) if cut else mask
            return True, "" if np.any(np.asarray(seen)) else f"the mask of {name} is black: nothing to train on is left"

        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # filters are of all threads
            found = [*pool.map(look, indices)]
        lacking = [self.source(index)[1] for index, (has, _) in zip(indices, found, strict=True) if not has]
        some = f"{len(lacking)} of {len(indices)} images have no mask ({self.mask}): {few(lacking, 3)}"
        if lacking and len(lacking) == len(indices):
            raise ValueError(f"{some}; leave out data.params.mask, or give masks")
        if lacking:
            print(f"note: {some}; they count whole", file=sys.stderr)
        return {index: fault for index, (_, fault) in zip(indices, found, strict=True) if fault}

    def _read_mask(self, index: int) -> Image.Image | None:
        if self.mask == "alpha":
            return read_alpha(*self.source(index))
        found = self.mask_source(index)
        return None if found is None else Reader(1, background="black")(*found)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption_of(self, index: int) -> Caption:
        """Return the caption of an image in this epoch, without digit or style."""
        return Caption(choose_caption(self.captions[index], self.seed, self.epoch, index, self.shuffle_tags_after))

    def texts(self) -> list[str]:
        return [text for captions in self.captions for text in captions]

    def without_image(self, index: int) -> dict[str, Any]:
        """Return a sample without its image, which is read for its alpha only."""
        sample: dict[str, Any] = {"caption": self.caption_of(index).text} if "caption" in self.reads else {}
        if "label" in self.reads:
            sample["label"] = self.labels[index]
        if "sizes" in self.reads:
            own = *self.originals[index], self.epoch, index, self.shapes[index]
            sample["sizes"] = self.transform.sizes(*own)
        if self.mask is not None:
            shape, mask = self.shapes[index], self._read_mask(index)
            ones = torch.ones(1, *shape[::-1])
            sample["mask"] = ones if mask is None else self.transform.mask(mask, self.epoch, index, shape)
        return sample

    def content(self, index: int) -> bytes:
        """Return what the pixels of an image follow from, for caches: its file, its shape, and how both are read."""
        settings = [
            {k: v for k, v in vars(part).items() if k not in ("seed", "buckets")}
            for part in (self.transform, self.read)
        ]
        if self.hashes is None:
            source = self.source(index)[0]
            file = sha256(source if isinstance(source, bytes) else source.read_bytes()).digest()
        else:
            file = self.hashes[index]
        return repr((settings, self.shapes[index])).encode() + file

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        shape = self.shapes[index]
        image = self.read(*self.source(index), least=self.transform.least(shape))
        return {"image": self.transform(image, self.epoch, index, shape), **self.without_image(index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]
