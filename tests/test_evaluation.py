"""Accuracies, images, the reference and its floors, the autoencoder's figures, and scripts/evaluate.py."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.checkpoint.writing import save_file
from ldm.commands import evaluate
from ldm.conditioning.classes import ClassLabels
from ldm.data.captions import Caption
from ldm.data.digits import Digits
from ldm.data.measure import MNIST_THRESHOLDS, classify_styles
from ldm.evaluation import commands, networks, prompt, reference, report, samples
from ldm.evaluation.autoencoder import reconstruct
from ldm.evaluation.networks import FEATURES, JUDGE, Measuring, fingerprint, load_image_network
from ldm.evaluation.reference import load_reference, measure_reference, save_reference
from ldm.images import to_pil
from ldm.models.classifier import FeatureNetwork, Judge, inner
from ldm.models.perceptual import psnr

SIZES = (50, 100, 200)
SHEET_HEIGHT = 2 * (10 * 30 - 2)


def small_networks(folder, size=28):
    """Write an untrained judge and feature network (which measures distances, too); return their options."""
    torch.manual_seed(size)
    options = {}
    for kind, params in ((Judge, {"widths": [4, 4, 4]}), (FeatureNetwork, {"widths": [4, 8], "features": 16})):
        params |= {"size": size}
        path = options["judge" if kind is Judge else "features"] = folder / f"{kind.__name__}{size}.safetensors"
        config = {"target": f"ldm.models.classifier.{kind.__name__}", "params": params}
        save_file(path, kind(**params).state_dict(), config, torch.float16)
    return options


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def measuring(files):
    return Measuring.load(**files)


@pytest.fixture(scope="module")
def real(measuring):
    """The reference of scikit-learn's digits: no download."""
    return measure_reference("digits", Digits("test"), Digits("train"), measuring, SIZES)


# Accuracies


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_accuracy_has_the_published_interval(successes, n, interval):
    """Newcombe 1998, table I, method 3 (score, no continuity correction)."""
    found = prompt.accuracy([i < successes for i in range(n)])
    assert found == {"accuracy": successes / n, "interval": pytest.approx(interval, abs=5e-5), "n": n}


def test_accuracy_by_group():
    groups = prompt.accuracy_by([1, 0, 1, 1], [True, False, False, True])
    assert list(groups) == ["0", "1"]
    assert groups["1"]["accuracy"] == pytest.approx(2 / 3) and groups["1"]["n"] == 3
    assert prompt.accuracy([]) == {"accuracy": None, "interval": None, "n": 0}


def test_style_accuracy_counts_only_what_was_stated():
    images = inner(Digits("test").images[:3, 0])
    weight, slant = (x.tolist() for x in classify_styles(images, MNIST_THRESHOLDS))
    wrong = (slant[1] + 1) % 3
    captions = [Caption("", 1, weight[0], slant[0]), Caption("", 2, weight[1], wrong), Caption("", 3)]
    result = prompt.style_accuracy(images, captions, MNIST_THRESHOLDS)
    for kind, share, n in (("weight", 1, 2), ("slant", 0.5, 2), ("stated", 0.75, 4), ("captions", 0.5, 2)):
        assert (result[kind]["accuracy"], result[kind]["n"]) == (share, n)


# Images


def test_quantised_images_are_those_that_pil_saves():
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2  # beyond [-1, 1]
    quantised = samples.quantise(images)
    assert quantised.shape == (2, 28, 28) and quantised.dtype == torch.uint8
    assert torch.equal(samples.from_pil(to_pil(images)), quantised)
    levels = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].reshape(1, 28, 28)
    assert torch.equal(samples.quantise(samples.to_unit(levels)), levels)  # real images pass unchanged


def test_colours_become_grey_as_pil_does_it():
    colour = Image.fromarray(np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8))
    assert samples.from_pil([colour]).unique().tolist() == [124]  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2


def test_sheet_has_a_row_per_class_and_the_blocks_beside_each_other():
    images = torch.full((3, 28, 28), 200, dtype=torch.uint8)
    block = samples.images_by_class(images, torch.tensor([0, 9, 9]), columns=2)
    assert block.amax(dim=(2, 3))[[0, 9]].tolist() == [[200, 0], [200, 200]]
    sheet = samples.image_sheet([block, block], between=12, magnify=2)
    assert sheet.size == (2 * (2 * 58 + 12), SHEET_HEIGHT)
    assert sheet.getpixel((0, 0)) == 200 and sheet.getpixel((2 * 58 + 1, 0)) not in (0, 200)


def test_an_image_that_is_not_finite_names_the_module(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.model.diffusion_model.time_embed[0].weight.data[0, 0] = math.nan
    match = r"began in model\.diffusion_model\.time_embed\.0; its weights are not finite"
    refused(match, samples.sample_images, model, ["a five"], seed=0, batch_size=1)


# Networks


def test_a_network_in_half_precision_computes_in_single(files):
    network = load_image_network(files["judge"])
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters()) and not network.training
    assert networks.classify(network, torch.zeros(7, 28, 28, dtype=torch.uint8)).shape == (7,)


def test_foreign_files_are_refused(files, tmp_path):
    refused("'features'", load_image_network, files["judge"], "features")  # a judge has no features
    save_file(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"something": 1})
    refused("no target", load_image_network, tmp_path / "x.safetensors")
    refused("statistics", load_reference, files["judge"])


# The reference and its floors


def test_reference_asks_for_every_real_image_once(real):
    digits = Digits("test")
    assert sorted(real.indices.tolist()) == list(range(397))
    assert torch.equal(real.image_labels, digits.labels)
    assert torch.equal(real.weight, digits.styles.weight[real.indices])
    captions = real.captions(397, "unseen")
    assert [caption.digit for caption in captions] == real.labels.tolist()
    stated = [caption.weight for caption in captions if caption.weight is not None]
    assert 0.2 < len(stated) / 397 < 0.45  # a third, of half of them one and of all that state both
    for i, caption in enumerate(captions):
        assert caption.weight in (None, real.weight[i].item())
    assert real.captions(5, "train") == real.captions(10, "train")[:5]


def test_floor_falls_with_the_number_and_is_interpolated_in_its_inverse(real):
    small, middle, large = (real.floor(n).frechet for n in SIZES)
    assert small > middle > large > 0
    # Linear in 1 / n: 1 / 80 lies 3 / 4 of the way from 1 / 50 to 1 / 100.
    assert real.floor(80).frechet == pytest.approx(0.25 * small + 0.75 * middle)
    for n in (49, 201):
        refused(f"{n} images", real.floor, n)


def test_reference_survives_its_file(real, tmp_path):
    save_reference(real, tmp_path / "s.safetensors", shown=20)
    back = load_reference(tmp_path / "s.safetensors")
    for name in ("indices", "labels", "weight", "slant", "right", "mean", "cov"):
        assert torch.equal(getattr(back, name), getattr(real, name)), name
    assert torch.equal(back.images, real.images[:20]) and torch.equal(back.image_labels, real.image_labels[:20])
    assert (back.floors, back.nearest, back.thresholds) == (real.floors, pytest.approx(real.nearest), real.thresholds)
    # Eight bits: half a step of the largest value / 127 at most.
    step = real.features.abs().amax(dim=0) / 127
    assert ((back.features - real.features).abs() <= 0.51 * step).all()


def test_real_training_images_score_like_real_ones(real, measuring):
    """The complete report on other real images: every ratio close to 1, except accuracies (the judge is untrained)."""
    training = Digits("train")
    order = torch.randperm(1400, generator=torch.Generator().manual_seed(9))
    # One image of the digit for each caption.
    by_digit = {d: [i for i in order.tolist() if training.labels[i] == d] for d in range(10)}
    chosen = [by_digit[d].pop() for d in real.labels[:200].tolist()]
    images = inner(training.images[chosen, 0])
    captions = real.captions(200, "train")
    result = report.report_model(images, captions, "train", real, measuring, inner(training.images[:, 0]))
    assert 0.4 < result["frechet"]["ratio"] < 2.5  # 200 images; the same digits as the reference's, which floors lack
    for kind in ("precision", "recall"):
        figures = result["precision_recall"]
        assert figures[kind] == pytest.approx(figures[f"real_{kind}"], abs=0.15)
    assert result["diversity"]["ratio"] == pytest.approx(1, abs=0.1)
    copies = result["memorisation"]
    assert (copies["ratio"], copies["share_below_first_percentile"]) == (0, 1)
    for kind in ("per_wording", "per_digit"):
        assert sum(group["n"] for group in result["prompt_accuracy"][kind].values()) == 200
    collapsed = report.report_distribution(networks.features_of(measuring.features, images[:10].repeat(20, 1, 1)), real)
    assert collapsed["precision_recall"]["recall"] < 0.3
    assert collapsed["frechet"]["ratio"] > result["frechet"]["ratio"]


def test_too_few_images_give_none_not_nan():
    assert report.without_nan({"a": [float("nan"), 1.0], "b": {"c": math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}


# The autoencoder's figures


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 1, 4, 4)
    made = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    # 10 log10(4 / 0.04) = 20 dB and 40 dB; of the mean error 10 log10(4 / 0.0202).
    torch.testing.assert_close(psnr(made, images), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert psnr(made[None], images[None]).item() == pytest.approx(10 * math.log10(4 / 0.0202), rel=1e-6)
    assert psnr(images, images).isinf().all()


class Doubling(torch.nn.Module):
    """An exact autoencoder: latents of mean 2 x and deviation 0.5."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def encode(self, x):
        from ldm.models.distributions import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(torch.cat([self.weight * x, torch.full_like(x, 2 * math.log(0.5))], dim=1))

    def decode(self, z):
        return z / self.weight


def test_reconstruction_by_an_exact_autoencoder(real, measuring):
    originals, labels = real.images[:200], real.image_labels[:200]
    result = reconstruct(Doubling(), originals, batch_size=64, scale_factor=0.5)
    assert torch.equal(result.images, originals)
    padded = samples.to_unit(samples.pad(originals)).double()
    expected = 0.5 * (4 * padded.square() + 0.25 - 1 - math.log(0.25)).mean()
    assert result.kl_per_dimension == pytest.approx(expected.item(), rel=1e-5)
    # Population variance of 2 x, plus 0.25, scaled by 0.5.
    deviation = 0.5 * math.sqrt(4 * padded.var(unbiased=False).item() + 0.25)
    assert result.latent_std == [pytest.approx(deviation, rel=1e-6)]
    figures = report.report_autoencoder(result, originals, labels, real, measuring)
    assert figures["psnr"]["of_mean_error"] is None  # infinite
    assert figures["frechet"]["distance"] == pytest.approx(0, abs=1e-6)
    assert figures["style_kept"] == {"weight": 1.0, "slant": 1.0}
    assert figures["judge_accuracy"]["accuracy"] == figures["judge_accuracy"]["ceiling"]["accuracy"]


def test_a_vq_autoencoder_is_reconstructed_without_a_kl():
    class Codes(Doubling):
        def encode(self, x):
            return super().encode(x).mean

    originals = torch.randint(0, 256, (10, 28, 28), dtype=torch.uint8)
    result, wanted = (reconstruct(kind(), originals, batch_size=4) for kind in (Codes, Doubling))
    assert result.kl_per_dimension is None and torch.equal(result.images, wanted.images)


# The script


class Copier:
    """Generates test images of scikit-learn's digits, whatever the prompt; keeps its prompts and settings."""

    defaults = {"steps": 20, "scale": 1.5, "sampler": "ddim", "spacing": None}
    first_stage_model = SimpleNamespace(decoder=torch.nn.Identity())

    def __init__(self, cond_stage_model="of texts"):
        self.calls, self.prompts, self.cond_stage_model = [], [], cond_stage_model

    def generate(self, prompts, seed, batch_size, **settings):
        self.calls.append((len(prompts), seed, settings))
        self.prompts += prompts
        return to_pil(Digits("test", first=len(prompts)).images.float() / 127.5 - 1)


@pytest.fixture
def measure(files, tmp_path, monkeypatch):
    """`measure("model", Copier(), "--n", 50)` runs the command on a model and returns its report."""
    (tmp_path / "model.safetensors").write_bytes(b"model")
    fixed = ["--ckpt", tmp_path / "model.safetensors", "--out", tmp_path / "new" / "report.json"]
    fixed += ["--dataset", "digits", "--judge", files["judge"], "--features", files["features"]]

    def run(command, model, *more, fixed=fixed):
        monkeypatch.setattr(commands, "load_model", lambda args: model)
        monkeypatch.setattr(commands, "load_autoencoder", lambda path, device: (model, 1.0))
        evaluate.main([command, *map(str, (*fixed, *more))])
        return json.loads((tmp_path / "new" / "report.json").read_text())

    return run


def test_script_measures_a_model(measure, files, tmp_path):
    model, given = Copier(), {"steps": 5, "scale": 2.0}
    more = ("--n", 50, "--batch-size", 20, "--seed", 7, "--steps", 5, "--scale", "2", "--wording", "unseen")
    result = measure("model", model, *more)
    assert model.calls == [(20, 7, given), (20, 27, given), (10, 47, given)]
    assert result["n"] == 50 and result["settings"]["scale"] == 2.0 and result["settings"]["sampler"] == "ddim"
    assert result["networks"]["judge"] == fingerprint(files["judge"])
    assert result["frechet"]["floor"] > 0 and result["memorisation"]["ratio"] > 0
    assert Image.open(tmp_path / "new" / "report.png").size[1] == SHEET_HEIGHT


def test_a_class_conditional_model_gets_classes(measure, real):
    model = Copier(ClassLabels(11))
    result = measure("model", model, "--n", 30)
    accuracy = result["prompt_accuracy"]
    assert result["style_accuracy"]["stated"]["n"] == 0
    assert model.prompts == real.labels[:30].tolist() and accuracy["per_wording"] == {}
    counts = {digit: group["n"] for digit, group in accuracy["per_digit"].items()}
    assert counts == {str(digit): model.prompts.count(digit) for digit in sorted(set(model.prompts))}


def test_an_unconditional_model_has_no_accuracy(measure, measuring):
    model = Copier(None)
    result = measure("model", model, "--n", 30)
    assert model.prompts == [""] * 30 and result["prompt_accuracy"] is None
    read = networks.classify(measuring.judge, inner(Digits("test", first=30).images[:, 0])).tolist()
    assert result["classes"] == {str(digit): read.count(digit) / 30 for digit in range(10)}
    assert result["frechet"]["ratio"] > 0


def test_a_classifier_guides_to_the_digits(measure, real, files, monkeypatch):
    given = []
    monkeypatch.setattr(commands, "make_guide", lambda model, **settings: given.append(settings) or "guide")
    for conditioner, kind in ((None, int), ("of texts", str)):
        model = Copier(conditioner)
        result = measure("model", model, "--n", 30, "--classifier", files["judge"], "--classifier-scale", 2)
        assert model.prompts == [kind(label) for label in real.labels[:30].tolist()]
        assert model.calls[0][2] == {"guide": "guide"} and result["prompt_accuracy"]["n"] == 30
        assert result["settings"]["classifier_scale"] == 2 and result["settings"]["classifier"] == fingerprint(
            files["judge"]
        )
    assert given == [{"classifier": files["judge"], "classifier_scale": 2.0}] * 2
    refused("classifier-scale 2 would have no effect", measure, "model", Copier(), "--classifier-scale", 2)


def test_script_measures_an_autoencoder(measure):
    result = measure("autoencoder", Doubling(), "--split", "heldout", "--n", 60)
    assert result["reference"] == "digits heldout" and result["n"] == 60
    assert result["style_kept"]["weight"] == 1.0


@pytest.mark.parametrize(
    ("more", "place"),
    [([], "outputs/evaluate.png"), (["--image=mine/a.png"], "mine/a.png"), (["--picture=mine/b.png"], "mine/b.png")],
)
def test_where_the_sheet_of_images_goes(files, tmp_path, monkeypatch, capsys, more, place):
    """--picture is the old name of --image."""
    monkeypatch.setattr(commands, "load_autoencoder", lambda path, device: (Doubling(), 1.0))
    monkeypatch.chdir(tmp_path)
    networks = [f"--judge={files['judge']}", f"--features={files['features']}"]
    evaluate.main(["autoencoder", "--dataset=digits", "--n=60", *networks, *more])
    output = capsys.readouterr()
    assert json.loads(output.out)["n"] == 60 and f"image: {place}\n" in output.err
    assert Image.open(tmp_path / place).size[1] == SHEET_HEIGHT and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SystemExit):
        evaluate.main(["autoencoder", "--help"])
    assert "--image" in (text := capsys.readouterr().out) and "--picture" not in text


@pytest.mark.parametrize("more", [("--n", 500), ("--split", "heldout", "--n", 300)])
def test_script_refuses_more_images_than_there_are(measure, more):
    refused(f"{more[-1]} images are more than the", measure, "model", Copier(), *more)


@pytest.mark.parametrize("named", [True, False])
def test_script_says_when_mnist_is_missing(measure, tmp_path, monkeypatch, named):
    """Another feature network than that of the shipped statistics needs the real images."""
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    data = ["--data", tmp_path] if named else []
    refused("LDM_DATA", measure, "model", Copier(), "--dataset", "mnist", *data, error=FileNotFoundError)


@pytest.mark.parametrize(
    "arguments", [["model", "--n", "5"], ["model", "--wording", "odd"], ["autoencoder", "--scale", "2"], []]
)
def test_script_refuses_bad_options(arguments):
    with pytest.raises(SystemExit) as ended:
        evaluate.parse(arguments)
    assert ended.value.code == 2


# What ships


@pytest.mark.parametrize("path", [JUDGE, FEATURES, reference.STATISTICS], ids=lambda path: path.stem)
def test_shipped_files_are_under_a_megabyte(path):
    assert path.stat().st_size < 1_000_000


def test_shipped_statistics_are_of_the_shipped_networks():
    shipped, order = load_reference(), torch.argsort(load_reference().indices)[:1000]
    assert shipped.networks == {"judge": fingerprint(JUDGE), "features": fingerprint(FEATURES)}
    assert shipped.right.double().mean() >= 0.995  # the judge's own ceiling
    assert shipped.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # MNIST's
    assert len(shipped.images) == 1000
    judge, network = load_image_network(JUDGE), load_image_network(FEATURES, "features")
    assert (networks.classify(judge, shipped.images) == shipped.image_labels).double().mean() >= 0.99
    # The features in the file are those of the images in it, to its eight bits: steps of about 0.03 on unit variance.
    assert (networks.features_of(network, shipped.images) - shipped.features[order]).abs().max() < 0.05
    assert torch.equal(classify_styles(shipped.images, shipped.thresholds).weight, shipped.weight[order])


def test_script_runs_on_a_machine_without_mnist(measure, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    files = ["--ckpt", tmp_path / "model.safetensors", "--out", tmp_path / "new" / "report.json"]
    result = measure("model", Copier(), "--n", 100, fixed=files)
    assert result["memorisation"] is None and result["frechet"]["ratio"] > 0
    assert result["prompt_accuracy"]["ceiling"]["n"] == 10_000
    result = measure("autoencoder", Doubling(), fixed=files)
    assert result["n"] == 1000 and result["judge_accuracy"]["accuracy"] >= 0.99
    refused("only 1000 of MNIST's test images", measure, "autoencoder", Doubling(), "--n", 2000, fixed=files)


def test_the_report_and_its_sheet_are_two_files(tmp_path):
    argv = ["model", f"--out={tmp_path / 'both.png'}"]
    refused(r"both\.png is where the sheet of images would go: name a .json, or another --image", evaluate.main, argv)
    assert not any(tmp_path.iterdir())
