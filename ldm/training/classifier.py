"""The judge and the feature network of the evaluation: classifiers, trained on randomly transformed images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset

from ldm.checks import Count, Rate
from ldm.images import to_pil
from ldm.training.loader import loader_of
from ldm.training.shapes import alike_batches
from ldm.training.share import BatchShare
from ldm.training.stage import Loss, Stage
from ldm.util import instantiate_from_config, progress_bar

CALIBRATION_IMAGES = 10_000  # enough for means and variances to a percent


class ClassifierStage(Stage):
    """Trains a classifier by cross-entropy on images under random affine transforms.

    Args:
        network: `{"target", "params"}` of a classifier, images (b, c, h, w) in [-1, 1] -> logits (b, classes).
        label_smoothing: probability spread over all classes (Szegedy et al. 2016, section 7).
        rotation, shear, scale, shift: bounds of the transforms, see `random_affine`.
    """

    reads = ("image", "label")
    takes_shapes = False  # its last layer knows one

    def __init__(
        self,
        network: Mapping[str, Any],
        learning_rate: Rate,
        weight_decay: Rate = 0.01,
        optimizer: str | Mapping[str, Any] = "adamw",
        label_smoothing: float = 0.05,
        rotation: float = 12.0,
        shear: float = 0.15,
        scale: float = 0.12,
        shift: float = 2.0,
        preview_columns: Count = 10,
    ) -> None:
        adam = {"lr": learning_rate, "betas": (0.9, 0.99), "weight_decay": weight_decay, "optimizer": optimizer}
        super().__init__(preview_columns, **adam)
        self.config = {"target": network["target"], "params": dict(network.get("params") or {})}
        # Channels last: a fifth faster on CPUs with oneDNN, 7 s instead of 9 s for 60 steps of 128.
        self.model = instantiate_from_config(self.config).to(memory_format=torch.channels_last)
        self.networks["model"] = self.model
        self.label_smoothing = label_smoothing
        self.transform = {"rotation": rotation, "shear": shear, "scale": scale, "shift": shift}

    def prepare(self, dataset: Any) -> Dataset:
        shown = [dataset[i]["image"] for i in range(min(self.preview_columns**2, len(dataset)))]
        self.shown = torch.stack(shown)
        return dataset

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        logits = self.model(random_affine(batch["image"], **self.transform, share=self.share)).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        right = (logits.argmax(dim=1) == batch["label"]).float().mean()
        return loss, {"loss": loss, "accuracy": right}

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the loss and the accuracy on images without transforms."""
        logits, labels = self.model(batch["image"]).float(), batch["label"]
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        return {"loss": losses, "accuracy": (logits.argmax(dim=1) == labels).float()}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return training images in the order of their predicted class, the most confident of each class first."""
        images = self.shown.to(self.device)
        confidence, predicted = self.model(images).float().softmax(dim=1).max(dim=1)
        return to_pil(images[torch.argsort(predicted - confidence / 2)])

    @torch.no_grad()
    def finish(self, dataset: Any) -> None:
        """Measure all batch statistics again: on images without transforms, and for the averaged weights."""
        subset = Subset(dataset, range(min(CALIBRATION_IMAGES, len(dataset))))
        batches = loader_of(subset, 0, batch_sampler=alike_batches(subset, 500))
        batches = progress_bar(batches, desc="measuring batch statistics", unit="batch")
        update_bn((self.share.cut(batch["image"]) for batch in batches), self.model, self.device)


def random_affine(
    images: Tensor, rotation: float, shear: float, scale: float, shift: float, share: BatchShare
) -> Tensor:
    """Return images (b, c, h, w) in [-1, 1], each under its own random affine transform, on a background of -1.

    Bilinear. Each amount is uniform in plus or minus its bound: rotation in degrees, shear and scale (of each axis) as
    ratios, shift (of each axis) in pixels. Takes 6 b numbers from torch's CPU random state on every device.
    """
    size = images.new_tensor([images.shape[3], images.shape[2]])  # (w, h), as grid_sample orders its axes
    bounds = torch.tensor([math.radians(rotation), shear, scale, scale, shift, shift])
    amounts = (2 * share.rand(len(images), 6) - 1) * bounds
    angle, slope, wide, high, right, down = amounts.to(images.device).unbind(dim=1)  # (b,) each
    row1 = torch.stack([angle.cos() * (1 + wide), (slope - angle.sin()) * (1 + wide), 2 * right / size[0]], dim=1)
    row2 = torch.stack([angle.sin() * (1 + high), angle.cos() * (1 + high), 2 * down / size[1]], dim=1)
    theta = torch.stack([row1, row2], dim=1)  # (b, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (b, h, w, 2)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # grid_sample fills with 0
