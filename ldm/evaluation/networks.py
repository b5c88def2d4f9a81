"""The judge and the feature network, loaded from their files and applied to many images."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.evaluation.samples import to_unit
from ldm.loading import load_network as load_any
from ldm.models.classifier import INNER

PRETRAINED = Path(__file__).parent.parent / "pretrained"
JUDGE, FEATURES = PRETRAINED / "judge.safetensors", PRETRAINED / "features.safetensors"


def load_network(path: str | Path, method: str = "forward") -> nn.Module:
    """The frozen network of a file that carries `{"target", "params"}` and its weights, in float32 and on the CPU.

    Args:
        method: what the network is wanted for: "forward" of a judge, "features" of a feature network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no network of that kind, or its weights do not fit its configuration.
    """
    try:
        network = load_any(path)
    except KeyError:
        raise ValueError(f"{str(path)!r} is no classifier: its configuration has no target") from None
    if not callable(getattr(network, method, None)):
        raise ValueError(f"{str(path)!r} holds a {type(network).__name__}, which has no {method!r}: give another file")
    return network


def fingerprint(path: str | Path) -> str:
    """First 12 hexadecimal digits of a file's SHA-256: figures of different networks do not compare."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Measuring:
    """The two networks, the fingerprints of their files, and the side of the images that both look at."""

    judge: nn.Module
    features: nn.Module
    fingerprints: dict[str, str]
    size: int = INNER

    @classmethod
    def load(cls, judge: str | Path = JUDGE, features: str | Path = FEATURES) -> "Measuring":
        """From their files; errors as `load_network`, and ValueError for networks of different sizes."""
        judging, measuring = load_network(judge), load_network(features, "features")
        sizes = [getattr(network, "size", INNER) for network in (judging, measuring)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the judge looks at {sizes[0]} x {sizes[0]} pixels and the feature network at {sizes[1]} x "
                f"{sizes[1]}: give --judge and --features of one size"
            )
        return cls(judging, measuring, {"judge": fingerprint(judge), "features": fingerprint(features)}, sizes[0])


@torch.inference_mode()
def apply(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 500) -> Tensor:
    """`function` of images in [-1, 1] over uint8 (n, h, w), in batches, on the CPU."""
    return torch.cat([function(to_unit(batch)) for batch in images.split(batch_size)])


def classify(judge: nn.Module, images: Tensor) -> Tensor:
    """The class (n,) that the judge gives to each of uint8 (n, h, w)."""
    return apply(lambda x: judge(x).argmax(dim=1), images)


def features_of(network: nn.Module, images: Tensor) -> Tensor:
    """Features (n, d), float32, of uint8 (n, h, w)."""
    return apply(network.features, images)
