"""The stage that trains the noisy classifier: its loss by hand, what it learns and what it leaves."""

import numpy as np
import pytest
import torch
from conftest import refused
from golden_fill import fill, unet_params
from torch.nn import functional as F
from torch.utils.data import default_collate as collate

from ldm.checkpoint.file import load_file
from ldm.checkpoint.writing import save_file
from ldm.diffusion.schedule import make_schedule, q_sample, training_timesteps
from ldm.loading import load_network
from ldm.optional.noisy_classifier_stage import NoisyClassifierStage
from ldm.training.stage import Trained

PARAMS = unet_params(image_size=16, in_channels=1, model_channels=8, attention_resolutions=[], num_head_channels=8)
PARAMS |= {"norm_groups": 4, "resblock_updown": True, "pool": "attention"}
NETWORK = {"target": "ldm.optional.noisy_classifier.EncoderUNetModel", "params": PARAMS}
CPU = torch.device("cpu")


def bars(classes: int = 4, **changes) -> list[dict]:
    """A data set of bright rows, each class at its own height."""
    images = torch.full((40, 1, 16, 16), -1.0)
    for i in range(40):
        images[i, :, 1 + 4 * (i % 4) : 4 + 4 * (i % 4)] = 1.0
    return [{"image": image, "label": i % classes} | changes for i, image in enumerate(images)]


def stage(**changes) -> NoisyClassifierStage:
    torch.manual_seed(0)
    options = {"network": NETWORK, "learning_rate": 1e-2, "schedule": {"name": "cosine", "T": 100}}
    return NoisyClassifierStage(**options | changes)


def test_the_loss_is_the_cross_entropy_of_noised_images_at_their_levels():
    training, data = stage(timesteps={"name": "logit_normal", "mean": 0.5}), collate(bars())
    fill(training.model, 3)
    torch.manual_seed(4)
    loss, metrics = training.loss(data)
    torch.manual_seed(4)
    t = training_timesteps("logit_normal", 40, 100, mean=0.5)
    noised = q_sample(data["image"], t, torch.randn(40, 1, 16, 16), make_schedule("cosine", T=100))
    p = training.model(noised, t).double().softmax(1)[torch.arange(40), data["label"]]
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert metrics["loss"] is loss and 0 <= metrics["accuracy"] <= 1
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in training.model.parameters())
    (optimizer,) = training.optimizers()
    optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert optimized == {id(p) for p in Trained(training).parameters()}


@pytest.mark.smoke
def test_it_learns_and_what_it_leaves_is_a_classifier_with_its_schedule(tmp_path):
    training, data = stage(), collate(bars())
    assert len(training.prepare(bars())) == 40
    (optimizer,) = training.optimizers()
    for _ in range(60):
        loss, _ = training.loss(data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    training.train(False)
    found = {}
    for level in (0, 30, 99):
        t = torch.full((40,), level)
        noise = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = training.model(q_sample(data["image"], t, noise, training.schedule), t)
        found[level] = F.cross_entropy(logits, data["label"])
    assert found[0] < 0.1 and found[30] < 0.2
    assert found[99] > 1  # nothing remains of the image: a coin of four sides has log 4 = 1.4

    images = training.preview()
    assert len(images) == 100 and images[0].size == (16, 16)
    black = [not np.asarray(image).any() for image in images]
    assert not any(black[::10]) and any(black[9::10])  # clean ones are read, and some of pure noise are not

    config, state = training.export()
    save_file(tmp_path / "classifier.safetensors", state, config)
    assert load_file(tmp_path / "classifier.safetensors")[0]["schedule"] == {"name": "cosine", "T": 100}
    network = load_network(tmp_path / "classifier.safetensors")
    t = torch.full((40,), 7)
    assert torch.equal(network(data["image"], t), training.model(data["image"], t))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timesteps": {"name": "normal"}}, "unknown distribution of timesteps 'normal'"),
        ({"schedule": {"name": "linaer"}}, "unknown noise schedule 'linaer'"),
        ({"schedule": {"nam": "linear"}}, "^schedule: .*'nam'.*; it takes"),
        ({"network": {"target": "ldm.optional.noisy_classifier.EncoderUNetModel", "params": {"pol": "x"}}}, "'pol'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    refused(message, stage, **changes)


@pytest.mark.parametrize(
    "data, message",
    [
        (bars(image=torch.zeros(3, 16, 16)), r"does not fit images of \(3, 16, 16\)"),
        (bars(image=torch.zeros(1, 32, 32)), "8 x 8, and got 16 x 16"),
        (bars(classes=10), "label 9, and the network.s classes end at 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(data, message):
    refused(message, stage().prepare, data)
