"""Subjects to show DreamBooth on: unusual handwriting, found in MNIST by a rule, and a glyph that is not a digit.

*The printed one*: about one in sixty of MNIST's ones stands on a foot, most of these with a flag, as ones are printed.
The rule is measured on the image: the *foot*, in pixels, is the longest run of ink in any of the four lowest rows
with ink, less the median over the middle rows (30 to 75 % of the height) of each row's longest run; ink is a brightness
of at least 0.4. An image belongs to the subject from FOOT pixels on, and is an ordinary one up to ORDINARY. The model
that ships generates such a one in about one image of a hundred for the prompt of a one.

*The star*: a five-pointed outline, drawn with a pen of varying width, size, place and tilt.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.checkpoint.atomic import write_png
from ldm.evaluation.datasets import HELD_OUT
from ldm.evaluation.networks import Measuring, features_of
from ldm.evaluation.samples import pad
from ldm.models.classifier import inner

FOOT, ORDINARY = 6, 2
INK = 102  # of 255
SHOTS = 5  # images to learn from
ORDINARY_ONES = 500
STARS = 100
DIGITS = 1000  # of all kinds, beside the stars


def foot(images: Tensor) -> Tensor:
    """Return the length of the foot in pixels, int64 (n,), of uint8 (n, 28, 28); 0 for ones of less than 12 rows."""
    ink = (images >= INK).long()
    run, longest = torch.zeros_like(ink[:, :, 0]), torch.zeros_like(ink[:, :, 0])
    for column in ink.unbind(2):  # (n, 28) rows
        run = (run + 1) * column
        longest = torch.maximum(longest, run)
    feet = []
    for rows in longest:
        inked = rows.nonzero()[:, 0].tolist()
        rows = rows[inked[0] : inked[-1] + 1] if inked else rows[:0]
        middle = rows[int(0.3 * len(rows)) : int(0.75 * len(rows))]
        feet.append(int(rows[-4:].max() - middle.median()) if len(rows) >= 12 else 0)
    return torch.tensor(feet)


def printed_ones(root: str | None, networks: Measuring) -> dict[str, Tensor]:
    """Return uint8 (n, 28, 28): SHOTS images to "train", the subject's others "heldout", and ordinary ones "others".

    Those to train on are the nearest in features to the central one (the least mean distance to all others), among
    images that the model that ships was not trained on. FileNotFoundError without MNIST.
    """
    from ldm.data.mnist import MNIST

    test, training = MNIST(root, split="test"), MNIST(root, split="train")
    unseen = len(training) - HELD_OUT["mnist"]
    images = torch.cat([test.images, training.images[unseen:], training.images[:unseen]])
    labels = torch.cat([test.labels, training.labels[unseen:], training.labels[:unseen]])
    new = torch.arange(len(labels)) < len(test) + HELD_OUT["mnist"]
    ones, new = inner(images[labels == 1][:, 0]), new[labels == 1]
    feet = foot(ones)
    chosen = (feet >= FOOT).nonzero()[:, 0]
    features = features_of(networks.features, ones[chosen])
    centre = torch.cdist(features, features).mean(1).argmin()
    distance = (features - features[centre]).norm(dim=1).masked_fill(~new[chosen], torch.inf)
    train = distance.argsort()[:SHOTS]
    rest = torch.ones(len(chosen), dtype=torch.bool).index_fill(0, train, False)
    others = ones[feet <= ORDINARY][:ORDINARY_ONES]
    return {"train": ones[chosen[train]], "heldout": ones[chosen[rest]], "others": others}


def star(seed: int) -> Image.Image:
    """Return a five-pointed star, 28 x 28 grey pixels, white on black, with rounded corners as a pen makes them."""
    uniform = np.random.default_rng(seed).uniform
    side, fine = 28, 8  # rendered eight times as large
    radius, width, tilt = uniform(9.0, 11.0), uniform(1.8, 2.8), uniform(-0.25, 0.25)
    centre = uniform(13.0, 15.0, 2)
    corners = []
    for i in range(10):
        angle, reach = math.pi * i / 5 + tilt, radius if i % 2 == 0 else 0.45 * radius
        corners.append(tuple(fine * (centre + reach * np.array([math.sin(angle), -math.cos(angle)]))))
    canvas = Image.new("L", (side * fine, side * fine))
    ImageDraw.Draw(canvas).line([*corners, *corners[:2]], fill=255, width=round(width * fine), joint="curve")
    return canvas.resize((side, side), Image.Resampling.BOX)


def stars(digits: Tensor) -> dict[str, Tensor]:
    """Return stars as `printed_ones` does; the others are all kinds of digits, uint8 (n, 28, 28)."""
    images = torch.from_numpy(np.stack([np.asarray(star(seed)) for seed in range(SHOTS + STARS)]))
    return {"train": images[:SHOTS], "heldout": images[SHOTS:], "others": digits}


def write_images(parts: dict[str, Tensor], folder: Path) -> None:
    """Write each part as PNG files of 32 x 32, the size of the digit sets, in a sub-folder of its name."""
    for name, images in parts.items():
        for i, image in enumerate(pad(images).numpy()):
            write_png(folder / name / f"{i:03}.png", Image.fromarray(image))
