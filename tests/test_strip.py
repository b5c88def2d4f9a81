"""How a picture came about, and what noising does to it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.diffusion.sampling import Step
from ldm.inference.draw import StripRecorder


def test_a_strip_noises_the_image_to_the_levels_it_came_down():
    model = SimpleNamespace(decode=lambda latents: latents.clamp(-1, 1))
    recorder, sigmas = StripRecorder(model, steps=4), [1.5, 0.8, 0.3, 0.0]
    drawn = torch.zeros(2, 1, 40, 40)
    for index, sigma in enumerate(sigmas):
        recorder(Step(index, sigma, drawn if sigma == 0 else torch.ones_like(drawn), drawn))
    of_both = [[np.array(image) / 127.5 - 1 for image in pictures[0]] for pictures in recorder.pictures]
    noised = of_both[1]
    assert len(noised) == 4 and np.abs(noised[0]).max() < 0.01  # it begins with the picture itself, grey
    for sigma, picture in zip(sigmas[2::-1], noised[1:], strict=True):
        spread = sigma / math.sqrt(1 + sigma**2)  # in the frame of unit variance
        inside = np.mean(np.abs(picture) < spread)
        assert inside == pytest.approx(0.6827, abs=0.05)  # a normal distribution's; 1,600 pixels scatter by 0.012

    def agreeing(one, other):
        return np.mean(np.sign(one) == np.sign(other))

    # A level's noise is that of the level before and more: their correlation is the ratio of the sigmas.
    for i, ratio in ((1, 0.3 / 0.8), (2, 0.8 / 1.5)):
        share = 0.5 + math.asin(ratio) / math.pi
        assert agreeing(noised[i], noised[i + 1]) == pytest.approx(share, abs=0.05)
    assert agreeing(noised[1], of_both[0][1]) == pytest.approx(0.5, abs=0.05)  # each picture has noise of its own


def test_a_strip_of_many_steps_has_its_columns():
    model = SimpleNamespace(decode=lambda latents: latents)
    recorder = StripRecorder(model, steps=25)
    for index in range(25):
        recorder(Step(index, 24.0 - index, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)))
    assert [len(row) for row in recorder.pictures[0]] == [10, 10, 10]
    assert recorder.levels[-1] == 0 and len(recorder.levels) == 10
    assert recorder.strip(0).size == (10 * 10 - 2, 3 * 10 - 2)
