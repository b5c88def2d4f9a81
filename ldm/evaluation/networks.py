"""The judge and the feature network, loaded from their files and applied to many images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.networks import PRETRAINED
from ldm.evaluation.samples import to_unit
from ldm.loading import load_network
from ldm.models.classifier import INNER

JUDGE, FEATURES = PRETRAINED / "judge.safetensors", PRETRAINED / "features.safetensors"


def load_image_network(path: str | Path, method: str = "forward") -> nn.Module:
    """Load the frozen network of a file, in float32 and on the CPU.

    Args:
        method: what the network must have: "forward" for a judge, "features" for a feature network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds another kind of network, or its weights do not fit its configuration.
    """
    network = load_network(path)
    if not callable(getattr(network, method, None)):
        raise ValueError(f"{str(path)!r} holds a {type(network).__name__}, which has no {method!r}: give another file")
    return network


def fingerprint(path: str | Path) -> str:
    """Return the first 12 hexadecimal digits of a file's SHA-256: figures of different networks do not compare."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Measuring:
    """The two networks, the fingerprints of their files, and the side of the images that both see."""

    judge: nn.Module
    features: nn.Module
    fingerprints: dict[str, str]
    size: int = INNER

    @classmethod
    def load(cls, judge: str | Path | None = None, features: str | Path | None = None) -> "Measuring":
        """Load both from files, None for what ships; ValueError for networks of different sizes."""
        paths = {"judge": JUDGE if judge is None else judge, "features": FEATURES if features is None else features}
        judging, measuring = load_image_network(paths["judge"]), load_image_network(paths["features"], "features")
        sizes = [getattr(network, "size", INNER) for network in (judging, measuring)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the judge looks at {sizes[0]} x {sizes[0]} pixels and the feature network at {sizes[1]} x "
                f"{sizes[1]}: give --judge and --features of one size"
            )
        return cls(judging, measuring, {name: fingerprint(path) for name, path in paths.items()}, sizes[0])


@torch.inference_mode()
def apply(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 500) -> Tensor:
    """Apply a function of images in [-1, 1] to uint8 (n, h, w), in batches, on the CPU."""
    return torch.cat([function(to_unit(batch)) for batch in images.split(batch_size)])


def classify(judge: nn.Module, images: Tensor) -> Tensor:
    """Return the class (n,) that the judge gives to each of uint8 (n, h, w)."""
    return apply(lambda x: judge(x).argmax(dim=1), images)


def features_of(network: Any, images: Tensor) -> Tensor:
    """Return the features (n, d), float32, of uint8 (n, h, w)."""
    return apply(network.features, images)
