"""Reproducible noise: one generator per image."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Calling it draws unit normal noise, float32 (b, *shape) on the CPU, image i's from a CPU generator of its own.

    So an image's noise depends on its seed and on how often noise was drawn, and on neither the batch nor the device.
    Draw the start first, then let the sampler draw each step's.

    seeds: b seeds, from 0 to 2^64 - 1. shape: of one image, (c, h, w). Raises ValueError for a seed out of range.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise ValueError(f"a seed must be from 0 to {2**64 - 1}, got {seed}")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
