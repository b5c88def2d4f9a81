"""Measuring on a folder of own images, and refusing to measure what is not digits as digits."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.commands import evaluate
from ldm.conditioning.classes import ClassLabels
from ldm.conditioning.tokenizer import Tokenizer, reduce
from ldm.data.folder import Folder
from ldm.evaluation import commands
from ldm.evaluation.networks import load_image_network
from ldm.evaluation.own_data import Halves, encode, report_agreement, report_images
from ldm.images import to_pil
from ldm.models.identity import IdentityFirstStage
from ldm.training.clip import CLIPStage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighty colour images of a bright rectangle somewhere, wider than high, with captions."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(80):
        image = np.full((16, 24, 3), 40, np.uint8)
        top, left = rng.integers(0, 8, 2)
        image[top : top + 8, left : left + 10] = rng.integers(80, 256, 3)
        Image.fromarray(image).save(path / f"{i:02}.png")
        (path / f"{i:02}.txt").write_text(f"rectangle {i}")
    return path


class Model:
    """Generates the images that it is given, whatever the prompt."""

    def __init__(self, images, conditioner="of texts", **changes):
        self.images, self.prompts, self.cond_stage_model = images, [], conditioner
        self.defaults, self.image_channels = {"height": 16, "width": 24, "steps": 5}, 3
        self.first_stage_model = SimpleNamespace(decoder=torch.nn.Identity())
        vars(self).update(changes)

    def generate(self, prompts, seed, batch_size, **settings):
        self.prompts += prompts
        return to_pil(self.images[seed : seed + len(prompts)])


def test_halves_of_a_folder(folder):
    halves = Halves(folder, (24, 16), 3)
    assert halves.images.shape == halves.others.shape == (40, 3, 16, 24) and halves.images.dtype == torch.uint8
    files = [np.asarray(Image.open(folder / f"{caption.split()[1]:0>2}.png")) for caption in halves.captions]
    assert np.array_equal(halves.images.permute(0, 2, 3, 1).numpy(), np.stack(files))
    refused("none is not a folder", Halves, folder / "none", (24, 16), 3, error=OSError)


def test_figures_of_real_images_of_copies_and_of_noise(folder):
    halves = Halves(folder, (24, 16), 3)
    real, noise = halves.others, torch.randint(0, 256, (40, 3, 16, 24), dtype=torch.uint8)
    as_real, as_noise = report_images(real, halves), report_images(noise, halves)
    assert as_real["frechet"]["ratio"] == pytest.approx(1, abs=0.01)  # the floor is of these very images, all of them
    assert as_noise["frechet"]["ratio"] > 3 and as_noise["precision_recall"]["precision"] == 0
    assert as_real["memorisation"]["median"] == 0 and as_noise["memorisation"]["ratio"] > 1.5


@pytest.mark.parametrize(("conditioner", "kind"), [("of texts", "text"), (ClassLabels(4), "class"), (None, "none")])
def test_the_command_measures_a_model(folder, tmp_path, monkeypatch, conditioner, kind):
    halves = Halves(folder, (24, 16), 3)
    model = Model(halves.others, conditioner)
    (tmp_path / "model.safetensors").write_bytes(b"model")
    monkeypatch.setattr(commands, "load_model", lambda args: model)
    argv = ["model", "--ckpt", str(tmp_path / "model.safetensors"), "--dataset", str(folder), "--n", "30"]
    evaluate.main([*argv, "--out", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == 30 and report["features"] == "pixels, averaged to 8 x 8" and report["frechet"]["floor"] > 0
    expected = {"text": halves.captions[:30], "class": [i % 3 for i in range(30)], "none": [""] * 30}
    assert model.prompts == expected[kind]
    with Image.open(tmp_path / "report.png") as sheet:
        assert sheet.mode == "RGB"
    refused("41 images are more than half", evaluate.main, [*argv[:-1], "41"])
    refused("--wording is for digits", evaluate.main, [*argv, "--wording", "unseen"])
    refused("neither mnist, digits nor a folder", evaluate.main, ["model", "--dataset", "cifar"])


def test_the_command_measures_an_autoencoder(folder, tmp_path, monkeypatch):
    exact = IdentityFirstStage(3)
    exact.weight = torch.nn.Parameter(torch.ones(1))
    monkeypatch.setattr(commands, "load_autoencoder", lambda path, device: (exact, 1.0))
    argv = ["autoencoder", f"--dataset={folder}", f"--out={tmp_path / 'report.json'}"]
    evaluate.main(argv)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == 40 and report["psnr"] == {"mean": None, "first_percentile": None}  # infinite
    refused("the model has colours, .* give your images as --dataset DIR", evaluate.main, [argv[0], argv[2]])


TEXTS = reduce(["a red square"], 4000, cleaning="openclip")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "has colours"),
        ({"image_channels": 1}, "makes 24 x 16 pixels"),
        (
            {
                "image_channels": 1,
                "defaults": {"height": 32, "width": 32},
                "cond_stage_model": SimpleNamespace(tokenizer=Tokenizer(TEXTS, cleaning="openclip")),
            },
            "not trained on the words of digits",
        ),
    ],
)
def test_a_model_of_other_things_is_not_measured_as_digits(monkeypatch, changes, said):
    model = Model(None, **changes)
    monkeypatch.setattr(commands, "load_model", lambda args: model)
    refused(said, evaluate.main, ["model", "--n", "10"])


def test_agreement_by_the_models_own_clip(folder, tmp_path):
    """The file of the image half gives the stage's own embeddings; a real image agrees with its caption as it does."""
    vision = {"patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    path = tmp_path / "image_encoder.safetensors"
    stage = CLIPStage(vision, 1e-3, width=16, layers=1, heads=2, projection_dim=12, image_encoder=str(path))
    stage.prepare(Folder(folder, 16))
    stage.train(False).finish(None)
    stage.export()
    halves = Halves(folder, (16, 16), 3)
    pixels = halves.images.float() / 127.5 - 1
    with torch.no_grad():
        images, texts, _ = stage._embed({"image": pixels, "caption": halves.captions})
    encoder = load_image_network(path)
    torch.testing.assert_close(encode(encoder, halves.images), images, rtol=1e-5, atol=1e-6)
    model = Model(None, stage.encoder)
    found = report_agreement(model, encoder, halves.images[:20], halves)
    expected = (images[:20] @ texts[:20].T).diagonal().mean().item()
    assert found["own_caption"] == pytest.approx(expected, abs=1e-5) == found["real_own_caption"]
    assert found["other_captions"] != pytest.approx(expected, abs=1e-5)
    stage.encoder.pooled = False
    refused("no pooled text", report_agreement, model, encoder, halves.images[:20], halves)
