"""Measuring pictures of another size than 28 x 28, by networks made for that size."""

import gzip

import numpy as np
import pytest
import torch
from test_mnist import idx

from ldm.checkpoint.file import save_file
from ldm.evaluation import networks, samples
from ldm.evaluation.datasets import find_reference
from ldm.evaluation.networks import Measuring
from ldm.evaluation.reference import load_reference, save_reference
from ldm.images import to_pil
from ldm.models.classifier import FeatureNetwork, Judge


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory):
    """60 training and 40 test pictures of bright bars, as MNIST's files."""
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


def small_networks(folder, size):
    """Untrained networks for pictures of a size in files."""
    torch.manual_seed(size)
    paths = []
    for kind, params in ((Judge, {"widths": [4, 4, 4]}), (FeatureNetwork, {"widths": [4, 8], "features": 16})):
        params |= {"size": size}
        path = folder / f"{kind.__name__}{size}.safetensors"
        save_file(
            path, kind(**params).state_dict(), {"target": f"ldm.models.classifier.{kind.__name__}", "params": params}
        )
        paths.append(path)
    return paths


def test_images_of_fourteen_pixels_are_measured_by_networks_for_them(tmp_path, mnist_root):
    judge, features = small_networks(tmp_path, 14)
    measuring = Measuring.load(judge, features)
    assert measuring.size == 14
    reference14, training = find_reference("mnist", "test", mnist_root, measuring, 30)
    assert reference14.pictures.shape[1:] == training.shape[1:] == (14, 14) and list(reference14.floors) == [30]
    path = tmp_path / "statistics.safetensors"
    save_reference(reference14, path)
    assert torch.equal(load_reference(path).pictures, reference14.pictures[:1000])
    drawn = samples.from_pil(to_pil(torch.zeros(3, 1, 14, 14)), 14)
    assert drawn.shape == (3, 14, 14) and networks.classify(measuring.judge, drawn).shape == (3,)
    with pytest.raises(ValueError, match="scikit-learn's digits are 28 x 28"):
        find_reference("digits", "test", None, measuring, 30)


def test_networks_of_two_sizes_are_refused(tmp_path):
    judge, features = small_networks(tmp_path, 14)[0], small_networks(tmp_path, 28)[1]
    with pytest.raises(ValueError, match="judge looks at 14 x 14 pixels and the feature network at 28 x 28"):
        Measuring.load(judge, features)
