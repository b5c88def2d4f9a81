"""Exponential moving average of weights, with warm-up."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ema_decay(update: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) for update number n from 1: early averages forget the start."""
    return min(decay, (1 + update) / (10 + update))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class EMA:
    """Averages of a module's trainable parameters, in float32 or wider. Buffers are not averaged.

    With decay 0 the average is the weights themselves, and no copy of them is kept.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        trainable = module.named_parameters() if decay > 0 else ()
        self.live = {name: p for name, p in trainable if p.requires_grad}
        self.shadow = {name: wide(p.detach().clone()) for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay * shadow + (1 - decay) * live; call once per optimizer step."""
        self.updates += 1
        if not self.live:
            return
        live = [wide(p.detach()) for p in self.live.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - ema_decay(self.updates, self.decay))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the averages; afterwards the live weights again, bit for bit."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.live.items():
            p.copy_(values[name])

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, average in self.shadow.items():
            average.copy_(state["shadow"][name])


class LitEma(nn.Module):
    """The averages as CompVis's checkpoints hold them: buffers whose names lack the dots, in the weights' own dtype."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1, got {decay}")
        live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.m_name2s_name = {name: name.replace(".", "") for name in live}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, p in live.items():
            self.register_buffer(self.m_name2s_name[name], p.detach().clone())

    def reset_num_updates(self) -> None:
        self.num_updates.zero_()

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """shadow <- shadow - (1 - d) (shadow - live), d = `ema_decay` of the number of updates."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = ema_decay(self.num_updates, self.decay)
        for name, p in model.named_parameters():
            if p.requires_grad:
                shadow = getattr(self, self.m_name2s_name[name])
                shadow.sub_((1 - decay) * (shadow - p))

    def copy_to(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(getattr(self, self.m_name2s_name[name]))

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy, for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        for kept, p in zip(self.collected_params, parameters, strict=True):
            p.data.copy_(kept)
