"""The order of a data set in training: a function of (seed, epoch), so that training resumes mid-epoch exactly."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler):
    """Index batches of one epoch, shuffled by (seed, epoch); an incomplete last one is dropped.

    Its state says what was trained on, so that a run resumes at the next image, also with batches of another size.

    Args:
        length: of the data set.
        batch_size: images for each process; each takes its own part of every global batch.
        groups: for each image, a key that all images of a batch share, such as their shape; None is one group. The
            incomplete last batch of each group is dropped, and a group smaller than a batch is refused.
        shuffled: the data set's own way to shuffle: all indices in an order that follows from the generator.

    Attributes:
        epoch, number: of the next batch, that in the run.
        images: that the run was trained on, each counted in each epoch.
        past: (images in a batch of all processes, batches) that this epoch had, in their order.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        groups: Sequence[Hashable] | None = None,
        shuffled: Callable[[torch.Generator], Iterable[int]] | None = None,
    ) -> None:
        self.shuffled = self._permutation if shuffled is None else shuffled
        self.length, self.batch_size, self.seed, self.rank = length, batch_size, seed, rank
        self.global_size, self.groups = batch_size * processes, [None] * length if groups is None else groups
        self.counts = Counter(self.groups)
        group, least = min(self.counts.items(), key=lambda pair: pair[1], default=(None, 0))
        if least < self.global_size:
            have = f"{least} images{'' if groups is None else f' of one shape, {group}'}"
            raise ValueError(f"the data has {have}, fewer than one batch of {self.global_size}: lower loop.batch_size")
        self.epoch = self.number = self.images = 0
        self.past: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return sum(count // self.global_size for count in self.counts.values())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of the batches that the epoch still has."""
        indices = iter(self.shuffled(torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))))
        for size, count in [*self.past]:
            indices = self._without(indices, size, count)
        for batch in self._filled(indices, defaultdict(list), self.global_size):
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _filled(self, indices: Iterator[int], filling: dict[Hashable, list[int]], size: int) -> Iterator[list[int]]:
        """Yield each group's batch as soon as the indices have filled it."""
        for index in indices:
            filling[group := self.groups[index]].append(index)
            if len(filling[group]) == size:
                yield filling.pop(group)

    def _without(self, indices: Iterator[int], size: int, count: int) -> Iterator[int]:
        """Yield the indices that are not in the first batches."""
        filling: dict[Hashable, list[int]] = defaultdict(list)
        for _ in islice(self._filled(indices, filling, size), count):
            pass
        yield from chain(*filling.values(), indices)

    def take(self) -> int:
        """Note that the next batch is trained on; return its number."""
        size, count = self.past.pop() if self.past and self.past[-1][0] == self.global_size else (self.global_size, 0)
        self.past.append((size, count + 1))
        self.number, self.images = self.number + 1, self.images + self.global_size
        return self.number - 1

    def seek(self, number: int) -> "EpochBatches":
        """Go to batch `number` of a run whose batches had this size from the start, and return the order."""
        self.epoch, count = divmod(number, len(self))
        self.number, self.images, self.past = number, number * self.global_size, [(self.global_size, count)]
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "number": self.number, "images": self.images, "past": [*self.past]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.number, self.images = state["epoch"], state["number"], state["images"]
        self.past = [(int(size), int(count)) for size, count in state["past"]]

    def _permutation(self, generator: torch.Generator) -> Iterator[int]:
        return map(int, torch.randperm(self.length, generator=generator).numpy())  # a list is four times as large


def mix_seed(*numbers: int) -> int:
    """Return a 63-bit seed from several integers, unrelated for neighbouring ones (splitmix64: Steele et al. 2014)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
