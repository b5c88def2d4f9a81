"""Measuring images of another size than 28 x 28, by networks made for that size."""

import gzip

import numpy as np
import pytest
import torch
from conftest import refused
from test_evaluation import small_networks
from test_mnist import idx

from ldm.evaluation import networks, samples
from ldm.evaluation.datasets import find_reference
from ldm.evaluation.networks import Measuring
from ldm.evaluation.reference import load_reference, save_reference
from ldm.images import to_pil


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory):
    """60 training and 40 test images of bright bars, as MNIST's files."""
    root = tmp_path_factory.mktemp("data")
    raw, rng = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for name, count in (("train", 60), ("t10k", 40)):
        images = np.zeros((count, 28, 28), np.uint8)
        for image in images:
            row, column = rng.integers(2, 12, 2)
            image[row : row + 14, column : column + 5] = rng.integers(100, 256, (14, 5))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return str(root)


def test_images_of_fourteen_pixels_are_measured_by_networks_for_them(tmp_path, mnist_root):
    measuring = Measuring.load(**small_networks(tmp_path, 14))
    assert measuring.size == 14
    reference14, training = find_reference("mnist", "test", mnist_root, measuring, 30)
    assert reference14.images.shape[1:] == training.shape[1:] == (14, 14) and list(reference14.floors) == [30]
    path = tmp_path / "statistics.safetensors"
    save_reference(reference14, path)
    assert torch.equal(load_reference(path).images, reference14.images[:1000])
    images = samples.from_pil(to_pil(torch.zeros(3, 1, 14, 14)), 14)
    assert images.shape == (3, 14, 14) and networks.classify(measuring.judge, images).shape == (3,)
    refused("scikit-learn's digits are 28 x 28", find_reference, "digits", "test", None, measuring, 30)


def test_networks_of_two_sizes_are_refused(tmp_path):
    judge, features = small_networks(tmp_path, 14)["judge"], small_networks(tmp_path, 28)["features"]
    refused("judge looks at 14 x 14 pixels and the feature network at 28 x 28", Measuring.load, judge, features)
