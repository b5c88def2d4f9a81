"""Accuracies, pictures, the reference and its floors, the autoencoder's figures, and scripts/evaluate.py."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint.file import save_file
from ldm.conditioning.classes import ClassLabels
from ldm.data.captions import Caption
from ldm.data.digits import Digits
from ldm.data.measure import MNIST_THRESHOLDS, classify_styles
from ldm.evaluation import networks, prompt, reference, report, samples, style
from ldm.evaluation.autoencoder import pooled_psnr, psnr, reconstruct
from ldm.evaluation.networks import FEATURES, JUDGE, Measuring, fingerprint, load_network
from ldm.evaluation.reference import Floor, load_reference, measure_reference, save_reference
from ldm.images import to_pil
from ldm.models.classifier import FeatureNetwork, Judge, inner
from scripts import evaluate

SIZES = (50, 100, 200)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Untrained networks in files: a random feature network measures distances, too."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    judge, features = Judge((4, 4, 4)), FeatureNetwork((4, 8), 16)
    params = {"Judge": {"widths": [4, 4, 4]}, "FeatureNetwork": {"widths": [4, 8], "features": 16}}
    for network, name in ((judge, "judge"), (features, "features")):
        kind = type(network).__name__
        config = {"target": f"ldm.models.classifier.{kind}", "params": params[kind]}
        save_file(folder / f"{name}.safetensors", network.state_dict(), config, torch.float16)
    return folder


@pytest.fixture(scope="module")
def measuring(files):
    return Measuring.load(files / "judge.safetensors", files / "features.safetensors")


@pytest.fixture(scope="module")
def real(measuring):
    """The reference of scikit-learn's digits: no download."""
    return measure_reference("digits", Digits("test"), Digits("train"), measuring, SIZES)


# Accuracies


def test_wilson_interval_is_the_published_one():
    # Newcombe 1998, table I, method 3 (score, no continuity correction).
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert prompt.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_holds_the_shares_that_its_test_accepts():
    # Its ends solve |share - p| = z sqrt(p (1 - p) / n).
    for end in prompt.wilson_interval(990, 1000):
        assert abs(0.99 - end) == pytest.approx(prompt.Z_95 * math.sqrt(end * (1 - end) / 1000), rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_share(successes, n):
    with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
        prompt.wilson_interval(successes, n)


def test_accuracy_by_group():
    groups = prompt.accuracy_by([1, 0, 1, 1], [True, False, False, True])
    assert list(groups) == ["0", "1"]
    assert groups["1"]["accuracy"] == pytest.approx(2 / 3) and groups["1"]["n"] == 3
    assert prompt.accuracy([]) == {"accuracy": None, "interval": None, "n": 0}


def test_style_accuracy_counts_only_what_was_stated():
    drawn = inner(Digits("test").images[:3, 0])
    weight, slant = (x.tolist() for x in classify_styles(drawn, MNIST_THRESHOLDS))
    wrong = (slant[1] + 1) % 3
    asked = [Caption("", 1, weight[0], slant[0]), Caption("", 2, weight[1], wrong), Caption("", 3)]
    result = style.style_accuracy(drawn, asked, MNIST_THRESHOLDS)
    assert result["weight"]["accuracy"] == 1 and result["weight"]["n"] == 2
    assert result["slant"]["accuracy"] == 0.5
    assert result["stated"]["accuracy"] == 0.75 and result["stated"]["n"] == 4
    assert result["captions"]["accuracy"] == 0.5 and result["captions"]["n"] == 2


# Pictures


def test_quantised_images_are_those_that_pil_saves():
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2  # beyond [-1, 1]
    quantised = samples.quantise(images)
    assert quantised.shape == (2, 28, 28) and quantised.dtype == torch.uint8
    assert torch.equal(samples.from_pil(to_pil(images)), quantised)
    levels = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].reshape(1, 28, 28)
    assert torch.equal(samples.quantise(samples.to_unit(levels)), levels)  # real pictures pass unchanged


def test_colours_become_grey_as_pil_does_it():
    colour = Image.fromarray(np.full((32, 32, 3), (200, 100, 50), dtype=np.uint8))
    assert samples.from_pil([colour]).unique().tolist() == [124]  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2


def test_sheet_has_a_row_per_class_and_the_blocks_beside_each_other():
    drawn = torch.full((3, 28, 28), 200, dtype=torch.uint8)
    block = samples.by_class(drawn, torch.tensor([0, 9, 9]), columns=2)
    assert block.amax(dim=(2, 3)).tolist()[0] == [200, 0] and block.amax(dim=(2, 3)).tolist()[9] == [200, 200]
    sheet = samples.side_by_side([block, block], gap=2, between=12, magnify=2)
    assert sheet.size == (2 * (2 * 60 + 12 + 2), 2 * (10 * 30 + 2))


# Networks


def test_a_network_in_half_precision_computes_in_single(files):
    network = load_network(files / "judge.safetensors")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters()) and not network.training
    drawn = torch.zeros(7, 28, 28, dtype=torch.uint8)
    assert networks.classify(network, drawn).shape == (7,)


def test_foreign_files_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="'features'"):
        load_network(files / "judge.safetensors", "features")  # a judge has no features
    save_file(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"something": 1})
    with pytest.raises(ValueError, match="no target"):
        load_network(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="statistics"):
        load_reference(files / "judge.safetensors")


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
        with pytest.raises(ValueError, match=f"{n} pictures"):
            real.floor(n)


def test_reference_survives_its_file(real, tmp_path):
    save_reference(real, tmp_path / "s.safetensors", shown=20)
    back = load_reference(tmp_path / "s.safetensors")
    for name in ("indices", "labels", "weight", "slant", "right", "mean", "cov"):
        assert torch.equal(getattr(back, name), getattr(real, name)), name
    assert torch.equal(back.pictures, real.pictures[:20]) and torch.equal(back.image_labels, real.image_labels[:20])
    assert (back.floors, back.nearest, back.thresholds) == (real.floors, pytest.approx(real.nearest), real.thresholds)
    # Eight bits: half a step of the largest value / 127 at most.
    step = real.features.abs().amax(dim=0) / 127
    assert ((back.features - real.features).abs() <= 0.51 * step).all()


def test_real_training_images_score_like_real_ones(real, measuring):
    """The whole report on other real pictures: every ratio close to 1, except accuracies (the judge is untrained)."""
    training = Digits("train")
    order = torch.randperm(1400, generator=torch.Generator().manual_seed(9))
    # One picture of the asked digit for each caption.
    by_digit = {d: [i for i in order.tolist() if training.labels[i] == d] for d in range(10)}
    chosen = [by_digit[d].pop() for d in real.labels[:200].tolist()]
    drawn = inner(training.images[chosen, 0])
    captions = real.captions(200, "train")
    result = report.report_model(drawn, captions, "train", real, measuring, inner(training.images[:, 0]))
    assert 0.4 < result["frechet"]["ratio"] < 2.5  # 200 pictures; the same digits as the reference's, which floors lack
    assert result["precision_recall"]["precision"] == pytest.approx(
        result["precision_recall"]["real_precision"], abs=0.15
    )
    assert result["precision_recall"]["recall"] == pytest.approx(result["precision_recall"]["real_recall"], abs=0.15)
    assert result["diversity"]["ratio"] == pytest.approx(1, abs=0.1)
    assert (
        result["memorisation"]["ratio"] == 0 and result["memorisation"]["share_below_first_percentile"] == 1
    )  # copies
    assert sum(group["n"] for group in result["prompt_accuracy"]["per_wording"].values()) == 200
    assert sum(group["n"] for group in result["prompt_accuracy"]["per_digit"].values()) == 200
    collapsed = report.report_distribution(networks.features_of(measuring.features, drawn[:10].repeat(20, 1, 1)), real)
    assert collapsed["precision_recall"]["recall"] < 0.3
    assert collapsed["frechet"]["ratio"] > result["frechet"]["ratio"]


def test_too_few_images_give_none_not_nan():
    assert report.without_nan({"a": [float("nan"), 1.0], "b": {"c": math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}
    assert reference.Floor(1.0, 0.5, 0.5) == Floor(1.0, 0.5, 0.5)


# The autoencoder's figures


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 1, 4, 4)
    made = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    # 10 log10(4 / 0.04) = 20 dB and 40 dB; of the mean error 10 log10(4 / 0.0202).
    torch.testing.assert_close(psnr(made, images), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert pooled_psnr(made, images) == pytest.approx(10 * math.log10(4 / 0.0202), rel=1e-6)
    assert pooled_psnr(images, images) == math.inf


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
    originals, labels = real.pictures[:200], real.image_labels[:200]
    result = reconstruct(Doubling(), originals, batch_size=64, scale_factor=0.5)
    assert torch.equal(result.pictures, originals)
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


# The script


class Copier:
    """Draws test pictures of scikit-learn's digits, whatever the prompt; keeps what it was asked."""

    defaults = {"steps": 20, "scale": 1.5, "sampler": "ddim", "spacing": None}

    def __init__(self, cond_stage_model="of texts"):
        self.calls, self.prompts, self.cond_stage_model = [], [], cond_stage_model

    def generate(self, prompts, seed, batch_size, **settings):
        self.calls.append((len(prompts), seed, settings))
        self.prompts += prompts
        return to_pil(Digits("test", first=len(prompts)).images.float() / 127.5 - 1)


def options(files, tmp_path, *more):
    (tmp_path / "model.safetensors").write_bytes(b"model")
    chosen = [
        "--ckpt",
        tmp_path / "model.safetensors",
        "--dataset",
        "digits",
        "--out",
        tmp_path / "new" / "report.json",
    ]
    chosen += ["--judge", files / "judge.safetensors", "--features", files / "features.safetensors", *more]
    return [str(value) for value in chosen]


def test_script_measures_a_model(files, tmp_path, monkeypatch):
    model = Copier()
    monkeypatch.setattr(evaluate, "load_model", lambda args: model)
    more = ("--n", 50, "--batch-size", 20, "--seed", 7, "--steps", 5, "--scale", "2", "--wording", "unseen")
    evaluate.main(["model", *options(files, tmp_path, *more)])
    result = json.loads((tmp_path / "new" / "report.json").read_text())
    assert model.calls == [
        (20, 7, {"steps": 5, "scale": 2.0}),
        (20, 27, {"steps": 5, "scale": 2.0}),
        (10, 47, {"steps": 5, "scale": 2.0}),
    ]
    assert result["n"] == 50 and result["settings"]["scale"] == 2.0 and result["settings"]["sampler"] == "ddim"
    assert result["networks"]["judge"] == fingerprint(files / "judge.safetensors")
    assert result["frechet"]["floor"] > 0 and result["memorisation"]["ratio"] > 0
    assert Image.open(tmp_path / "new" / "report.png").size[1] == 2 * (10 * 30 + 2)


def test_a_model_of_classes_is_asked_for_classes(files, tmp_path, monkeypatch, real):
    model = Copier(ClassLabels(11))
    monkeypatch.setattr(evaluate, "load_model", lambda args: model)
    evaluate.main(["model", *options(files, tmp_path, "--n", 30)])
    result = json.loads((tmp_path / "new" / "report.json").read_text())
    assert model.prompts == real.labels[:30].tolist()
    asked = {digit: group["n"] for digit, group in result["prompt_accuracy"]["per_digit"].items()}
    assert asked == {str(digit): model.prompts.count(digit) for digit in sorted(set(model.prompts))}
    assert result["prompt_accuracy"]["per_wording"] == {} and result["style_accuracy"]["stated"]["n"] == 0


def test_a_model_that_is_told_nothing_has_no_accuracy(files, tmp_path, monkeypatch, measuring):
    model = Copier(None)
    monkeypatch.setattr(evaluate, "load_model", lambda args: model)
    evaluate.main(["model", *options(files, tmp_path, "--n", 30)])
    result = json.loads((tmp_path / "new" / "report.json").read_text())
    assert model.prompts == [""] * 30 and result["prompt_accuracy"] is None
    read = networks.classify(measuring.judge, inner(Digits("test", first=30).images[:, 0])).tolist()
    assert result["classes"] == {str(digit): read.count(digit) / 30 for digit in range(10)}
    assert result["frechet"]["ratio"] > 0


def test_script_measures_an_autoencoder(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm.evaluation.autoencoder.load_autoencoder", lambda path, device: (Doubling(), 1.0))
    evaluate.main(["autoencoder", *options(files, tmp_path, "--split", "heldout", "--n", 60)])
    result = json.loads((tmp_path / "new" / "report.json").read_text())
    assert result["reference"] == "digits heldout" and result["n"] == 60
    assert result["style_kept"]["weight"] == 1.0


def test_the_image_goes_to_outputs_where_no_place_is_named(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ldm.evaluation.autoencoder.load_autoencoder", lambda path, device: (Doubling(), 1.0))
    monkeypatch.chdir(tmp_path)
    networks = [f"--judge={files / 'judge.safetensors'}", f"--features={files / 'features.safetensors'}"]
    command = ["autoencoder", "--dataset=digits", "--n=60", *networks]
    for more, place in (([], "outputs/evaluate.png"), (["--picture=mine/a.png"], "mine/a.png")):
        evaluate.main([*command, *more])
        told = capsys.readouterr()
        assert json.loads(told.out)["n"] == 60 and f"picture: {place}\n" in told.err
        assert Image.open(tmp_path / place).size[1] == 2 * (10 * 30 + 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "outputs"]


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--n", 500), "500 pictures are more"), (("--split", "heldout", "--n", 300), "300 pictures are more")],
)
def test_script_refuses_more_images_than_there_are(files, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(evaluate, "load_model", lambda args: Copier())
    with pytest.raises(ValueError, match=words):
        evaluate.main(["model", *options(files, tmp_path, *more)])


def test_script_says_when_mnist_is_missing(files, tmp_path, monkeypatch):
    """Another feature network than that of the shipped statistics needs the real pictures."""
    monkeypatch.setattr(evaluate, "load_model", lambda args: Copier())
    for data in (["--data", str(tmp_path)], []):
        monkeypatch.setenv("LDM_DATA", str(tmp_path))
        arguments = [value if value != "digits" else "mnist" for value in options(files, tmp_path)]
        with pytest.raises(FileNotFoundError, match="LDM_DATA"):
            evaluate.main(["model", *arguments, *data])


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
    shipped = load_reference()
    assert shipped.networks == {"judge": fingerprint(JUDGE), "features": fingerprint(FEATURES)}
    assert shipped.right.double().mean() >= 0.995  # the judge's own ceiling
    assert shipped.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # MNIST's
    shown, labels = shipped.pictures, shipped.image_labels
    assert len(shown) == 1000
    judge, network = load_network(JUDGE), load_network(FEATURES, "features")
    assert (networks.classify(judge, shown) == labels).double().mean() >= 0.99
    # The features in the file are those of the pictures in it, to its eight bits: steps of about 0.03 on unit variance.
    of_shown = shipped.features[torch.argsort(shipped.indices)[:1000]]
    assert (networks.features_of(network, shown) - of_shown).abs().max() < 0.05
    assert (
        classify_styles(shown, shipped.thresholds).weight.tolist()
        == shipped.weight[torch.argsort(shipped.indices)[:1000]].tolist()
    )


def test_script_runs_on_a_machine_without_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda args: Copier())
    monkeypatch.setattr("ldm.evaluation.autoencoder.load_autoencoder", lambda path, device: (Doubling(), 1.0))
    monkeypatch.setenv("LDM_DATA", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"model")
    files = ["--ckpt", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "report.json")]
    evaluate.main(["model", "--n", "100", *files])
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["memorisation"] is None and result["frechet"]["ratio"] > 0
    assert result["prompt_accuracy"]["ceiling"]["n"] == 10_000
    evaluate.main(["autoencoder", *files])
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["n"] == 1000 and result["judge_accuracy"]["accuracy"] >= 0.99
    with pytest.raises(ValueError, match="only 1000 of MNIST's test pictures ship"):
        evaluate.main(["autoencoder", "--n", "2000", *files])


def test_the_report_and_its_image_are_two_files(tmp_path):
    with pytest.raises(ValueError, match=r"both\.png is where the picture would go: name the JSON's file"):
        evaluate.main(["model", f"--out={tmp_path / 'both.png'}"])
    assert not any(tmp_path.iterdir())
