"""Reproducible noise: one random generator per image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.batching import Blend, of_ends


class SeededNoise:
    """Return unit normal noise, float32 (b, *shape) on the CPU, at each call.

    Each image has a CPU generator of its own, so its noise depends on its seed and the number of calls, but not on the
    batch or the device. The first call gives the noise that sampling starts from, the others that of its steps. The
    shape is that of one image, (c, h, w). The noise of a `Blend` of two seeds is interpolated between theirs.
    """

    def __init__(self, seeds: Sequence[int | Blend], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [of_ends(_generator, seed) for seed in seeds]

    def __call__(self) -> Tensor:
        return torch.stack([self._noise(generator) for generator in self.generators])

    def _noise(self, generator: torch.Generator | Blend) -> Tensor:
        if not isinstance(generator, Blend):
            return torch.randn(self.shape, generator=generator)
        from ldm.interpolation import slerp  # only a blend needs it

        return slerp(*of_ends(self._noise, generator))


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must be from 0 to {2**64 - 1}, got {seed}")
    return torch.Generator().manual_seed(seed)


PictureNoise = SeededNoise  # its name in version 0.1
