"""The part of one process in a batch that several train on together, so that they do what one does with the batch."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ldm.training.order import mix_seed


class BatchShare:
    """What one of `count` processes has of a batch, and the random numbers of its images.

    They are made for the whole batch, alike in all processes, and cut, so that an image gets the same ones on any
    number of processes. One process takes them from torch's global generators, as do in each process the layers of the
    networks that are random themselves, such as dropout, which are seeded differently.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.seed = rank, count, 0
        self.generators: dict[torch.device, torch.Generator] = {}

    def begin(self, seed: int, number: int) -> None:
        """Seed the random numbers of batch `number`."""
        torch.manual_seed(mix_seed(seed, number, self.rank))
        self.seed, self.generators = mix_seed(seed, number, 0), {}

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator | None:
        """Return the generator that is alike in all processes; None, torch's global one, for one process."""
        device = torch.device(device)
        if self.count > 1 and device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators.get(device)

    def cut(self, batch: Tensor, parts: int = 1) -> Tensor:
        """Return what this process has of a whole batch's (n, ...), which consists of `parts` batches in a row."""
        return torch.cat([part.tensor_split(self.count)[self.rank] for part in batch.chunk(parts)])

    def joined(self, own: Tensor, parts: int = 1) -> Tensor:
        """Return the whole batch's tensor (n, ...) of which `cut` gives `own`, with gradients for all processes."""
        if self.count == 1:
            return own
        from ldm.training.gathering import gathered  # only several processes need it

        return gathered(own).unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)

    def randn(self, like: Tensor) -> Tensor:
        """Return normal noise of the shape, dtype and device of a tensor (b, ...) of images."""
        shape = len(like) * self.count, *like.shape[1:]
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        return self.cut(torch.randn(shape, generator=self.generator(like.device), **options))

    def rand(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1) on the CPU, of a shape that begins with the number of images."""
        return self.cut(torch.rand(shape[0] * self.count, *shape[1:], generator=self.generator()))

    def objects(self, own: list[Any]) -> list[Any]:
        """Return the items of all processes' lists, which are pickled, in the order of the whole batch."""
        if self.count == 1:
            return own
        found: list[list[Any]] = [[]] * self.count
        torch.distributed.all_gather_object(found, own)
        return [item for items in found for item in items]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of the processes' tensors, with gradients for all."""
        if self.count == 1:
            return x
        from ldm.training.gathering import gathered  # only several processes need it

        return gathered(x).mean(0)
