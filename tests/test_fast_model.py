"""The digits model of one step that ships: its size and settings, and that its images are the digits asked for."""

import numpy as np
import pytest
import torch

import ldm
from ldm.checkpoint.networks import PRETRAINED
from ldm.data.captions import NUMBER_WORDS
from ldm.evaluation.networks import JUDGE, classify, load_image_network


@pytest.fixture(scope="module")
def model():
    return ldm.load("digits-fast", device="cpu")


def test_it_is_small_and_takes_one_step_without_guidance(model):
    assert (PRETRAINED / "digits-fast.safetensors").stat().st_size < 8_000_000
    assert [model.defaults[name] for name in ("sampler", "steps", "scale")] == ["lcm", 1, 1.0]


@pytest.mark.smoke
def test_the_judge_reads_the_digits_asked_for_after_one_evaluation(model):
    calls = []
    model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    images = model.generate([f"a handwritten digit {word}" for word in NUMBER_WORDS] * 4, seed=0, batch_size=40)
    assert len(calls) == 1
    pixels = torch.from_numpy(np.stack([np.asarray(image)[2:30, 2:30] for image in images]))  # without the border
    read = classify(load_image_network(JUDGE), pixels)
    assert (read == torch.arange(10).repeat(4)).sum() >= 38  # of 2,000, 98.8 % are
