"""The real images' side of every comparison: prompts, features, floors.

A model generates an image for the caption of each reference image, and its images are compared with these. How well
*other real images* would do is the floor beside each figure: the mean over five random choices of as many training
images as were generated.

For MNIST's test images all of it ships in `ldm/pretrained/statistics.safetensors` (`scripts/evaluate.py statistics`
makes it), so that a model can be measured without MNIST. To stay under 1 MB the file keeps the features of all 10,000
images in 8 bits, each feature on a scale of its own, and only the first 1,000 images, compressed. The rounding moves a
radius of precision and recall by 0.3 % (median; 4 % at most), and the two figures by about 0.001.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint.file import load_file
from ldm.checkpoint.writing import save_file
from ldm.data.captioned import CaptionedDigits
from ldm.data.captions import Caption, Captioner
from ldm.data.measure import Thresholds
from ldm.evaluation.distances import nearest_training_distance, precision_recall, quantiles
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.networks import PRETRAINED, Measuring, classify, features_of
from ldm.models.classifier import INNER, inner
from ldm.util import progress_bar

STATISTICS = PRETRAINED / "statistics.safetensors"
FORMAT = "ldm evaluation statistics 1"
FLOOR_REPEATS = 5
SIZES = (10, 30, 100, 300, 1000, 3000, 5000, 10_000)  # numbers of images whose floors the shipped file holds
SHIPPED_IMAGES = 1000


@dataclass(frozen=True)
class Floor:
    """What n real training images reach against the reference, mean over the repetitions."""

    frechet: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Reference:
    """Real images and what comparisons with them need; all but `images` in the order of the prompts.

    Attributes:
        name: of the data, for the report.
        networks: fingerprints of the judge and the feature network that measured them.
        indices: (n,) place of each in its data set; captions are a function of it.
        labels, weight, slant: int64 (n,), digit and measured classes of style.
        features: float32 (n, d).
        mean, cov: float64, of the features.
        right: bool (n,), whether the judge is right about the real image.
        nearest: (median, first percentile) of the distance to the nearest training image.
        floors: number of images -> Floor.
        thresholds: limits of the classes of style.
        images: uint8 (m, h, w), of the networks' size, all of them or the first m, in the data set's order.
    """

    name: str
    networks: dict[str, str]
    indices: Tensor
    labels: Tensor
    weight: Tensor
    slant: Tensor
    features: Tensor
    mean: Tensor
    cov: Tensor
    right: Tensor
    nearest: tuple[float, float]
    floors: dict[int, Floor]
    thresholds: Thresholds
    images: Tensor

    def captions(self, n: int, frames: str) -> list[Caption]:
        """Return captions of the first n images in "train" or "unseen" frames, half of them with style."""
        captioner = Captioner(seed=0, frames=frames)
        facts = zip(*(x[:n].tolist() for x in (self.indices, self.labels, self.weight, self.slant)), strict=True)
        return [captioner.caption(0, *fact) for fact in facts]

    @property
    def image_labels(self) -> Tensor:
        """Return the labels (m,) of `images`."""
        return torch.empty_like(self.labels).scatter_(0, self.indices, self.labels)[: len(self.images)]

    def floor(self, n: int) -> Floor:
        """Return the floor of n images, interpolated linearly in 1 / n, as the bias is (Chong & Forsyth 2020).

        Raises:
            ValueError: n is beyond the numbers that were measured.
        """
        if n in self.floors:
            return self.floors[n]
        below = max((size for size in self.floors if size < n), default=None)
        above = min((size for size in self.floors if size > n), default=None)
        if below is None or above is None:
            raise ValueError(
                f"no distance between real images is known for {n} images: use {min(self.floors)} to {max(self.floors)}"
            )
        share = (1 / n - 1 / above) / (1 / below - 1 / above)
        low, high = asdict(self.floors[below]), asdict(self.floors[above])
        return Floor(**{name: share * low[name] + (1 - share) * high[name] for name in low})


def measure_reference(
    name: str, real: CaptionedDigits, training: CaptionedDigits, networks: Measuring, sizes: Sequence[int]
) -> Reference:
    """Measure real images, and the floors of `sizes` with images from `training`.

    For MNIST about two CPU minutes, most of it the nearest training images and the floors' recall.
    """
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # any first n are a fair sample
    images, pool = inner(real.images[:, 0], networks.size), inner(training.images[:, 0], networks.size)
    features, pool_features = features_of(networks.features, images)[order], features_of(networks.features, pool)
    mean, cov = moments(features)
    sizes = [n for n in sizes if n <= min(len(real), len(training))]
    bar = progress_bar(sizes, desc="floors", unit="size")
    return Reference(
        name=name,
        networks=networks.fingerprints,
        indices=order,
        labels=real.labels[order],
        weight=real.styles.weight[order],
        slant=real.styles.slant[order],
        features=features,
        mean=mean,
        cov=cov,
        right=(classify(networks.judge, images) == real.labels)[order],
        nearest=quantiles(nearest_training_distance(images, pool)),
        floors={n: measure_floor(features, pool_features, n) for n in bar},
        thresholds=real.thresholds,
        images=images,
    )


def measure_floor(features: Tensor, pool: Tensor, n: int) -> Floor:
    """Return the floor of n images: random rows of pool (m, d) in place of generated ones beside features (r, d)."""
    reference, results = moments(features), []
    for seed in range(FLOOR_REPEATS):
        chosen = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:n]]
        results.append([frechet_distance(*moments(chosen), *reference), *precision_recall(features[:n], chosen)])
    return Floor(*np.mean(results, axis=0).tolist())


def save_reference(reference: Reference, path: str | Path, shown: int = SHIPPED_IMAGES) -> None:
    """Write a reference with its first `shown` images; the module's docstring says what is lost."""
    scale = reference.features.abs().amax(dim=0) / 127  # (d,)
    packed = zlib.compress(reference.images[:shown].numpy().tobytes(), level=9)
    tensors = {
        "indices": reference.indices.to(torch.int16 if len(reference.indices) < 2**15 else torch.int32),
        "features": (reference.features / scale).round().to(torch.int8),
        "scale": scale,
        "mean": reference.mean,
        "cov": reference.cov,
        "right": reference.right,
        "pictures": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
        **{name: getattr(reference, name).to(torch.int8) for name in ("labels", "weight", "slant")},
    }
    config: dict[str, Any] = {
        "format": FORMAT,
        "name": reference.name,
        "networks": reference.networks,
        "nearest": reference.nearest,
        "floors": {str(n): asdict(floor) for n, floor in reference.floors.items()},
        "thresholds": reference.thresholds._asdict(),
        "size": reference.images.shape[-1],
    }
    save_file(path, tensors, config)


def load_reference(path: str | Path = STATISTICS) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    config, tensors = load_file(path)
    if config.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} does not hold {FORMAT!r}: make it with the command evaluate statistics")
    pixels = np.frombuffer(zlib.decompress(tensors["pictures"].numpy().tobytes()), dtype=np.uint8)
    size = config.get("size", INNER)  # older files are of that size and do not state it
    return Reference(
        name=config["name"],
        networks=config["networks"],
        features=tensors["features"].float() * tensors["scale"],
        nearest=tuple(config["nearest"]),
        floors={int(n): Floor(**floor) for n, floor in sorted(config["floors"].items(), key=lambda item: int(item[0]))},
        thresholds=Thresholds(**{name: tuple(limits) for name, limits in config["thresholds"].items()}),
        images=torch.from_numpy(pixels.reshape(-1, size, size).copy()),
        **{name: tensors[name] for name in ("mean", "cov", "right")},
        **{name: tensors[name].long() for name in ("indices", "labels", "weight", "slant")},
    )
