"""Data sets encoded once, before training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.training.order import in_batches
from ldm.training.shapes import alike_batches


class LatentDataset(Dataset):
    """A data set with its images replaced by the mean and standard deviation of their latents, (z, h, w) each.

    keys: what else of its samples training reads.
    """

    def __init__(
        self,
        dataset: Any,
        mean: Sequence[Tensor] | Tensor,
        std: Sequence[Tensor] | Tensor,
        keys: Sequence[str] = ("caption",),
    ) -> None:
        self.dataset, self.mean, self.std, self.keys = dataset, mean, std, keys
        self.groups = getattr(dataset, "groups", None)  # the latents of a batch have one shape, too
        self.shuffled = getattr(dataset, "shuffled", None)  # the same order as without latents

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [{**self._others(i), "mean": self.mean[i], "std": self.std[i]} for i in indices]

    def _others(self, index: int) -> dict[str, Any]:
        if not self.keys:
            return {}
        own = hasattr(self.dataset, "without_image")  # of our own data sets: it does not read the image
        sample = self.dataset.without_image(index) if own else self.dataset[index]
        return {key: sample[key] for key in self.keys}


@torch.no_grad()
def encode_dataset(first_stage: nn.Module, dataset: Dataset, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return mean and standard deviation of each image's unscaled latents, (z, h/f, w/f) each, on the CPU.

    Images of one shape (`groups`) are encoded together.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    batches, device = alike_batches(dataset, batch_size), next(first_stage.parameters()).device
    for indices, batch in zip(batches, in_batches(dataset, batches, "encoding latents"), strict=True):
        mean, std = posterior(first_stage, batch["image"].to(device))
        found |= dict(zip(indices, zip(mean.cpu(), std.cpu(), strict=True), strict=True))
    return [found[i][0] for i in range(len(found))], [found[i][1] for i in range(len(found))]


def posterior(first_stage: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of images' unscaled latents, (b, z, h/f, w/f) each; a VQ autoencoder's deviate by 0."""
    code = first_stage.encode(images)
    return (code, torch.zeros_like(code)) if isinstance(code, Tensor) else (code.mean, code.std)
