"""Reproducible noise: one random generator per image."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Return unit normal noise, float32 (b, *shape) on the CPU, at each call.

    Each image has a CPU generator of its own, so its noise depends on its seed and the number of calls, but not on the
    batch or the device. The first call gives the noise that sampling starts from, the others that of its steps. The
    shape is that of one image, (c, h, w).
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        for seed in seeds:
            if not 0 <= seed < 2**64:
                raise ValueError(f"a seed must be from 0 to {2**64 - 1}, got {seed}")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


PictureNoise = SeededNoise  # its name in version 0.1
