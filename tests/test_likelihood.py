"""Bits per dimension: an exact model by its closed form, the terms of a network, and the script."""

import json
import math

import pytest
import torch
from conftest import refused
from PIL import Image
from test_pixel_diffusion import PIXEL, build, widened

from ldm.commands import evaluate
from ldm.data.digits import Digits
from ldm.diffusion.bound import prior_bits, step_bits
from ldm.diffusion.schedule import q_sample
from ldm.evaluation.likelihood import bits_per_dimension, check_variance, measure_bits
from ldm.saving import save

SHORT = {"name": "linear", "T": 20, "start": 0.01, "end": 0.4}
SHORTER = SHORT | {"T": 5}


class Exact(torch.nn.Module):
    """The denoiser of images from N(0, 1): E[x0 | x_t] = sqrt(ab) x_t, whatever its condition."""

    def __init__(self, schedule):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # a model's device and dtype are its parameters'
        self.schedule, self.calls = schedule, []

    def forward(self, x, t, y=None):
        self.calls.append(x)
        return self.schedule.alphas_cumprod[t.long()].sqrt().view(-1, 1, 1, 1).to(x) * x[:, :1]


def test_the_exact_model_of_a_gaussian():
    """Its large variance is right; the steps cost what noise loses, log2(1 + SNR_1) / 2 - log2(1 + SNR_T) / 2."""
    model = build(schedule=SHORT, prediction="x0", clip=False)
    model.model.diffusion_model = Exact(model.schedule)
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    bits = bits_per_dimension(model, images, [0] * 4, variance="large")
    information = [-math.log2(1 - ab) / 2 for ab in model.schedule.alphas_cumprod.tolist()]
    assert float(bits.terms[1:].sum(0).mean()) == pytest.approx(information[0] - information[-1], rel=0.02)
    torch.testing.assert_close(bits.prior, prior_bits(images, model.schedule))
    assert bits.terms.shape == (20, 4)
    torch.testing.assert_close(bits.total, bits.terms.sum(0) + bits.prior)
    small = bits_per_dimension(model, images, [0] * 4)
    assert (small.terms[1:].sum(0) > bits.terms[1:].sum(0)).all()  # which fits certain images, not these


def test_the_terms_are_those_of_the_networks_own_guesses():
    """Clipped, with the learned variance, each at its level."""
    model = build(**widened("learned_variance"), schedule=SHORTER)
    images = Digits("test", first=3).images / 127.5 - 1
    bits = bits_per_dimension(model, images, [1, 2, 3], seed=9)
    generator, schedule = torch.Generator().manual_seed(9), model.schedule
    for level in range(4, -1, -1):
        t, noise = torch.full((3,), level), torch.randn(3, 1, 32, 32, generator=generator)
        x = q_sample(images, t, noise, schedule)
        eps, v = model.model.diffusion_model(x, t, y=torch.tensor([1, 2, 3])).chunk(2, dim=1)
        ab = float(schedule.alphas_cumprod[level])
        x0 = ((x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)).clamp(-1, 1)
        expected = step_bits(images, x, t, x0, (v + 1) / 2, schedule)
        torch.testing.assert_close(bits.terms[level], expected, rtol=1e-3, atol=1e-5)


def test_a_self_conditioned_model_sees_only_x_t():
    """Of the same x_t, twice: a guess from another noise level would be information that sampling lacks."""
    model = build(**widened("self_condition"), schedule=SHORT, prediction="x0")
    model.model.diffusion_model = Exact(model.schedule)
    bits_per_dimension(model, torch.zeros(2, 1, 32, 32), [0, 1])
    calls = model.model.diffusion_model.calls
    assert len(calls) == 40
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(first[:, :1], second[:, :1]) and not first[:, 1:].any() and second[:, 1:].any()


def test_script(tmp_path, capsys):
    model = build(**widened("learned_variance"), schedule=SHORTER)
    path = tmp_path / "pixel.safetensors"
    save(model, path)
    given = ["bits", "--ckpt", str(path), "--dataset", "digits", "--n", "5", "--batch-size", "3", "--device", "cpu"]
    evaluate.main(given)
    report = json.loads(capsys.readouterr().out)
    assert (report["n"], report["variance"], report["levels"]) == (5, "learned", 5)
    parts = report["prior"] + report["steps"] + report["decoder"]
    assert report["bits_per_dimension"] == pytest.approx(parts, rel=1e-6) and report["standard_error"] > 0
    evaluate.main([*given, "--variance", "large", "--out", str(tmp_path / "bits.json")])
    large = json.loads((tmp_path / "bits.json").read_text())
    assert large["variance"] == "large" and large["steps"] != report["steps"]


@pytest.mark.parametrize("classes", [11, None])
def test_script_on_a_folder(tmp_path, capsys, classes):
    """The same figure as of the same images and classes by the function; classes are sub-folders."""
    more = {} if classes else {"cond_stage_config": None}
    if not classes:
        unet = PIXEL["unet_config"]
        more["unet_config"] = unet | {"params": {**unet["params"], "num_classes": None}}
    model = build(**more, schedule=SHORTER)
    save(model, tmp_path / "pixel.safetensors")
    images = torch.randint(0, 256, (4, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(images.numpy()):
        (tmp_path / "own" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "own" / "ab"[i % 2] / f"{i}.png")
    given = ["bits", "--ckpt", str(tmp_path / "pixel.safetensors"), "--dataset", str(tmp_path / "own"), "--n", "4"]
    evaluate.main([*given, "--device", "cpu"])
    report, order = json.loads(capsys.readouterr().out), [0, 2, 1, 3]  # sorted by path
    prompts = [0, 0, 1, 1] if classes else [""] * 4
    expected = bits_per_dimension(model, images[order][:, None].float() / 127.5 - 1, prompts).total.mean().item()
    assert report["bits_per_dimension"] == pytest.approx(expected, rel=1e-5) and report["dataset"].endswith("own")
    refused("neither mnist, digits nor a folder", evaluate.main, [*given, "--dataset", "none"])
    refused("--data is for digits and would have no effect", evaluate.main, [*given, "--data", "x"])
    refused("--data x is for MNIST", evaluate.main, [*given, "--dataset", "digits", "--data", "x"])
    refused("5 images .* are asked for, and there are 4", evaluate.main, [*given, "--n", "5"])
    for name in "cdefghijkl" if classes else ():
        (tmp_path / "own" / name).mkdir()
        Image.new("L", (32, 32)).save(tmp_path / "own" / name / "a.png")
    if classes:
        refused("own has 12 classes, its sub-folders, and the model 10", evaluate.main, given)


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
def test_a_size_that_no_images_have(tmp_path, dataset):
    save(build(defaults={"height": 8, "width": 8}, schedule=SHORTER), tmp_path / "pixel.safetensors")
    given = ["bits", "--ckpt", str(tmp_path / "pixel.safetensors"), "--dataset", dataset, "--device", "cpu"]
    refused("^(?!.*network)(?=.*28 x 28).*there (is no MNIST|are none) of 8 x 8", evaluate.main, given)


def test_what_cannot_be_measured(tiny_model):
    refused("variance 'learned' is not one of this model's: use small, large", check_variance, build(), "learned")
    match = "bits per dimension are of a PixelDiffusion: this is a LatentDiffusion"
    refused(match, bits_per_dimension, tiny_model, torch.zeros(1, 4, 8, 8), [""])
    match = r"398 images \(1, 32, 32\) are asked for, and there are 397"
    refused(match, measure_bits, build(), Digits("test"), 398, 10)
