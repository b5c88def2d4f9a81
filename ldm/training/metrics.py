"""What a run reports: means over batches, checked, for its files and its progress bar."""

import math
from typing import NoReturn

import torch
from torch import nn

from ldm.training.run_folder import RunFolder

LARGEST_WEIGHT = 1e6  # far more than any trained network's


class Metrics:
    """Means over the main process's batches since the last report, logged as a JSON line and to the trackers."""

    def __init__(self, stage: str, folder: RunFolder, networks: nn.Module) -> None:
        self.stage, self.folder, self.networks, self.values = stage, folder, networks, {}
        self.latest: dict[str, str] = {}  # of validation, for the progress bar

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def report(self, step: int) -> dict[str, str]:
        """Log the means and return the first few for the progress bar.

        Raises ValueError if a mean or weight is not finite, or a weight larger than any that a network works with.
        """
        means = {name: torch.stack(values).float().mean().item() for name, values in self.values.items()}
        self.values = {}
        self._check(means, step)
        weights = [p.detach().abs().max().float() for p in self.networks.parameters() if p.requires_grad and p.numel()]
        largest = torch.stack(weights).max().item() if weights else 0.0
        if not largest <= LARGEST_WEIGHT:
            self._stop(f"a weight became {largest:.3g}", step)
        if means:
            self.folder.log(step, means)
        return {name: f"{mean:.4g}" for name, mean in list(means.items())[:3]} | self.latest

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
