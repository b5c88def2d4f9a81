"""The base class of MNIST and scikit-learn's digits: grey images with captions of their label and measured style."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import Caption, Captioner
from ldm.data.measure import MNIST_THRESHOLDS, Thresholds, classify_styles


class CaptionedDigits(Dataset):
    """Digits in memory.

    A sample is a dict:
        image    float32 (1, h, w) in [-1, 1]
        caption  str, a function of (seed, epoch, index)
        label    int, the digit
        style    (weight, slant), the measured classes of the image: indices into measure.STROKE_WEIGHTS and SLANTS
        stated   (weight, slant), the same as far as the caption states it, else -1

    `images` are uint8 (n, 1, h, w), `labels` int64 (n,), `styles` the style classes of all images.
    """

    thresholds: ClassVar[Thresholds] = MNIST_THRESHOLDS
    augments: ClassVar[bool] = False  # pixels do not change between epochs, so latents can be cached; captions do

    def __init__(self, images: Tensor, labels: Tensor, captioner: Captioner):
        assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(labels)
        self.images, self.labels, self.captioner = images, labels, captioner
        self.styles = classify_styles(images, self.thresholds)
        # As Python numbers: reading them from tensors one by one costs more than the rest of a sample.
        self._facts = list(zip(labels.tolist(), self.styles.weight.tolist(), self.styles.slant.tolist(), strict=True))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption_of(self, index: int) -> Caption:
        """Return the caption of an image in this epoch."""
        return self.captioner.caption(self.epoch, index, *self._facts[index])

    def texts(self) -> list[str]:
        return self.captioner.texts()

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch of samples, which torch's loader prefers, with one conversion for all images."""
        images = self.images[torch.as_tensor(indices)].float().div_(127.5).sub_(1)  # b 1 h w
        return [{"image": image, **self.without_image(i)} for image, i in zip(images.unbind(0), indices, strict=True)]

    def without_image(self, index: int) -> dict[str, Any]:
        """Return a sample without its image."""
        caption = self.caption_of(index)
        label, weight, slant = self._facts[index]
        stated = tuple(-1 if value is None else value for value in (caption.weight, caption.slant))
        return {"caption": caption.text, "label": label, "style": (weight, slant), "stated": stated}


def subset(count: int, first: int | None, last: int | None) -> slice:
    """Return the slice of the first or the last so many of `count` images, or of all if both are None."""
    if first is not None and last is not None:
        raise ValueError(f"give first or last, not both (first={first}, last={last})")
    for name, wanted in (("first", first), ("last", last)):
        if wanted is not None and not 1 <= wanted <= count:
            raise ValueError(f"{name} must be from 1 to {count}, the number of images, not {wanted}")
    return slice(first) if last is None else slice(count - last, count)
