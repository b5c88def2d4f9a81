"""torch's CPU noise written in numpy, against `torch.randn` itself."""

import numpy as np
import pytest
import torch
from conftest import refused

from ldm.batching import Blend
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.sampling.numpy_noise import NormalGenerator, NumpyNoise

SEEDS = (0, 1, 5, 123456, 2**32 - 1, 2**32, 2**32 + 5, 2**63 + 7, 2**64 - 1)
# On both sides of 16, in an order in which a number of an odd pair is kept over a call of 16 and more.
SHAPES = ((3,), (1,), (4, 4), (2,), (15,), (17,), (1,), (31,), (4, 8, 8), (5, 3), (1, 1, 1), (3, 33), (4, 32, 40), ())


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_torchs_to_rounding(seed):
    ours, theirs = NormalGenerator(seed), torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        expected, found = torch.randn(shape, generator=theirs).numpy(), ours(shape)
        assert found.dtype == np.float32 and found.shape == shape
        # fewer than 16: float64 of the same libm; else float32 up to |5.8|, whose sine is rounded at angles up to 2 pi
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if found.size < 16 else 1e-6)


def test_a_batch_is_that_of_seeded_noise():
    seeds = [7, Blend(0, 1, 0.3), 2**40]
    ours, theirs = (kind(seeds, (4, 8, 8)) for kind in (NumpyNoise, SeededNoise))
    for _ in range(3):
        np.testing.assert_allclose(ours(), theirs(), rtol=0, atol=2e-6)


def test_seeds_that_torch_refuses():
    for seed in (-1, 2**64):
        refused(f"seed must be from 0 to {2**64 - 1}, got {seed}", NumpyNoise, [seed], (2,))
