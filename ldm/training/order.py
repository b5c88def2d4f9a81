"""The order in which a data set is seen: a function of (seed, epoch), so that training resumes mid-epoch exactly."""

import signal
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochBatches(Sampler):
    """Index batches of one epoch, shuffled by (seed, epoch), from number `start`; the ragged last batch is dropped.

    With several processes, `batch_size` counts images per process, and each takes its own part of every global batch.

    groups: what an image has in common with all of its batch (its shape, say); None: nothing. Each group's ragged last
    batch is dropped. Raises ValueError where a whole group would be.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.processes = length, batch_size, seed, rank, processes
        self.whole, self.groups = batch_size * processes, [None] * length if groups is None else groups
        self.counts = Counter(self.groups)
        least = min(self.counts.values(), default=0)
        if least < self.whole:
            of = "" if groups is None else " of one shape"
            raise ValueError(f"the data set has {least} images{of}, fewer than one batch of {self.whole}")
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return sum(count // self.whole for count in self.counts.values())

    def __iter__(self) -> Iterator[list[int]]:
        """A batch comes where the shuffled order fills it: with one group these are consecutive parts of it."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        filling, number = defaultdict(list), 0
        for index in torch.randperm(self.length, generator=generator).tolist():
            batch = filling[self.groups[index]]
            batch.append(index)
            if len(batch) == self.whole:
                if number >= self.start:
                    yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                number += 1
                batch.clear()


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed out of several integers, far apart for near ones (splitmix64: Steele et al. 2014)."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def batches(dataset: Dataset, order: EpochBatches, first: int, workers: int) -> Iterator[tuple[int, dict]]:
    """Endless (number, batch) from batch number `first` of the whole run on; each batch a dict of stacked fields."""
    number = first
    while True:
        order.epoch, order.start = divmod(number, len(order))
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(order.epoch)  # captions and augmentation are functions of (seed, epoch, index)
        # A generator of its own: DataLoader draws a seed per epoch, which must not move torch's global random state.
        generator = torch.Generator().manual_seed(order.seed)
        loader = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            generator=generator,
            collate_fn=collate,
            worker_init_fn=ignore_interrupts,
        )
        for batch in loader:
            yield number, batch
            number += 1


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the main process, which still needs the workers' batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(samples: list[dict]) -> dict:
    """Stack tensors, make tensors of integers and of tuples of them, keep everything else (captions) as lists."""
    batch: dict = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if isinstance(first, int | tuple) else values
    return batch
