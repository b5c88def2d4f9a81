"""The order of a data set in training: a function of (seed, epoch), so that training resumes mid-epoch exactly."""

import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm


class EpochBatches(Sampler):
    """Index batches of one epoch, shuffled by (seed, epoch), from number `start` on; an incomplete last one is dropped.

    Args:
        length: of the data set.
        batch_size: images for each process; each takes its own part of every global batch.
        groups: for each image, a key that all images of a batch share, such as their shape; None is one group. The
            incomplete last batch of each group is dropped, and a group smaller than a batch is refused.
        shuffled: the data set's own way to shuffle: all indices in an order that follows from the generator.
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
            of = "" if groups is None else f" of one shape, {group}"
            raise ValueError(f"the data set has {least} images{of}, fewer than one batch of {self.global_size}")
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return sum(count // self.global_size for count in self.counts.values())

    def __iter__(self) -> Iterator[list[int]]:
        """Yield each group's batch as soon as the shuffled order has filled it."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        filling, number = defaultdict(list), 0
        for index in self.shuffled(generator):
            batch = filling[self.groups[index]]
            batch.append(index)
            if len(batch) == self.global_size:
                if number >= self.start:
                    yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                number += 1
                batch.clear()

    def _permutation(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self.length, generator=generator).tolist()


def mix_seed(*numbers: int) -> int:
    """Return a 63-bit seed from several integers, unrelated for neighbouring ones (splitmix64: Steele et al. 2014)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def training_batches(dataset: Any, order: EpochBatches, first: int, workers: int) -> Iterator[tuple[int, dict]]:
    """Yield (number, batch) without end, from batch number `first` of the run on, as dicts of stacked fields."""
    number = first
    while True:
        order.epoch, order.start = divmod(number, len(order))
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(order.epoch)  # captions and augmentation are functions of (seed, epoch, index)
        loader = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            # DataLoader takes a seed each epoch, which must not change torch's global random state.
            generator=torch.Generator().manual_seed(order.seed),
        )
        for batch in loader:
            yield number, batch
            number += 1


def in_batches(dataset: Dataset, batches: Sequence[list[int]], label: str) -> Iterable[dict]:
    """Return these batches of a data set, with a progress bar."""
    return tqdm(loader_of(dataset, 0, batch_sampler=batches), desc=label, unit="batch", leave=False)


def loader_of(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Return a loader that leaves torch's random state and the signals of its processes alone."""
    generator = torch.Generator()
    return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, generator=generator, **options)


def in_groups(indices: Iterable[int], groups: Sequence[Hashable] | None, size: int) -> list[list[int]]:
    """Return the indices, in their order, as lists of at most `size` of one group each; `groups` as in EpochBatches."""
    parts = defaultdict(list)
    for index in indices:
        parts[None if groups is None else groups[index]].append(index)
    return [part[i : i + size] for part in parts.values() for i in range(0, len(part), size)]


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which still needs the workers' batches to complete its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
