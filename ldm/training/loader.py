"""Batches of a data set, read in this process or in others, which read ahead: `loop.workers`."""

import signal
from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.training.order import EpochBatches


class _Read(Dataset):
    """A data set by (epoch, indices), since processes that load data read ahead, past the end of an epoch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def begin(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # captions and augmentation are functions of (seed, epoch, index)

    def __getitems__(self, batch: tuple[int, list[int]]) -> tuple[int, list[Any]]:
        epoch, indices = batch
        self.begin(epoch)
        together = getattr(self.dataset, "__getitems__", lambda indices: [self.dataset[i] for i in indices])
        return epoch, together(indices)


def _collate(read: tuple[int, list[Any]]) -> tuple[int, Any]:
    return read[0], default_collate(read[1])


def _batches(order: EpochBatches) -> Iterator[tuple[int, list[int]]]:
    """Yield (epoch, indices) without end, from where the order is; it stays there."""
    order = copy(order)
    while True:
        yield from ((order.epoch, indices) for indices in order)
        order.epoch, order.past = order.epoch + 1, []


def training_batches(dataset: Any, order: EpochBatches, workers: int) -> Iterator[tuple[int, dict]]:
    """Yield (number, batch) without end, as dicts of stacked fields, and note them in the order's state."""
    read = _Read(dataset)
    for epoch, batch in loader_of(read, workers, order.seed, batch_sampler=_batches(order), collate_fn=_collate):
        if epoch > order.epoch:
            order.epoch, order.past = epoch, []
        read.begin(epoch)  # in this process, too
        yield order.take(), batch


def loader_of(dataset: Dataset, workers: int, seed: int = 0, **options: Any) -> DataLoader:
    """Return a loader that leaves torch's random state and the signals of its processes, which it seeds, alone."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, generator=generator, **options)


def ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which still needs the workers' batches to complete its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
