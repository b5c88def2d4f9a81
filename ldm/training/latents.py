"""Data sets encoded once, before training."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.batching import distinct_prompts
from ldm.latent_diffusion import Conditioning
from ldm.training.loader import loader_of
from ldm.training.shapes import alike_batches
from ldm.training.share import BatchShare
from ldm.util import progress_bar

PIXELS = 2**20  # of a batch that is encoded: 256 images of 64 x 64


class LatentDataset(Dataset):
    """A data set with its images replaced by the mean and standard deviation of their latents, (z, h, w) each.

    Args:
        mean, std: n tensors each, or one of them all.
        keys: what else of its samples training reads, besides masks, of which the pixels stay, and sizes.
    """

    def __init__(self, dataset: Any, mean: Any, std: Any, keys: Sequence[str] = ("caption",)) -> None:
        self.dataset, self.mean, self.std, self.keys = dataset, mean, std, tuple(keys)
        self.keys += tuple(key for key in ("mask", "sizes") if key in self._sample(0))
        self.groups = getattr(dataset, "groups", None)  # the latents of a batch have one shape, too
        self.shuffled = getattr(dataset, "shuffled", None)  # the same order as without latents

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        others = [self._sample(i) if self.keys else {} for i in indices]
        latents = [{"mean": self.mean[i], "std": self.std[i]} for i in indices]
        return [{key: other[key] for key in self.keys} | both for other, both in zip(others, latents, strict=True)]

    def _sample(self, index: int) -> Any:
        own = hasattr(self.dataset, "without_image") and "image" not in self.keys  # where the image need not be read
        return self.dataset.without_image(index) if own else self.dataset[index]


def encode_dataset(first_stage: nn.Module, dataset: Any, share: BatchShare, workers: int = 0) -> tuple[Any, Any]:
    """Return mean and standard deviation of each image's unscaled latents, (z, h/f, w/f) each, on the CPU.

    They are one tensor each, which processes that load data share, or lists for images of several shapes (`groups`).
    Each process of the training encodes its part of them.
    """
    count, groups = len(dataset), getattr(dataset, "groups", None)
    batches = alike_batches(dataset, encoding_size(dataset))
    own = batches[share.rank :: share.count]
    loaded = zip(own, loader_of(dataset, workers, batch_sampler=own), strict=True)
    made: list[Any] = [[None] * count, [None] * count]
    with progress_bar(total=count, desc="encoding images", unit="images") as bar:
        for _ in range(0, len(batches), share.count):
            mine = [(indices, *encode_batch(first_stage, batch["image"])) for indices, batch in islice(loaded, 1)]
            for indices, *parts in share.objects(mine):
                if indices[0] == 0 and len(set(groups or [None])) == 1:
                    made = [torch.empty(count, *part.shape[1:]) for part in parts]
                for index, *both in zip(indices, *parts, strict=True):
                    made[0][index], made[1][index] = both
                bar.update(len(indices))
    return made[0], made[1]


def encoding_size(dataset: Any) -> int:
    """Return how many images to encode at once."""
    height, width = dataset[0]["image"].shape[-2:]
    return min(256, max(PIXELS // (height * width), 1))


@torch.no_grad()
def encode_batch(first_stage: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of images' latents, on the CPU.

    The batch is filled up to a multiple of 16, of large images less. An image's bits then do not depend on what it is
    encoded with (measured on CPUs, where matrix products of few rows are computed in another order).
    """
    height, width = images.shape[-2:]
    multiple = min(16, max(2**16 // (height * width), 1))
    filled = torch.cat([images, *[images[-1:]] * (-len(images) % multiple)])
    mean, std = posterior(first_stage, filled.to(next(first_stage.parameters()).device))
    return mean[: len(images)].cpu(), std[: len(images)].cpu()


@torch.no_grad()
def encode_texts(encoder: nn.Module, texts: Sequence[str]) -> Conditioning:
    """Return the conditioning of texts, each taken literally and cut to the context length, on the encoder's device.

    They are filled up to a multiple of 4, for the same reason as in `encode_batch`.
    """
    distinct, which = distinct_prompts(texts)
    filled = distinct + [distinct[-1] + " " * (i + 1) for i in range(-len(distinct) % 4)]
    return {name: value[which] for name, value in encoder(filled).items()}


def latents_scale(means: Any, stds: Any, sampled: bool = True) -> tuple[float, float]:
    """Return 1 / standard deviation of latents (Rombach et al. 2022, appendix G), and which share of their variance is
    noise of the posteriors. sampled: of their samples, otherwise of their means, without noise."""
    count = total = squares = within = 0.0
    for start in range(0, len(means), 1024):  # a part at a time
        some = range(start, min(start + 1024, len(means)))
        mean, std = (torch.cat([part[i].flatten() for i in some]).double() for part in (means, stds))
        count, total, squares = count + len(mean), total + mean.sum(), squares + mean.square().sum()
        within += std.square().sum() if sampled else 0.0
    variance, noise = (squares - total**2 / count) / (count - 1), within / count
    return float((variance + noise) ** -0.5), float(noise / (variance + noise))


def posterior(first_stage: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of images' unscaled latents, (b, z, h/f, w/f) each; a VQ autoencoder's deviate by 0."""
    code = first_stage.encode(images)
    return (code, torch.zeros_like(code)) if isinstance(code, Tensor) else (code.mean, code.std)
