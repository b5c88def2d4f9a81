"""MNIST's files: read exactly, padded, cut into parts, and every kind of damage named."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

from ldm.data.captions import Captioner
from ldm.data.measure import classify_styles
from ldm.data.mnist import MNIST


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}i", 2048 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def make_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 4:24, 12:16] = rng.integers(200, 256, (count, 20, 4))
    return images, np.arange(count) % 10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 training images and, gzipped, 10 test images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = make_images(20)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(images))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:10])))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[:10])))
    return tmp_path


def test_pooled_images_are_means_of_squares(root: Path):
    whole, pooled = MNIST(str(root)), MNIST(str(root), pool=2)
    assert pooled[3]["image"].shape == (1, 14, 14) and pooled.images.dtype == torch.uint8
    inner = whole.images[:, :, 2:30, 2:30].numpy().astype(float)
    means = (inner[..., ::2, ::2] + inner[..., 1::2, ::2] + inner[..., ::2, 1::2] + inner[..., 1::2, 1::2]) / 4
    assert np.abs(pooled.images.numpy() - means).max() <= 0.5
    assert MNIST(str(root), pool=7, first=5).images.shape == (5, 1, 4, 4)
    # what captions say is measured on the whole image
    assert [pooled.caption_of(i) for i in range(20)] == [whole.caption_of(i) for i in range(20)]


@pytest.mark.parametrize("pool", [0, 3, 5])
def test_a_pool_that_does_not_divide_is_refused(root: Path, pool):
    refused(f"pool {pool} does not divide MNIST's 28 pixels: use 1, 2, 4, 7 or 14", MNIST, str(root), pool=pool)


def test_pixels(root: Path) -> None:
    data = MNIST(root=str(root))
    images, labels = make_images(20)
    assert len(data) == 20 and data.labels.tolist() == labels.tolist() and not data.augments
    for n in (0, 7, -1):
        sample = data[n]
        image = sample["image"]
        assert image.shape == (1, 32, 32) and image.dtype == torch.float32 and sample["label"] == labels[n]
        # x / 127.5 - 1 in float32: exact at 0 and 255, within one rounding between.
        np.testing.assert_allclose(image[0, 2:30, 2:30].numpy(), images[n] / 127.5 - 1, atol=1e-6)
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[2:30, 2:30] = False
        assert (image[0][outside] == -1).all()
    with pytest.raises(IndexError):
        data[20]


def test_gzip_and_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_DATA", str(root))
    test = MNIST(split="test")
    assert len(test) == 10 and test.images.equal(MNIST(first=10).images)
    monkeypatch.setenv("LDM_DATA", "/nowhere")
    assert len(MNIST(root=str(root))) == 20  # the argument wins


def test_parts(root: Path) -> None:
    whole, held = MNIST(root=str(root), first=15), MNIST(root=str(root), last=5)
    assert torch.cat([whole.images, held.images]).equal(MNIST(root=str(root)).images)
    assert held.labels.tolist() == [5, 6, 7, 8, 9]
    for arguments in ({"first": 0}, {"last": 21}, {"first": 3, "last": 3}):
        refused("first|last", MNIST, root=str(root), **arguments)
    refused("'validation'", MNIST, root=str(root), split="validation")


def test_samples_and_captions(root: Path) -> None:
    data = MNIST(root=str(root), seed=4)
    assert data.styles.weight.equal(classify_styles(data.images).weight)
    data.set_epoch(3)
    batch = data.__getitems__([19, 2, 2])
    for index, sample in zip((19, 2, 2), batch, strict=True):
        style = tuple(int(classes[index]) for classes in data.styles)
        expected = Captioner(4).caption(3, index, int(data.labels[index]), *style)
        assert sample["caption"] == expected.text == data.caption_of(index).text and sample["style"] == style
        assert sample["stated"] == tuple(-1 if c is None else c for c in (expected.weight, expected.slant))
        assert sample["image"].equal(data[index]["image"])
    assert data[-1]["caption"] == data[19]["caption"]
    texts = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        texts.append([data.caption_of(n).text for n in range(20)])
    assert texts[0] != texts[1]


def test_loader_collates(root: Path) -> None:
    loader = torch.utils.data.DataLoader(MNIST(root=str(root)), batch_size=8)
    batch = next(iter(loader))
    assert batch["image"].shape == (8, 1, 32, 32) and len(batch["caption"]) == 8
    assert batch["label"].tolist() == list(range(8)) and torch.stack(batch["stated"], 1).shape == (8, 2)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FOREIGN, SIZES, PACKED = "is not the MNIST file of that name", "but its header says", ".gz is corrupt"
DAMAGE = {  # what is wrong -> the file, its content from the undamaged one, and what is said of it
    "empty": (IMAGES, lambda content: b"", FOREIGN),
    "magic": (IMAGES, lambda content: b"\x89PNG" + content[4:], FOREIGN),
    "swapped": (IMAGES, lambda content: idx(np.arange(20) % 10), FOREIGN),
    "truncated": (IMAGES, lambda content: content[:-1], SIZES),
    "too long": (IMAGES, lambda content: content + b"\0", SIZES),
    "negative size": (IMAGES, lambda content: content[:4] + struct.pack(">i", -20) + content[8:], SIZES),
    "huge size": (IMAGES, lambda content: content[:4] + struct.pack(">3i", *[2**31 - 1] * 3) + content[16:], SIZES),
    "wrong shape": (IMAGES, lambda content: idx(np.zeros((20, 14, 56))), "not 28 x 28"),
    "fewer labels": (LABELS, lambda content: idx(np.zeros(19)), "19 labels for the 20 images"),
    "label 10": (LABELS, lambda content: idx(np.full(20, 10)), "a label 10"),
    "gzip truncated": (f"{IMAGES}.gz", lambda content: gzip.compress(content)[:-20], PACKED),
    "gzip flipped": (f"{IMAGES}.gz", lambda content: flipped(gzip.compress(content)), PACKED),
    "no gzip": (f"{IMAGES}.gz", lambda content: content, PACKED),
}


def flipped(content: bytes) -> bytes:
    """The bits of the middle byte inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(root: Path, kind: str) -> None:
    name, damaged, expected = DAMAGE[kind]
    file = root / "MNIST" / "raw" / name
    content = file.with_name(name.removesuffix(".gz")).read_bytes()
    file.with_name(name.removesuffix(".gz")).unlink()
    file.write_bytes(damaged(content))
    with pytest.raises(ValueError) as caught:
        MNIST(root=str(root))
    message = str(caught.value)
    assert "train-" in message and expected in message and "\n" not in message


def test_files_without_images(root: Path) -> None:
    for name, shape in ((IMAGES, (0, 28, 28)), (LABELS, (0,))):
        (root / "MNIST" / "raw" / name).write_bytes(idx(np.zeros(shape)))
    refused("train-.* holds no images", MNIST, root=str(root))


def test_missing_files(tmp_path: Path) -> None:
    refused("LDM_DATA.*download", MNIST, error=FileNotFoundError, root=str(tmp_path / "nowhere"))


def test_download_only_on_request(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    calls = []
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda *args, **named: calls.append((args, named)))
    MNIST(root=str(root))
    assert calls == []
    MNIST(root=str(root), download=True)
    assert calls == [((str(root),), {"train": True, "download": True})]

    def fail(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    refused("no network", MNIST, root=str(root), download=True, error=OSError)


def test_torchvision_is_not_imported(warm_python, root: Path) -> None:
    code = (
        f"import sys; from ldm.data.mnist import MNIST; MNIST(root={str(root)!r}); print('torchvision' in sys.modules)"
    )
    assert warm_python(code).stdout.strip() == "False"


@pytest.mark.skipif("LDM_DATA" not in os.environ, reason="LDM_DATA does not name MNIST")
def test_real_files() -> None:
    train, test = MNIST(), MNIST(split="test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    # Known statistics of MNIST's training pixels on the inner 28 x 28: mean 0.1307, standard deviation 0.3081.
    inner = train.images[:, :, 2:30, 2:30].double() / 255
    assert inner.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert inner.std().item() == pytest.approx(0.3081, abs=5e-5)
