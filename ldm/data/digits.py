"""scikit-learn's 1,797 handwritten digits, which come with the library: a data set that needs no download.

They are 8 x 8 images with values 0..16. Each is enlarged to 28 x 28 by bicubic interpolation (align_corners=False,
clipped to the range) and padded with two pixels of background, so that models have MNIST's 32 x 32 and the same style
measures apply. The strokes stay soft and wide for 28 pixels, and the digits were normalised to be upright. Therefore
the style thresholds differ from MNIST's, and the remaining slant is mostly the digit's shape: hardly any 6 leans right
and no 7 leans left.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from ldm.data.captioned import CaptionedDigits, subset
from ldm.data.captions import Captioner
from ldm.data.measure import Thresholds

_TEST = 397  # held out, fixed


class Digits(CaptionedDigits):
    """1,400 training or 397 test digits with captions, float32 (1, 32, 32) in [-1, 1], background -1.

    Args:
        split: "train" (the first 1,400 in scikit-learn's order) or "test" (the last 397).
        first, last, seed, frames, styled, filler: As for `mnist.MNIST`.
    """

    # Training images, quantiles 30 / 70 %: weight 4.60 / 5.35 pixels, slant -5.9 / 1.4 degrees.
    thresholds = Thresholds(weight=(4.6, 5.4), slant=(-6.0, 1.0))

    def __init__(
        self,
        split: str = "train",
        first: int | None = None,
        last: int | None = None,
        seed: int = 0,
        frames: str = "train",
        styled: float = 0.5,
        filler: float = 0.0,
    ):
        if split not in ("train", "test"):
            raise ValueError(f"the digits' split is 'train' or 'test', not {split!r}")
        captioner = Captioner(seed, frames, styled, filler)
        half = slice(None, -_TEST) if split == "train" else slice(-_TEST, None)
        small, labels = (values[half] for values in _load())
        chosen = subset(len(small), first, last)
        super().__init__(_enlarge(small[chosen]), labels[chosen].long(), captioner)


@lru_cache(maxsize=1)  # the stages of a run, and what tries them first, all read the same digits: 20 ms each
def _load() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's images, float64 (1797, 8, 8), and their labels, int64 (1797,)."""
    from sklearn.datasets import load_digits  # here: a second of import

    bunch = load_digits()
    return torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)


def _enlarge(small: torch.Tensor) -> torch.Tensor:
    """Resize and pad (n, 8, 8) with values 0..16 to uint8 (n, 1, 32, 32)."""
    large = F.interpolate(small.float()[:, None] * (255 / 16), size=28, mode="bicubic")  # n 1 28 28
    return F.pad(large.round().clamp(0, 255).to(torch.uint8), (2, 2, 2, 2))  # n 1 32 32
