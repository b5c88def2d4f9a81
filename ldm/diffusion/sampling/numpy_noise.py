"""The noise of `SeededNoise` without torch: its CPU generator's normal numbers, written in numpy.

torch's CPU generator is mt19937 (Matsumoto & Nishimura 1998), which numpy has too. Normal numbers are made of its
uniform ones in pairs (Box & Muller 1958), in one of two ways (torch, ATen/native/cpu/DistributionTemplates.h):

    fewer than 16   one pair after the other in float64; the second number of an odd pair is kept for the next call
    16 or more      in blocks of 16 in float32, number i of a block with number i + 8; if the last block is not full,
                    the last 16 numbers are made anew

The uniform numbers are torch's to the bit, the normal ones to the rounding of float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.batching import Blend, of_ends

BLOCK = 16


class NormalGenerator:
    """Generate the numbers of `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`, call by call."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed must be from 0 to {2**64 - 1}, got {seed}")
        self.bits = np.random.RandomState(seed % 2**32)  # torch's takes the lower 32 bits, too
        self.kept: list[float] = []  # at most one number, for the next call of fewer than 16

    def __call__(self, shape: Sequence[int]) -> np.ndarray:
        """Return unit normal noise, float32, of that shape."""
        count = math.prod(shape)
        return (self._blocks(count) if count >= BLOCK else self._pairs(count)).reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self.bits.randint(2**32, size=count, dtype=np.uint32)

    def _pairs(self, count: int) -> np.ndarray:
        found, self.kept = self.kept[:count], self.kept[count:]
        while len(found) < count:
            high, low, high2, low2 = map(int, self._words(4))
            turn, share = ((a << 32 | b) % 2**53 * 2.0**-53 for a, b in ((high, low), (high2, low2)))
            radius, angle = math.sqrt(-2 * math.log1p(-share)), 2 * math.pi * turn
            found += [radius * math.cos(angle), radius * math.sin(angle)]
        found, self.kept = found[:count], self.kept + found[count:]
        return np.array(found, dtype=np.float32)

    def _blocks(self, count: int) -> np.ndarray:
        numbers = self._uniform(count)
        full = count // BLOCK * BLOCK
        numbers[:full] = _box_muller(numbers[:full])
        if full < count:
            numbers[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return numbers

    def _uniform(self, count: int) -> np.ndarray:
        """Return float32 numbers in [0, 1): the lower 24 bits of each word."""
        return (self._words(count) % np.uint32(2**24)).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Return the normal numbers of blocks of uniform ones, float32 (16 n,)."""
    share, turn = uniform.reshape(-1, 2, BLOCK // 2).swapaxes(0, 1)  # (n, 8) each
    radius, angle = np.sqrt(-2 * np.log(1 - share)), np.float32(2 * math.pi) * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


class NumpyNoise:
    """Return what `SeededNoise` returns, as numpy arrays."""

    def __init__(self, seeds: Sequence[int | Blend], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.generators = [of_ends(NormalGenerator, seed) for seed in seeds]

    def __call__(self) -> np.ndarray:
        return np.stack([self._noise(generator) for generator in self.generators])

    def _noise(self, generator: NormalGenerator | Blend) -> Any:
        if not isinstance(generator, Blend):
            return generator(self.shape)
        from ldm.interpolation import slerp  # only a blend needs it

        return slerp(*of_ends(self._noise, generator))
