"""Classifier guidance of a model through `generate`, by a classifier from a file."""

import numpy as np
import pytest
import torch
from conftest import pixels, randomised, refused
from golden_fill import unet_params

from ldm.checkpoint.writing import save_file
from ldm.diffusion.schedule import make_schedule
from ldm.inference.guiders import classifier_guide, load_classifier
from ldm.optional.noisy_classifier import EncoderUNetModel

PARAMS = unet_params(model_channels=16, out_channels=10, attention_resolutions=[], num_head_channels=16, norm_groups=8)
PARAMS["pool"] = "attention"
TARGET = "ldm.optional.noisy_classifier.EncoderUNetModel"


def write(path, schedule=None, **changes):
    """Write a classifier's file, with random weights."""
    torch.manual_seed(0)
    network = randomised(EncoderUNetModel(**PARAMS | changes))
    config = {"target": TARGET, "params": PARAMS | changes} | ({} if schedule is None else {"schedule": schedule})
    save_file(path, network.state_dict(), config)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("classifier") / "classifier.safetensors", {"name": "cosine"})


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_it_moves_images_under_every_sampler_and_by_its_class(model, file, sampler):
    """Common mistakes: guidance that DDIM accepts and ignores (row 26 of the reference)."""
    noisy = load_classifier(file, model)

    def generate(guide):
        return pixels(model.generate(["5", "5", "6", ""], sampler=sampler, guide=guide, scale=1))

    plain, guided = generate(None), generate(classifier_guide(noisy, 30.0))
    assert np.array_equal(generate(classifier_guide(noisy, 0.0)), plain)  # to the bit
    assert [np.array_equal(*pair) for pair in zip(guided, plain, strict=True)] == [False, False, False, True]


def test_an_image_is_guided_alone_as_in_a_batch(model, file):
    guide = classifier_guide(load_classifier(file, model), 10.0)
    both = pixels(model.generate(["3", "5"], guide=guide))
    alone = pixels(model.generate(["5"], guide=guide, seed=1))
    assert np.abs(both[1] - alone[0]).max() <= 1


def test_the_classifier_has_its_own_schedule(model, tmp_path):
    """One noise level is another timestep of another schedule."""
    noisy = load_classifier(write(tmp_path / "a.safetensors", {"name": "linear", "T": 300}), model)
    assert noisy.schedule.T == 300 and noisy.classes == 10
    assert torch.equal(noisy.schedule.alphas_cumprod, make_schedule("linear", 300).alphas_cumprod)
    seen = []
    network = noisy.network.forward
    noisy.network.forward = lambda x, t: seen.append(t[0].item()) or network(x, t)
    model.generate(["1"], steps=4, guide=classifier_guide(noisy, 1.0))
    sigmas = [model.schedule.sigmas[t] for t in (999, 749, 499, 249)]
    assert seen == pytest.approx([noisy.schedule.t_at(float(sigma)) for sigma in sigmas])


def test_unfit_prompts_are_refused(model, file):
    guide = classifier_guide(load_classifier(file, model), 1.0)
    refused("class 'a five' does not exist", model.generate, ["a five"], guide=guide)
    refused("class 10 does not exist: this model's are 0 to 9", model.generate, ["10"], guide=guide)


@pytest.mark.parametrize(
    ("schedule", "changes", "message"),
    [
        (None, {}, "no schedule"),
        ({"nam": "cosine"}, {}, r"^schedule of .*a.safetensors: .*'nam'; it takes"),
        ({"name": "cosine"}, {"in_channels": 1}, r"does not fit this model, whose latents are \(4, 8, 8\)"),
        ({"name": "cosine"}, {"image_size": 16}, r"does not fit this model.*8 x 8, and got 4 x 4"),
    ],
)
def test_unfit_classifiers_are_refused(model, tmp_path, schedule, changes, message):
    refused(message, load_classifier, write(tmp_path / "a.safetensors", schedule, **changes), model)
