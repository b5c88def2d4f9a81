"""CompVis's exponential moving average of weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.training.ema import ema_decay


class LitEma(nn.Module):
    """EMA weights as in CompVis's checkpoints: buffers named without the dots, in the dtype of the weights."""

    decay: Tensor
    num_updates: Tensor

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

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [(getattr(self, self.m_name2s_name[name]), p) for name, p in named]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update: shadow <- shadow - (1 - d) (shadow - live), d = `ema_decay` of the number of updates."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = ema_decay(self.num_updates, self.decay)
        for shadow, p in self._pairs(model):
            shadow.sub_((1 - decay) * (shadow - p))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for shadow, p in self._pairs(model):
            p.copy_(shadow)  # not by `.data`, which torch does not count: `ldm.optimize` looks at its count

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        for kept, p in zip(self.collected_params, parameters, strict=True):
            p.copy_(kept)
