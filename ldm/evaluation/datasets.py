"""The real images: from the file that ships, or from the data set itself where it is at hand."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm.data.captioned import CaptionedDigits
from ldm.evaluation.networks import Measuring
from ldm.evaluation.reference import STATISTICS, Reference, load_reference, measure_reference
from ldm.models.classifier import INNER, inner

HELD_OUT = {"mnist": 5000, "digits": 200}  # the last training images, to choose settings on: no config trains on them


def open_data(dataset: str, split: str, root: str | None, size: int = INNER) -> tuple[CaptionedDigits, CaptionedDigits]:
    """Open `mnist` or `digits`; return the images to compare with and the training images.

    Args:
        split: "test", or "heldout" for the last training images, with the others for training.
        size: side of the images without their padding: 28, or what MNIST can be pooled to.

    Raises:
        FileNotFoundError: MNIST is not there.
        ValueError: the name is unknown, or there are no images of that size.
    """
    if dataset not in HELD_OUT or split not in ("test", "heldout"):
        raise ValueError(f"data set {dataset!r}, split {split!r}: use mnist or digits, test or heldout")
    if dataset == "mnist":
        from ldm.data.mnist import MNIST, SIDE

        if SIDE % size:
            raise ValueError(
                f"there is no MNIST of {size} x {size} pixels: its {SIDE} x {SIDE} can be pooled to 14, 7, 4 or 2"
            )

        def make(**which: Any) -> CaptionedDigits:
            return MNIST(root, pool=SIDE // size, **which)

    else:
        from ldm.data.digits import Digits as make

        if root is not None:
            raise ValueError(f"--data {root} is for MNIST and would have no effect on scikit-learn's digits")
        if size != INNER:
            raise ValueError(f"scikit-learn's digits are 28 x 28 pixels: there are none of {size} x {size}")

    if split == "test":
        return make(split="test"), make(split="train")
    count, last = len(make(split="train")), HELD_OUT[dataset]
    return make(split="train", last=last), make(split="train", first=count - last)


def find_reference(
    dataset: str, split: str, root: str | None, networks: Measuring, n: int | None
) -> tuple[Reference, Tensor | None]:
    """Return the reference for n images (None: all), and the training images, uint8 (m, h, w), or None without them.

    Args:
        root: folder of MNIST. None takes LDM_DATA or ./data, and does without where neither has it.

    Raises:
        FileNotFoundError: MNIST is needed, or its folder was named, and it is not there.
        ValueError: there are not n reference images.
    """
    reference = load_reference() if (dataset, split) == ("mnist", "test") and STATISTICS.is_file() else None
    if reference is not None and reference.networks != networks.fingerprints:
        reference = None  # measured in another network's features
    try:
        real, training = open_data(dataset, split, root, networks.size)
    except FileNotFoundError:
        if reference is None or root is not None:
            raise
        pool = None
    else:
        pool = inner(training.images[:, 0], networks.size)
        if reference is None:
            sizes = [len(real) if n is None else n]
            reference = measure_reference(f"{dataset} {split}", real, training, networks, sizes)
        else:
            reference = replace(reference, images=inner(real.images[:, 0], networks.size))
    if n is not None and n > len(reference.labels):
        raise ValueError(f"{n} images are more than the {len(reference.labels)} of {reference.name}: use a lower --n")
    return reference, pool
