"""The quality of generated images while a model trains: what `loop.quality` of a configuration names."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from torch import Tensor

from ldm.checkpoint.tensors import read_tensors
from ldm.checks import Positive, Range
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.networks import load_image_network
from ldm.evaluation.own_data import features as pixel_features
from ldm.images import to_uint8
from ldm.init_image import stack_images
from ldm.training.conditions import condition_values


class Quality:
    """Measures images that a model generates, with its own settings, for the conditions of real images.

    Args:
        images: how many, at most as many as there are real ones; image i has the noise of seed i.
        classifier: checkpoint of a network, images in [-1, 1] -> logits, whose agreement with the real images' labels
            is reported; None leaves it out.
        features: in which the Fréchet distance is measured: checkpoint of a network that has `features`; weights of
            torch-fidelity's Inception, a .pth file; or None: pixels, averaged to 8 x 8.
        batch_size: images at a time.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        images: Annotated[int, Range(2)] = 256,
        classifier: str | None = None,
        features: str | None = None,
        batch_size: Positive = 64,
    ) -> None:
        self.model, self.dataset, self.batch_size = model, dataset, batch_size
        self.chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()[:images]
        name, found = type(dataset).__name__, dataset[0]
        if len(self.chosen) < 2 or "image" not in found:
            raise ValueError(f"loop.quality compares with at least 2 real images, which {name} does not give")
        if classifier is not None and "label" not in found:
            raise ValueError(f"the images of {name} have no label: leave out loop.quality's classifier")
        self.classifier: Any = None if classifier is None else load_image_network(classifier).to(model.device)
        self.features = feature_function(features, model.device)
        self.real: dict[int, tuple] = {}

    @torch.no_grad()
    def measure(self, count: int | None = None, **settings: Any) -> dict[str, float]:
        """Return the figures of the first so many images, or of all. settings: of `generate`, besides the model's."""
        chosen = self.chosen[:count]
        if len(chosen) not in self.real:  # it stays the same
            self.real[len(chosen)] = self._read(chosen)
        conditions, labels, real = self.real[len(chosen)]
        made = self.model.generate(conditions, batch_size=self.batch_size, plain=True, **settings)
        generated = stack_images(made)  # uint8 (n, c, h, w)
        found = {"frechet": frechet_distance(*moments(self._each(self.features, generated)), *real)}
        if self.classifier is not None:
            answers = self._each(lambda x: self.classifier(x.float() / 127.5 - 1).argmax(1), generated)
            found["accuracy"] = (answers == torch.tensor(labels)).double().mean().item()
        return found

    def _read(self, chosen: list[int]) -> tuple[list[Any], list[Any], tuple[Tensor, Tensor]]:
        """Return real images' conditions, labels, and the moments of their features."""
        conditions, labels, found = [], [], []
        for first in range(0, len(chosen), self.batch_size):
            samples = [self.dataset[i] for i in chosen[first : first + self.batch_size]]
            by_shape: dict[torch.Size, list[Tensor]] = {}  # with buckets there are several
            for sample in samples:
                by_shape.setdefault(sample["image"].shape, []).append(sample["image"])
            found += [self._each(self.features, to_uint8(torch.stack(images))) for images in by_shape.values()]
            conditions += [condition_values(self.model, sample) for sample in samples]
            labels += [sample.get("label") for sample in samples]
        return conditions, labels, moments(torch.cat(found))

    def _each(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Return what a function gives for uint8 images (n, c, h, w), in batches, on the CPU."""
        return torch.cat([function(batch.to(self.model.device)).cpu() for batch in images.split(self.batch_size)])


def feature_function(path: str | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images (b, c, h, w) to features (b, d); see `Quality` for the path."""
    if path is None:
        return pixel_features
    if not path.endswith(".pth"):
        network: Any = load_image_network(path, "features").to(device)
        return lambda images: network.features(images.float() / 127.5 - 1)
    try:
        package = import_module("torch_fidelity.feature_extractor_inceptionv3")  # only this needs it
    except ImportError:
        raise ValueError(f"features {path!r} need the package torch-fidelity: pip install torch-fidelity") from None
    with TemporaryDirectory() as folder:  # it runs what is pickled in a file: give it one that holds tensors only
        copy = Path(folder, "inception.pth")
        torch.save(read_tensors(path).state, copy)
        options = {"feature_extractor_weights_path": str(copy)}
        inception = package.FeatureExtractorInceptionV3("inception", ["2048"], **options)
    inception.to(device)
    return lambda images: inception(images.expand(-1, 3, -1, -1))[0]
