"""The exponential average of weights, with warm-up; `snapshots.py` has those from which one is chosen later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.sharding import joined


def ema_decay(update: int, decay: float) -> float:
    """Return min(decay, (1 + n) / (10 + n)) for update n from 1, so that early averages forget the initial weights."""
    return min(decay, (1 + update) / (10 + update))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EMA:
    """Averages of a module's trainable parameters, in float32 or wider; buffers are not averaged.

    With decay 0 the average is the weights themselves, without a copy. `device`: where they are kept; None: with the
    weights.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, device: torch.device | str | None = None) -> None:
        self.module, self.decay, self.updates, self.device = module, decay, 0, device
        trainable = module.named_parameters() if decay > 0 else ()
        self.live = {name: p for name, p in trainable if p.requires_grad}
        self.shadow = {name: wide(p.detach()).to(device=device, copy=True) for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Set shadow to decay * shadow + (1 - decay) * live; called once per training step."""
        self.updates += 1
        if not self.live:
            return
        shadow = list(self.shadow.values())
        live = [p.to(average.device, average.dtype) for p, average in zip(self.live.values(), shadow, strict=True)]
        torch._foreach_lerp_(shadow, live, 1 - ema_decay(self.updates, self.decay))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averages within the block, and afterwards its own weights again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self._write(self.shadow)
        try:
            with joined(self.module):
                yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.live.items():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.shadow.items():
            average.copy_(state["shadow"][name])
