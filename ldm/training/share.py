"""The part of one process in a batch that several train on together, so that they do what one does with the batch."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ldm.training.order import mix_seed


class BatchShare:
    """What one of `count` processes has of a batch, and the random numbers of its images.

    They are made for the whole batch, alike in all processes, and cut, so that an image gets the same ones on any
    number of processes. One process takes them from torch's global generators, as do in each process the layers of the
    networks that are random themselves, such as dropout, which are seeded differently.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count, self.seed = rank, count, 0
        self.generators: dict[torch.device, torch.Generator] = {}

    def begin(self, seed: int, number: int) -> None:
        """Seed the random numbers of batch `number`."""
        torch.manual_seed(mix_seed(seed, number, self.rank))
        self.seed, self.generators = mix_seed(seed, number, 0), {}

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator | None:
        """Return the generator that is alike in all processes; None, torch's global one, for one process."""
        device = torch.device(device)
        if self.count > 1 and device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators.get(device)

    def cut(self, batch: Tensor, parts: int = 1) -> Tensor:
        """Return what this process has of a whole batch's (n, ...), which consists of `parts` batches in a row."""
        return torch.cat([part.tensor_split(self.count)[self.rank] for part in batch.chunk(parts)])

    def joined(self, own: Tensor, parts: int = 1) -> Tensor:
        """Return the whole batch's tensor (n, ...) of which `cut` gives `own`, with gradients for all processes."""
        if self.count == 1:
            return own
        return gathered(own).unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 2)

    def randn(self, like: Tensor) -> Tensor:
        """Return normal noise of the shape, dtype and device of a tensor (b, ...) of images."""
        shape = len(like) * self.count, *like.shape[1:]
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        return self.cut(torch.randn(shape, generator=self.generator(like.device), **options))

    def rand(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1) on the CPU, of a shape that begins with the number of images."""
        return self.cut(torch.rand(shape[0] * self.count, *shape[1:], generator=self.generator()))

    def objects(self, own: list[Any]) -> list[Any]:
        """Return the items of all processes' lists, which are pickled, in the order of the whole batch."""
        if self.count == 1:
            return own
        found: list[list[Any]] = [[]] * self.count
        torch.distributed.all_gather_object(found, own)
        return [item for items in found for item in items]

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of the processes' tensors, with gradients for all."""
        return x if self.count == 1 else gathered(x).mean(0)


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
