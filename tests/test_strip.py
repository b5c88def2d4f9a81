"""The strip of an image: the forward process, x_t and the predicted x0."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.diffusion.sampling import Step
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.inference.strip import StripRecorder
from ldm.labels import GAP, LINE


def test_a_strip_noises_the_image_to_the_kept_levels():
    model = SimpleNamespace(seeded_noise=SeededNoise, decode=lambda latents: latents.clamp(-1, 1))
    recorder, sigmas = StripRecorder(model, steps=4), [1.5, 0.8, 0.3, 0.0]
    sampled = torch.zeros(2, 1, 40, 40)
    for index, sigma in enumerate(sigmas):
        recorder(Step(index, sigma, sampled if sigma == 0 else torch.ones_like(sampled), sampled))
    of_both = [[np.array(image) / 127.5 - 1 for image in rows[0]] for rows in recorder.rows]
    noised = of_both[1]
    assert len(noised) == 4 and np.abs(noised[0]).max() < 0.01  # it begins with the image itself, grey
    for sigma, image in zip(sigmas[2::-1], noised[1:], strict=True):
        spread = sigma / math.sqrt(1 + sigma**2)  # in the frame of unit variance
        inside = np.mean(np.abs(image) < spread)  # of a normal distribution; standard error of 1,600 pixels: 0.012
        assert inside == pytest.approx(0.6827, abs=0.05)

    def agreeing(one, other):
        return np.mean(np.sign(one) == np.sign(other))

    # A level's noise is that of the level before and more: their correlation is the ratio of the sigmas.
    for i, ratio in ((1, 0.3 / 0.8), (2, 0.8 / 1.5)):
        share = 0.5 + math.asin(ratio) / math.pi
        assert agreeing(noised[i], noised[i + 1]) == pytest.approx(share, abs=0.05)
    assert agreeing(noised[1], of_both[0][1]) == pytest.approx(0.5, abs=0.05)  # each image has its own noise


def test_a_strip_of_many_steps_keeps_ten():
    model = SimpleNamespace(seeded_noise=SeededNoise, decode=lambda latents: latents)
    recorder = StripRecorder(model, steps=25)
    for index in range(25):
        recorder(Step(index, 24.0 - index, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)))
    assert [len(row) for row in recorder.rows[0]] == [10, 10, 10]
    assert recorder.sigmas[-1] == 0 and len(recorder.sigmas) == 10
    assert recorder.strip(0).size == recorder.strip(0, 12).size  # 96 pixels of height
    assert recorder.strip(0).width >= 10 * (96 + GAP) and recorder.strip(0).height > 3 * (96 + 2 * LINE)
