"""Stroke weight and slant of handwritten digits, measured on the image: captions state them, evaluation checks them.

Both measures use grey values, not a hard threshold, so that an autoencoder's slight blur or noise rarely changes a
class. Strokes are light on a dark background. With the brightness v in [0, 1], *ink* is v stretched between two grey
levels, clip((v - low) / (high - low), 0, 1): the low one suppresses noise in the background, the high one makes a
slightly blurred stroke as black as a sharp one.

*Stroke weight*, in pixels: 2 * area / perimeter, where the area is the sum of the ink (low 0.25, high 0.75) and the
perimeter its total variation, the sum of the length of its gradient (the co-area formula: the mean length of the ink's
level lines). A stroke of length L and width w has area L * w and perimeter about 2 * L, so this is its width averaged
along the stroke. It is global: a filled loop counts as a very bold stroke.

*Slant*, in degrees, positive = leaning to the right: the shear angle atan(-mu11 / mu02) of the ink (low 0.1, high 0.9),
with mu the central second moments, y downwards; shearing the image back by it removes the correlation of x and y (the
deskewing of LeCun et al. 1998, "Gradient-based learning applied to document recognition"). It is global too: the bar of
a 7 or the tail of a 9 counts, so an upright 7 measures 2 degrees and an upright 0 measures 12 (medians).

Of 12,000 MNIST training images 99.0 % keep their weight class after noise (33.5 dB), 95.7 % after blur (31.2 dB) and
97.2 % after projection on 250 principal components (29.4 dB); without the grey levels 80.2, 79.4 and 96.0 %, with mean
depth by grey erosions 94.2, 64.5 and 91.8 %. Slant: 99.6, 99.5 and 99.2 %.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

STROKE_WEIGHTS = ("thin", "medium", "bold")
SLANTS = ("left", "upright", "right")

_WEIGHT_LEVELS = (0.25, 0.75)
_SLANT_LEVELS = (0.1, 0.9)
_CHUNK = 512  # images at a time, so that the intermediate results stay in the cache


class Thresholds(NamedTuple):
    """The limits of the style classes: stroke weight in pixels, slant in degrees.

    thin < weight[0] <= medium <= weight[1] < bold;  left < slant[0] <= upright <= slant[1] < right.
    """

    weight: tuple[float, float]
    slant: tuple[float, float]


class Styles(NamedTuple):
    """The style classes of n images, int64 (n,): indices into STROKE_WEIGHTS and SLANTS, -1 if there is no ink."""

    weight: Tensor
    slant: Tensor


# MNIST's 60,000 training images, quantiles 5 / 30 / 50 / 70 / 95 %: weight 1.63 / 2.12 / 2.41 / 2.75 / 3.69 pixels,
# slant -18.6 / -2.0 / 5.9 / 14.1 / 29.8 degrees. Weight is cut at its 30 and 70 % quantiles. Slant is cut 10 degrees
# either side of the usual 5: at the 30 % quantile a stroke still looks upright.
MNIST_THRESHOLDS = Thresholds(weight=(2.1, 2.75), slant=(-5.0, 15.0))


def stroke_weight(images: Tensor) -> Tensor:
    """Return the mean stroke width of images (n, [1,] h, w) in pixels, float32 (n,); NaN for one without ink."""
    return torch.cat([_stroke_weight(_ink(chunk, *_WEIGHT_LEVELS)) for chunk in _planes(images)])


def slant(images: Tensor) -> Tensor:
    """Return the shear angle in degrees, positive if leaning right, float32 (n,); NaN for an image without ink."""
    return torch.cat([_slant(_ink(chunk, *_SLANT_LEVELS)) for chunk in _planes(images)])


def classify_styles(images: Tensor, thresholds: Thresholds = MNIST_THRESHOLDS) -> Styles:
    """Return the weight and slant classes of images (n, [1,] h, w), uint8 or float in [-1, 1]."""
    return Styles(_classes(stroke_weight(images), thresholds.weight), _classes(slant(images), thresholds.slant))


def _classes(values: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return torch.where(values.isnan(), -1, (values >= low).long() + (values > high).long())


def _planes(images: Tensor) -> tuple[Tensor, ...]:
    if images.ndim == 4 and images.shape[1] == 1:
        images = rearrange(images, "n 1 h w -> n h w")
    if images.ndim != 3:
        raise ValueError(f"style is measured on images of shape (n, h, w) or (n, 1, h, w), not {tuple(images.shape)}")
    return images.split(_CHUNK)


def _ink(images: Tensor, low: float, high: float) -> Tensor:
    """Return the ink in [0, 1], float32, of (n, h, w) uint8 or [-1, 1], as one scale and shift."""
    scale, shift = (1 / 255, 0.0) if images.dtype == torch.uint8 else (0.5, 0.5)
    return images.float().mul(scale / (high - low)).add_((shift - low) / (high - low)).clamp_(0, 1)


def _stroke_weight(ink: Tensor) -> Tensor:
    area = ink.sum((1, 2))
    padded = F.pad(ink, (1, 1, 1, 1))
    # Roberts' diagonal differences: the gradient at the corner between four pixels, equally sharp in all directions.
    falling = padded[:, 1:, 1:] - padded[:, :-1, :-1]
    rising = padded[:, 1:, :-1] - padded[:, :-1, 1:]
    perimeter = falling.square_().add_(rising.square_()).sqrt_().sum((1, 2)) / 2**0.5
    return torch.where(area > 0, 2 * area / perimeter, torch.nan)


def _slant(ink: Tensor) -> Tensor:
    area = ink.sum((1, 2))
    y = torch.arange(ink.shape[1], dtype=ink.dtype, device=ink.device)
    x = torch.arange(ink.shape[2], dtype=ink.dtype, device=ink.device)
    rows, columns = ink.sum(2), ink.sum(1)
    dy = y - (rows @ y / area)[:, None]
    dx = x - (columns @ x / area)[:, None]
    mu11 = torch.einsum("nyx,ny,nx->n", ink, dy, dx)
    mu02 = (rows * dy.square()).sum(1)
    # 0 / 0 gives NaN, as it should, for an image of one row; without ink dy is NaN already.
    return torch.rad2deg(torch.atan(-mu11 / mu02))
