"""Averages of weights: the exponential one, with warm-up, and those from which one is chosen after training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.sharding import joined

SIGMA_RELS = (0.05, 0.10)  # widths of the averages that snapshots have, as in the paper


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


class ProfileAverages:
    """Power-function averages, of each width in SIGMA_RELS, of the trainable weights of a stage's model.

    Snapshots of them, which `snapshots.py` combines, are written every so many steps and after the last one; with 0
    there are none.
    """

    def __init__(self, stage: Any, every: int, device: torch.device | str | None = None) -> None:
        self.every, model = every, getattr(stage, "latent_diffusion", None)
        named = model.named_parameters() if every and model is not None else ()
        self.live = {name: p for name, p in named if p.requires_grad}
        if every and not self.live:
            raise ValueError(f"loop.ema_snapshots: {type(stage).__name__} does not train a diffusion model's weights")
        self.shadow = {
            f"{width}/{name}": wide(p.detach()).to(device=device, copy=True)
            for width in SIGMA_RELS
            for name, p in self.live.items()
        }

    @torch.no_grad()
    def update(self, folder: Any, step: int, last: bool) -> None:
        """Take in the weights after a step, counted from 1: a mean in which their profile has its exact share."""
        if not self.every:
            return
        from ldm.checkpoint.writing import save_file  # only snapshots need them
        from ldm.training.snapshots import SNAPSHOTS, gamma_of

        shadow, count = list(self.shadow.values()), len(self.live)
        for k, width in enumerate(SIGMA_RELS):
            own = shadow[k * count : (k + 1) * count]
            live = [wide(p.detach()).to(average.device) for p, average in zip(self.live.values(), own, strict=True)]
            torch._foreach_lerp_(own, live, 1 - (1 - 1 / step) ** (gamma_of(width) + 1))
        if folder.writes and (last or step % self.every == 0):
            save_file(folder.path / SNAPSHOTS / f"{step:06d}.safetensors", self.shadow, None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.shadow.items():
            average.copy_(state[name])
