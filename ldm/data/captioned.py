"""What MNIST and scikit-learn's digits share: grey images of digits whose captions state label and measured style."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import Caption, Captioner
from ldm.data.measure import MNIST_THRESHOLDS, Thresholds, classify


class CaptionedDigits(Dataset):
    """Digits in memory. A sample is a dict of

    image    float32 (1, h, w) in [-1, 1]
    caption  str, a function of (seed, epoch, index)
    label    int, the digit
    style    (weight, slant), the measured classes of the image, as indices into measure.WEIGHTS and SLANTS
    said     (weight, slant), what the caption states of them, -1 where it is silent

    Attributes: images uint8 (n, 1, h, w), labels int64 (n,), styles (measure.Styles), thresholds, augments (False:
    pixels are the same in every epoch, so that latents can be cached; captions are not).
    """

    thresholds: ClassVar[Thresholds] = MNIST_THRESHOLDS
    augments: ClassVar[bool] = False

    def __init__(self, images: Tensor, labels: Tensor, captioner: Captioner):
        assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(labels)
        self.images, self.labels, self.captioner = images, labels, captioner
        self.styles = classify(images, self.thresholds)
        # Captions want Python numbers; taking them out of tensors one by one costs more than the rest of a sample.
        self._facts = list(zip(labels.tolist(), self.styles.weight.tolist(), self.styles.slant.tolist(), strict=True))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Captions of the following samples are those of `epoch`."""
        self.epoch = epoch

    def caption(self, index: int) -> Caption:
        """The caption of an image in this epoch, and what it asserts."""
        return self.captioner.caption(self.epoch, index, *self._facts[index])

    def texts(self) -> list[str]:
        """Texts that hold every word of the captions, for a vocabulary."""
        return self.captioner.texts()

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch of samples at once: torch's loader prefers it, and one conversion serves all images."""
        images = self.images[torch.as_tensor(indices)].float().div_(127.5).sub_(1)  # b 1 h w
        return [self._sample(image, index) for image, index in zip(images.unbind(0), indices, strict=True)]

    def _sample(self, image: Tensor, index: int) -> dict[str, Any]:
        caption = self.caption(index)
        label, weight, slant = self._facts[index]
        said = tuple(-1 if stated is None else stated for stated in (caption.weight, caption.slant))
        return {"image": image, "caption": caption.text, "label": label, "style": (weight, slant), "said": said}


def part(count: int, first: int | None, last: int | None) -> slice:
    """The slice of `count` images that are the first or the last so many; all of them when both are None.

    Raises ValueError when both are given, or more than there are.
    """
    if first is not None and last is not None:
        raise ValueError(f"give first or last, not both (first={first}, last={last}).")
    for name, wanted in (("first", first), ("last", last)):
        if wanted is not None and not 1 <= wanted <= count:
            raise ValueError(f"{name} must be from 1 to the {count} images that there are, not {wanted}.")
    if last is not None:
        return slice(count - last, count)
    return slice(0, count if first is None else first)
