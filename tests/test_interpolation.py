"""Prompts and seeds between two others."""

import math

import pytest
import torch
from conftest import TINY, pixels, refused

from ldm.batching import Blend
from ldm.conditioning.prompt import count_chunks
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.interpolation import interpolate, slerp


def test_they_are_evenly_spaced():
    assert interpolate(3, 4, "5") == [Blend(3, 4, share) for share in (0, 0.25, 0.5, 0.75, 1)]
    refused("count must be at least 2, got 1", interpolate, 3, 4, 1)


def test_slerp_turns_at_a_constant_speed_and_keeps_the_length():
    first, last = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 2, 0])
    for share in (0, 0.25, 0.5, 1):
        angle = share * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle), 0])
        torch.testing.assert_close(slerp(first, last, share), expected, atol=1e-6, rtol=0)
    assert torch.equal(slerp(first, first, 0.3), first)
    assert not slerp(first, -first, 0.5).any()


def test_noise_between_seeds_is_unit_normal_at_every_call():
    noise, (first, last) = SeededNoise([Blend(0, 1, 0.5), 0, 1], (4, 64, 64)), (1, 2)
    for _ in range(2):
        drawn = noise()
        assert torch.equal(drawn[0], slerp(drawn[first], drawn[last], 0.5))
        assert drawn[0].std() == pytest.approx(1, abs=0.03)  # a straight line would give 0.71


def test_images_begin_and_end_at_those_of_the_ends(tiny_model):
    settings = {"steps": 3, "sampler": "ddpm"}
    found = pixels(tiny_model.generate(interpolate("5", "6", 3), seeds=interpolate(2, 7, 3), **settings))
    ends = pixels(tiny_model.generate(["5", "6"], seeds=[2, 7], **settings))
    alone = pixels(tiny_model.generate([Blend("5", "6", 0.5)], seeds=[Blend(2, 7, 0.5)], **settings))
    assert abs(found - [ends[0], alone[0], ends[1]]).max() <= 1  # of another batch size
    assert all(abs(found[1] - end).mean() > 5 for end in ends)


def test_prompts_of_different_lengths(tiny_model):
    room = TINY["cond_stage_config"]["params"]["context_length"] - 2
    blend = Blend("5", "6 " * (room + 1), 0.5)
    assert count_chunks(tiny_model.cond_stage_model, [blend, "5"]) == [2, 1]
    cond = tiny_model.condition([blend, "5"])
    first, last = (tiny_model.condition([end, "5"], chunks=2) for end in (blend.first, blend.last))
    for name, found in cond.items():
        torch.testing.assert_close(found[0], (first[name][0] + last[name][0]) / 2)
        torch.testing.assert_close(found[1], first[name][1])


def test_what_has_nothing_between(tiny_model):
    from ldm.conditioning.classes import ClassLabels
    from ldm.conditioning.prompt import encode_prompts

    refused("class numbers, between which there is nothing", encode_prompts, ClassLabels(11), interpolate(1, 2, 3))
    refused("seed 'x' is not an integer", tiny_model.generate, ["5"], seeds=[Blend(0, "x", 0.5)])
    refused("prompt 6 is not text", tiny_model.generate, ["5", Blend("5", 6, 0.5)])
