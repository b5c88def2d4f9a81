"""The judge, the feature network and the stage that trains them."""

import pytest
import torch
from conftest import refused
from torch.utils.data import default_collate as collate

from ldm.models.classifier import FeatureNetwork, Judge, inner
from ldm.training.classifier import ClassifierStage, random_affine
from ldm.training.contract import check_dataset
from ldm.training.share import BatchShare

STILL = {"rotation": 0.0, "shear": 0.0, "scale": 0.0, "shift": 0.0, "share": BatchShare()}


@pytest.mark.parametrize("network", [Judge, FeatureNetwork])
def test_networks_are_small_and_see_only_the_inner_pixels(network):
    model = network().eval()
    assert sum(p.numel() for p in model.parameters()) < 480_000  # under 1 MB in half precision
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    logits = model(images)
    assert logits.shape == (3, 10)
    images[:, :, :2], images[..., -2:] = 5.0, -5.0  # the padding
    assert torch.equal(model(images), logits)
    assert torch.equal(model(images[..., 2:30, 2:30]), logits)


@pytest.mark.parametrize("size", [(27, 28), (24, 24), (29, 28), (34, 34), (64, 64)])
def test_inner_refuses_what_has_no_central_part(size):
    refused("28 x 28", inner, torch.zeros(1, 1, *size))


@pytest.mark.parametrize("network", [Judge, FeatureNetwork])
def test_networks_of_another_size_see_that_size_alone(network):
    model = network(size=14).eval()
    images = torch.rand(3, 1, 14, 14) * 2 - 1
    logits = model(images)
    assert logits.shape == (3, 10)
    assert torch.equal(model(torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)), logits)
    match = "28 x 28 have no central 14 x 14 part: give 14 x 14 or 18 x 18"
    refused(match, model, torch.zeros(1, 1, 28, 28))  # whose middle would not be a digit


def test_no_feature_is_dead_or_louder_than_another():
    torch.manual_seed(0)
    network = FeatureNetwork()
    features = network.train().features(torch.rand(500, 1, 28, 28) * 2 - 1)  # batch statistics
    # Batch normalisation divides by the biased deviation: sqrt(500 / 499) at most beside it, and its epsilon of 1e-5.
    torch.testing.assert_close(features.std(dim=0), torch.ones(64), rtol=0, atol=2e-3)


def test_affine_without_amounts_changes_nothing():
    images = torch.rand(4, 1, 32, 32) * 2 - 1
    # Bilinear sampling at the pixels' own centres, found in float32: a weight of 1e-6 falls on the neighbours.
    torch.testing.assert_close(random_affine(images, **STILL), images, rtol=0, atol=1e-5)


def test_affine_keeps_to_its_bounds_and_to_the_random_state():
    images = torch.full((256, 1, 32, 32), -1.0)
    images[..., 16, 16] = 1.0  # one bright pixel
    torch.manual_seed(3)
    moved = random_affine(images, **{**STILL, "shift": 2.0})
    mass = (moved + 1)[:, 0]
    place = torch.arange(32.0)
    rows, columns = (mass.sum(2) @ place) / mass.sum((1, 2)), (mass.sum(1) @ place) / mass.sum((1, 2))
    shifts = torch.stack([rows, columns]) - 16
    assert shifts.abs().max() <= 2.0 + 1e-4
    # Uniform on [-2, 2]: standard deviation 2 / sqrt(3) = 1.155; of 512 draws it scatters by about 0.02.
    assert abs(shifts.std() - 1.155) < 0.08
    torch.manual_seed(3)
    assert torch.equal(random_affine(images, **{**STILL, "shift": 2.0}), moved)


def test_affine_rotates_by_degrees():
    torch.manual_seed(0)
    images = torch.full((400, 1, 32, 32), -1.0)
    images[:, :, 16:18, 28] = 1.0  # 12.5 pixels right of the centre (15.5)
    mass = (random_affine(images, **{**STILL, "rotation": 10.0}) + 1)[:, 0]
    place = torch.arange(32.0) - 15.5
    total = mass.sum((1, 2))
    angles = torch.atan2((mass.sum(2) @ place) / total - 1.0, (mass.sum(1) @ place) / total).rad2deg()
    assert angles.abs().max() < 11.0 and angles.abs().max() > 9.0  # interpolation moves the centre of mass by a little


def bars() -> list[dict]:
    """A data set of ten classes of bright rows, each at its own height."""
    images = torch.full((200, 1, 32, 32), -1.0)
    for i in range(200):
        images[i, :, 3 + 2 * (i % 10) : 5 + 2 * (i % 10), 8:24] = 1.0
    return [{"image": image, "label": i % 10, "caption": ""} for i, image in enumerate(images)]


def test_stage_learns_and_finishes_with_measured_statistics():
    torch.manual_seed(0)
    network = {"target": "ldm.models.classifier.FeatureNetwork", "params": {"widths": [4, 4], "features": 16}}
    stage = ClassifierStage(network, learning_rate=1e-2, shift=0.5, rotation=2.0)
    data = stage.prepare(bars())
    batch = collate(data[:50])
    (optimizer,) = stage.optimizers()
    for _ in range(40):
        loss, metrics = stage.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["accuracy"] > 0.95
    stage.train(False)
    stage.finish(data)
    features = stage.model.features(batch["image"])
    # The 50 images are the data set's, so its running statistics are theirs.
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-3)
    torch.testing.assert_close(features.var(dim=0, unbiased=False), torch.ones(16), rtol=0.02, atol=0)
    config, state = stage.export()
    rebuilt = FeatureNetwork(**config["params"])
    rebuilt.load_state_dict(state)
    # Sums in another order: the stage keeps its channels last.
    torch.testing.assert_close(rebuilt.eval()(batch["image"]), stage.model(batch["image"]), rtol=1e-4, atol=1e-4)
    assert len(stage.preview()) == 100 and stage.preview()[0].size == (32, 32)


def test_stage_refuses_images_without_labels():
    stage = ClassifierStage({"target": "ldm.models.classifier.Judge"}, learning_rate=1e-3)
    refused("have no label", check_dataset, stage, [{"image": torch.zeros(1, 32, 32), "caption": ""}])


def test_the_shipped_judges_maps_lead_to_its_logits():
    from ldm.evaluation.networks import JUDGE
    from ldm.loading import load_network

    judge = load_network(JUDGE)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    maps = judge.maps(images)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 28, 28), (2, 48, 14, 14), (2, 96, 7, 7)]
    assert torch.equal(judge.head(maps[-1].amax((2, 3))), judge(images))
