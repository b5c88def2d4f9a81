"""Muon: momentum whose matrices are made orthogonal, so that a step moves all directions of a weight alike."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.checks import Betas, Probability, Rate
from ldm.util import computes_in_bf16

# The quintic polynomial of Jordan et al. (2024): repeated, it takes singular values between 1e-3 and 1 to about 1.
QUINTIC, ROUNDS = (3.4445, -4.7750, 2.0315), 5
ADAM_SIZE = 0.2  # root mean square of AdamW's steps over the learning rate (Liu et al. 2025, arXiv:2502.16982)
EPSILON = 1e-8


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for vectors.

    A weight of several dimensions is a matrix of the first by the others: a convolution's of out x (in h w). The step
    of a matrix is as large as AdamW's (Liu et al. 2025), so that both share a learning rate and a weight decay.

    Args:
        params, lr, weight_decay: as of AdamW.
        betas: of AdamW, for vectors.
        momentum: of matrices, which is Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.01,
        momentum: Probability = 0.95,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            self._move_matrices([p for p in weights if p.ndim > 1], group)
            for weight in weights:
                if weight.ndim < 2:
                    self._move_vector(weight, group)
        return loss

    def _move_matrices(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:  # those of one shape together
            alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
        for shape, some in alike.items():
            states = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in some]
            grads: Any = [p.grad for p in some]
            torch._foreach_lerp_(states, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, states, group["momentum"])
            steps = orthogonal(torch.stack([step.reshape(shape) for step in ahead]))
            for weight, step in zip(some, steps, strict=True):
                weight.add_(step.reshape(weight.shape), alpha=-group["lr"] * ADAM_SIZE * max(shape) ** 0.5)

    def _move_vector(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), grad = self.state[weight], group["betas"], cast(Tensor, weight.grad)
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        scale = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(EPSILON)
        weight.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1 ** state["step"]))


def orthogonal(matrices: Tensor) -> Tensor:
    """Return u v' of each matrix u s v' of (n, rows, columns), nearly: singular values of about 0.7 to 1.2.

    Newton and Schulz: each round multiplies x by a polynomial of x x', which is small where x is wide. It is computed
    in bfloat16 where the hardware does so, which is twice as fast and errs by less than the singular values do.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = QUINTIC
    x = matrices.bfloat16() if computes_in_bf16(matrices.device) else matrices.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + EPSILON)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)
