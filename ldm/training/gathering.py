"""Tensors of all processes that train together, with gradients, and batch norms over all of them."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Gathered(torch.autograd.Function):
    """Stack the tensors of all processes; torch's own functions with gradients are deprecated or private."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gathered(gradients[0]).sum(0)[torch.distributed.get_rank()]  # which has gradients, too


def gathered(x: Tensor) -> Tensor:
    """Return the tensors (...) of all processes, (count, ...); the gradient of each sums what all losses give it."""
    found = _Gathered.apply(x.contiguous())
    assert isinstance(found, Tensor)
    return found


class GlobalBatchNorm(_BatchNorm):
    """What torch's SyncBatchNorm is on GPUs, on CPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Take inputs of any number of dimensions, as SyncBatchNorm does."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x, dims = input.float(), [0, *range(2, input.dim())]
        channels = (-1, *[1] * (x.dim() - 2))
        count = int(gathered(torch.tensor(x.numel() // x.shape[1])).sum())
        mean = gathered(x.sum(dims)).sum(0) / count
        centred = x - mean.view(channels)
        variance = gathered(centred.square().sum(dims)).sum(0) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean), momentum)
            self.running_var.lerp_(variance.detach().to(self.running_var) * (count / (count - 1)), momentum)
        x = centred * (variance + self.eps).rsqrt().view(channels)
        return (x * self.weight.view(channels) + self.bias.view(channels) if self.affine else x).to(input.dtype)


def share_batch_norm(networks: nn.Module) -> None:
    """Let batch norms take the statistics of the whole batch; their parameters and buffers stay the same tensors."""
    for module in list(networks.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, _BatchNorm):
                on_cpu = next(networks.parameters()).device.type == "cpu"
                shared = (GlobalBatchNorm if on_cpu else nn.SyncBatchNorm)(norm.num_features)
                shared.__dict__.update(norm.__dict__)
                setattr(module, name, shared)
