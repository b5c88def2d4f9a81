"""What a run reports: means over batches, checked, for its files and its progress bar."""

import math
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import NoReturn

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ldm.training.run_folder import RunFolder
from ldm.training.sharding import complete
from ldm.training.share import BatchShare

LARGEST_WEIGHT = 1e6  # far more than any trained network's


class Metrics:
    """Means over the batches of all processes since the last report, logged as a JSON line and to the trackers."""

    def __init__(self, stage: str, folder: RunFolder, networks: nn.Module, share: BatchShare) -> None:
        self.stage, self.folder, self.networks, self.share, self.values = stage, folder, networks, share, {}
        self.latest: dict[str, str] = {}  # of validation, for the progress bar

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(complete(value.detach()))

    def report(self, step: int, waits: float | None = None) -> dict[str, str]:
        """Log the means and return the first few for the progress bar.

        waits: the share of the time since the last report that the network waited for data, reported too.
        Raises ValueError if a mean or weight is not finite, or a weight larger than any that a network works with.
        """
        means = {
            name: self.share.mean(torch.stack(values).float().mean()).item() for name, values in self.values.items()
        }
        self.values = {}
        self._check(means, step)
        weights = [p.detach() for p in self.networks.parameters() if p.requires_grad and p.numel()]
        # The norm of all is at least the largest weight, and a twelfth of the work, which shows: it reads all of them.
        if not complete(get_total_norm(weights)) <= LARGEST_WEIGHT:
            largest = torch.stack([complete(p).abs().max().float() for p in weights]).max().item()
            if not largest <= LARGEST_WEIGHT:
                self._stop(f"a weight became {largest:.3g}", step)
        shown = {name: f"{mean:.4g}" for name, mean in list(means.items())[:3]} | self.latest
        if waits is not None:
            means["waits_for_data"], shown["waits"] = waits, f"{waits:.0%}"
        if means:
            self.folder.log(step, means)
        return shown

    def measured(self, step: int, means: dict[str, float]) -> None:
        """Log what was found on other images; ValueError if it is not finite."""
        self._check(means, step)
        self.folder.log(step, means)
        self.latest |= {name: f"{mean:.4g}" for name, mean in list(means.items())[:1]}

    def _check(self, means: dict[str, float], step: int) -> None:
        for name, mean in means.items():
            if not math.isfinite(mean):
                self._stop(f"{name} became {mean}", step)

    def _stop(self, what: str, step: int) -> NoReturn:
        state = self.folder.state
        advice = "nothing was saved yet: start again with"
        if state.exists():
            advice = f"the last saved state is in {str(self.folder.path)!r}: continue with --resume and"
        raise ValueError(
            f"{self.stage}: {what} by step {step}, so training stopped; {advice} a lower learning rate, or "
            "loop.precision=fp32"
        )


class Waits:
    """Hands on the items of an iterable, and measures how long its user waits for them."""

    def __init__(self, items: Iterable) -> None:
        self.items, self.waited, self.since = items, 0.0, perf_counter()

    def __iter__(self) -> Iterator:
        items = iter(self.items)
        while True:
            asked = perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self.waited += perf_counter() - asked
            yield item

    def share(self) -> float:
        """Return the share of the time since the last call, or since the start, that was waited for items."""
        now = perf_counter()
        waited, passed = self.waited, now - self.since
        self.waited, self.since = 0.0, now
        return waited / passed if passed > 0 else 0.0
