"""scikit-learn's digits at 32 x 32."""

import math

import numpy as np
import torch
from conftest import refused
from sklearn.datasets import load_digits

from ldm.data.digits import Digits
from ldm.data.measure import classify_styles


def bicubic(small: int, large: int) -> np.ndarray:
    """Matrix (large, small) of cubic convolution with a = -0.75 (Keys 1981, equation 4), edges repeated."""
    matrix = np.zeros((large, small))
    for row in range(large):
        centre = (row + 0.5) * small / large - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            s, a = abs(centre - tap), -0.75
            near = (a + 2) * s**3 - (a + 3) * s**2 + 1
            far = a * (s**3 - 5 * s**2 + 8 * s - 4)
            matrix[row, min(max(tap, 0), small - 1)] += near if s <= 1 else far
    return matrix


def test_splits() -> None:
    train, test = Digits(), Digits(split="test")
    assert (len(train), len(test)) == (1400, 397)
    assert torch.cat([train.labels, test.labels]).tolist() == load_digits().target.tolist()
    assert len(Digits(first=1200)) + len(Digits(last=200)) == 1400
    assert torch.bincount(test.labels).min() >= 35  # every digit is tested
    refused("'all'", Digits, split="all")
    refused("398", Digits, split="test", last=398)


def test_enlarged_as_documented() -> None:
    images = Digits().images
    assert images.shape == (1400, 1, 32, 32) and images.dtype == torch.uint8
    inner = images[:, :, 2:30, 2:30]
    assert images.sum() == inner.sum()  # the border is background
    weights = bicubic(8, 28)
    original = load_digits().images[:1400] * (255 / 16)
    expected = np.einsum("yi,nij,xj->nyx", weights, original, weights).round().clip(0, 255)
    # float32 against float64 can round a value at .5 the other way.
    assert np.abs(inner[:, 0].numpy() - expected).max() <= 1
    assert (inner[:, 0].numpy() == expected).mean() > 0.999
    sample = Digits()[0]["image"]
    assert sample.shape == (1, 32, 32) and sample.min() == -1 and sample.max() <= 1


def test_styles_have_thresholds_of_their_own() -> None:
    data = Digits()
    styles = classify_styles(data.images, Digits.thresholds)
    for own, again in zip(data.styles, styles, strict=True):
        assert own.equal(again)
        assert 0.25 < (torch.bincount(own) / 1400).min()  # near the 30 / 40 / 30 that the thresholds aim at
    bold = classify_styles(data.images).weight == 2
    assert bold.float().mean() > 0.95  # by MNIST's measure nearly all of them are bold


def test_captions_and_epochs() -> None:
    data = Digits(seed=1, frames="unseen", styled=1.0)
    sample = data[3]
    assert sample["label"] == 3 and sample["caption"] == data.caption_of(3).text and max(sample["stated"]) >= 0
    data.set_epoch(1)
    assert data.caption_of(3).text != sample["caption"]
