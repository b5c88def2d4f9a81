"""Quality of generated images during a training: the figures by hand, and a training that is as without them."""

import json
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import refused
from test_evaluation import small_networks
from test_loop import assert_same
from test_validation import logged
from tiny_stages import config_of, write_inputs

from ldm.commands.train import main
from ldm.data.digits import Digits
from ldm.evaluation.frechet import frechet_distance, moments
from ldm.evaluation.networks import load_image_network
from ldm.evaluation.quality import Quality, feature_function
from ldm.training.rehearsal import rehearse

TARGET = "ldm.evaluation.quality.Quality"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return {name: str(path) for name, path in small_networks(tmp_path_factory.mktemp("networks")).items()}


def test_the_figures_by_hand(model, networks):
    data = Digits(first=12)
    given = {"classifier": networks["judge"], "features": networks["features"], "images": 8}
    found = Quality(model, data, batch_size=3, **given).measure()
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:8].tolist()
    made = model.generate([data[i]["caption"] for i in chosen], seeds=range(8), plain=True)
    x = torch.stack([torch.from_numpy(np.array(image))[None] for image in made]).float() / 127.5 - 1
    real = torch.stack([data[i]["image"] for i in chosen])
    judge, network = load_image_network(networks["judge"]), load_image_network(networks["features"], "features")
    with torch.no_grad():
        distance = frechet_distance(*moments(network.features(x)), *moments(network.features(real)))
        right = judge(x).argmax(1) == torch.tensor([data[i]["label"] for i in chosen])
    assert found == {"frechet": pytest.approx(distance, rel=1e-4), "accuracy": right.double().mean().item()}


def test_images_of_several_shapes_are_measured(model):
    class Shapes(Digits):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"image": sample["image"].repeat(1, 1, 1 + index % 2)}

    assert Quality(model, Shapes(first=6), images=6).measure(steps=1)["frechet"] > 0


def test_training_is_as_without_it(tmp_path, networks, capsys):
    paths = []
    for name, quality in (("plain", None), ("measured", {"images": 4, "classifier": networks["judge"]})):
        config = config_of("pixel") | {"outdir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        changes = [f"loop.quality={{target: {TARGET}, params: {json.dumps(quality)}}}", "loop.quality_every=1"]
        main([str(tmp_path / f"{name}.yaml"), "--device", "cpu", *(changes if quality else [])])
        paths.append(tmp_path / name / "pixel" / "model.safetensors")
    assert_same(*paths)
    found = [line for line in logged(paths[1]) if "quality/frechet" in line]
    assert [line["step"] for line in found] == [1, 2] and all(0 <= line["quality/accuracy"] <= 1 for line in found)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("autoencoder", {"quality": {"target": TARGET}}, "AutoencoderStage trains no model that generates images"),
        ("pixel", {"quality_every": 2}, "quality_every needs loop.quality"),
        ("pixel", {"quality": {"target": "ldm.models.classifier.Judge"}}, "got an unexpected|measures no images"),
        ("folder", {"quality": {"target": TARGET, "params": {"classifier": "judge"}}}, "of Folder have no label"),
        (
            "folder",
            {"quality": {"target": TARGET, "params": {"images": 1}}},
            "images 1 must be an integer of at least 2",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, monkeypatch, name, settings, message):
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = config_of(name)
    config["loop"] |= settings
    refused(message, rehearse, [config], False, torch.device("cpu"))


def test_inception(tmp_path):
    """torch-fidelity's network with random weights: its own features, of grey images too."""
    path = tmp_path / "inception.pth"
    if find_spec("torch_fidelity") is None:
        refused("need the package torch-fidelity: pip install", feature_function, str(path), torch.device("cpu"))
        pytest.skip("torch-fidelity is not installed")
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = feature_function(str(path), torch.device("cpu"))(images)
        assert torch.equal(found, network(images.expand(-1, 3, -1, -1))[0]) and found.shape == (2, 2048)
