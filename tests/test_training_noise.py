"""Noise of training: its distribution, and which image gets which."""

import itertools

import pytest
import torch

from ldm.diffusion.training_noise import assign_noise, training_noise


def test_plain_noise_is_torchs_own():
    x0 = torch.zeros(3, 2, 4, 4)
    torch.manual_seed(0)
    found = training_noise(x0)
    torch.manual_seed(0)
    assert torch.equal(found, torch.randn_like(x0))


def test_offset_is_one_number_a_channel():
    """Two numbers of a channel have the covariance offset^2, which of other channels are independent."""
    torch.manual_seed(0)
    n, offset = 20_000, 0.5
    noise = training_noise(torch.zeros(n, 2, 1, 2), offset=offset).flatten(1).double()  # (n, two of each channel)
    expected = torch.eye(4).double()
    expected[:2, :2] += offset**2
    expected[2:, 2:] += offset**2
    torch.testing.assert_close(noise.T @ noise / n, expected, rtol=0, atol=5 * 1.25 * 2**0.5 / n**0.5)
    with pytest.raises(ValueError, match="offset -0.1 must not be below 0"):
        training_noise(torch.zeros(1, 1, 1, 1), offset=-0.1)


def test_immiscible_noise_is_the_assignment_of_least_distance():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 1, 2, 2, generator=generator)

    def distance(order):
        return float((x0 - noise[list(order)]).square().sum())

    best = min(itertools.permutations(range(5)), key=distance)
    assert assign_noise(x0, noise).tolist() == list(best) != [0, 1, 2, 3, 4]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in training
        assert assign_noise(x0, noise).tolist() == list(best)
    torch.manual_seed(1)
    assigned = training_noise(x0, immiscible=True)
    torch.manual_seed(1)
    plain = torch.randn_like(x0)
    assert {tuple(row) for row in assigned.flatten(1).tolist()} == {tuple(row) for row in plain.flatten(1).tolist()}
    assert (x0 - assigned).square().sum() < (x0 - plain).square().sum()
