"""What the loop asks of a stage."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset


class Stage(nn.Module):
    """One stage of training. Its trainable networks are its submodules; frozen ones are kept outside `modules()`."""

    def data_params(self, device: torch.device) -> dict[str, Any]:
        """Return arguments of the data set that follow from the stage's model, which is moved to `device`."""
        return {}

    def prepare(self, dataset: Dataset, device: torch.device) -> Dataset:
        """What to train on instead of the data set itself (cached latents, say). Called once, before anything else."""
        return dataset

    def optimizers(self) -> list[Optimizer]:
        """The optimizers, in the order in which `forward` is asked for their losses."""
        raise NotImplementedError

    def forward(self, batch: Mapping[str, Any], k: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of optimizer k on a batch, and detached scalars to report."""
        raise NotImplementedError

    def preview(self) -> list[Image.Image]:
        """Images that show what has been learnt, `preview_columns` to a row."""
        raise NotImplementedError

    def finish(self, dataset: Dataset) -> None:
        """Last touches on the averaged weights before they are exported, such as measured statistics."""

    def export(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(configuration, tensors) of the checkpoint that this stage is for."""
        raise NotImplementedError

    def exclude_from_modules(self, **networks: nn.Module) -> None:
        """Keep frozen networks as plain attributes: out of parameters(), of the averages and of the saved state."""
        for name, network in networks.items():
            object.__setattr__(self, name, network.eval().requires_grad_(False))
            self.__dict__.setdefault("_frozen", []).append(network)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stage":
        """Move the frozen networks along with `.to(device)`."""
        for network in self.__dict__.get("_frozen", []):
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def iterate(self, dataset: Dataset, batch_size: int, label: str) -> Iterator[dict]:
        """The whole data set once, in order, with a progress bar."""
        from tqdm import tqdm

        from ldm.training.order import collate

        fetch = getattr(dataset, "__getitems__", lambda indices: [dataset[i] for i in indices])
        for first in tqdm(range(0, len(dataset), batch_size), desc=label, unit="batch", leave=False):
            yield collate(fetch(list(range(first, min(first + batch_size, len(dataset))))))


def adamw(parameters: Iterable[nn.Parameter], learning_rate: float, **options: Any) -> AdamW:
    """AdamW over what is trainable, as one fused kernel per step where torch has one."""
    trainable = [p for p in parameters if p.requires_grad]
    fused = trainable[0].device.type in ("cpu", "cuda")
    return AdamW(trainable, lr=learning_rate, fused=fused, **options)
