"""Validation: its losses by hand, on any batches and processes, and training that it leaves as it is to the bit."""

import json

import pytest
import torch
from conftest import refused
from test_loop import assert_same
from tiny_stages import DIGITS, config_of, write_inputs

from ldm.data.digits import Digits
from ldm.data.part import part
from ldm.training import loop
from ldm.training.config import read_configs
from ldm.training.datasets import build_datasets
from ldm.training.loop import Interrupted, train
from ldm.training.order import mix_seed
from ldm.training.rehearsal import rehearse
from ldm.training.validation import Validation, hold_out
from ldm.util import instantiate_from_config

VALIDATED = ("autoencoder", "clip", "diffusion", "folder", "pixel", "classifier", "noisy_classifier")
TEST = {"split": "test", "first": 12}  # other images than those that are trained on


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def there(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


def prepared(name, validation=0.25):
    """Return a stage, as it is when training begins, and its data set for validation."""
    torch.manual_seed(0)
    config = config_of(name)
    stage = instantiate_from_config(config["stage"]).train(False)
    dataset, held_out = build_datasets(stage, config["data"] | {"validation": validation})
    stage.prepare(dataset)
    return stage.train(False), held_out


@pytest.mark.parametrize("name", ["diffusion", "pixel"])
@torch.no_grad()
def test_the_loss_of_the_triples_by_hand(name):
    """Each of 260 triples: image i mod n, noise from its own seed, timesteps stratified over all of them."""
    stage, images = prepared(name, TEST)
    found = Validation(stage, images, 50).measure()
    model, count = stage.latent_diffusion, 260
    T = model.schedule.T
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(1))).tolist()
    encoded, inputs, losses = [], [], {}
    for sample in (images[i] for i in range(12)):
        x, label = sample["image"][None], torch.tensor([sample["label"]])
        z = x if name == "pixel" else model.first_stage_model.encode(x).mean * model.scale_factor
        cond = model.condition(label) if name == "pixel" else model.cond_stage_model([sample["caption"]])
        encoded.append((z, cond))
    for i in range(count):
        (z, cond), t = encoded[i % 12], int((order[i] + 0.5) / count * T)
        noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(mix_seed(3, i)))
        ab = model.schedule.alphas_cumprod[t]
        x_t = (ab.sqrt() * z + (1 - ab).sqrt() * noise).float()
        wanted = {"eps": noise[None], "v": ab.sqrt() * noise - (1 - ab).sqrt() * z}[model.prediction]
        inputs.append((x_t, t, cond, wanted))
    x_t, timesteps, conds, targets = zip(*inputs, strict=True)
    cond = {key: torch.cat([cond[key] for cond in conds]) for key in conds[0]}
    outputs = model.apply_model(torch.cat(x_t), torch.tensor(timesteps), cond)
    for output, t, wanted in zip(outputs, timesteps, torch.cat(targets), strict=True):
        losses.setdefault(f"loss_t{t * 5 // T * T // 5}-{(t * 5 // T + 1) * T // 5 - 1}", []).append(
            (output - wanted).double().square().mean().item()
        )
    assert len(losses) == 5 and {len(some) for some in losses.values()} == {52}
    means = {name: sum(some) / len(some) for name, some in losses.items()}
    assert found == pytest.approx(means | {"loss": sum(means.values()) / 5}, rel=1e-4)
    bins = [value for name, value in found.items() if name != "loss"]
    assert sum(bins) / 5 == pytest.approx(found["loss"], rel=1e-12)


@pytest.mark.usefixtures("few_triples")
@pytest.mark.parametrize("name", VALIDATED)
def test_the_same_in_any_batches_and_from_any_random_state(name):
    stage, images = prepared(name, {"root": "class"} if name == "folder" else TEST)
    found = []
    for batch_size in (5, 5, 64):
        torch.manual_seed(batch_size)
        before = torch.get_rng_state()
        found.append(Validation(stage, images, batch_size).measure())
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-5)
    assert found[0]["loss"] > 0


def test_the_autoencoders_psnr_by_hand():
    stage, images = prepared("autoencoder", TEST)
    x = torch.stack([images[i]["image"] for i in range(len(images))])
    with torch.no_grad():
        made = stage.model.decode(stage.model.encode(x).mean)
    errors = (made - x).double().square().mean((1, 2, 3))
    found = Validation(stage, images, 5).measure()
    assert found["error"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert found["psnr"] == pytest.approx((10 * (4 / errors).log10()).mean().item(), rel=1e-5)


def test_a_share_is_fixed_and_not_trained_on():
    stage, _ = prepared("pixel")
    training, held_out = build_datasets(stage, {**DIGITS, "validation": 0.25})
    assert (len(training), len(held_out)) == (12, 4)
    assert sorted(training.indices + held_out.indices) == list(range(16))
    assert held_out.indices == build_datasets(stage, {**DIGITS, "validation": 0.25})[1].indices
    before = [held_out[i]["caption"] for i in range(4)]
    training.set_epoch(5)  # captions are drawn anew in training only
    assert [held_out[i]["caption"] for i in range(4)] == before
    whole = Digits(first=16)
    whole.set_epoch(5)
    assert [training.caption_of(i).text for i in range(12)] == [whole.caption_of(i).text for i in training.indices]


def logged(path):
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "waits_for_data"} for line in lines]


@pytest.mark.usefixtures("few_triples")
def test_training_is_as_without_validation_and_resumes(tmp_path, monkeypatch):
    def config(name, validation):
        config = config_of("pixel") | {"outdir": str(tmp_path / name)}
        config["loop"] |= {"steps": 4, "batch_size": 8} | ({"validate_every": 1} if validation else {})
        return config | {"data": config["data"] | {"validation": validation}}

    plain, validated = train(config("plain", None), device="cpu"), train(config("validated", TEST), device="cpu")
    assert_same(plain, validated)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "agreed", lambda accelerator, flag: True)  # Ctrl-C in the first step
        with pytest.raises(Interrupted):
            train(config("resumed", TEST), device="cpu")
    resumed = train(config("resumed", TEST), resume=True, device="cpu")
    assert_same(plain, resumed)
    assert logged(resumed) == logged(validated)
    assert [line for line in logged(validated) if "loss" in line] == logged(plain)
    found = [line for line in logged(validated) if "validation/loss" in line]
    assert [line["step"] for line in found] == [1, 2, 3, 4] and "validation/loss_t800-999" in found[0]


def test_the_weights_that_train_are_validated_too(tmp_path):
    config = config_of("autoencoder") | {"outdir": str(tmp_path)}
    config["loop"] |= {"validate_both": True}
    config["data"] |= {"validation": 0.25}
    last = logged(train(config, device="cpu"))[-2]
    assert last["validation/psnr"] != last["validation_training_weights/psnr"]


@pytest.mark.parametrize("cache_dir", [None, "cache"])
def test_images_and_captions_are_encoded_once(tmp_path, cache_dir):
    """And equal what is encoded each time, up to the rounding of other batches."""
    stage, images = prepared("diffusion", TEST)
    stage.cache_latents = False
    expected = Validation(stage, images, 50).measure()
    stage.cache_latents, stage.cache_dir = True, cache_dir and str(tmp_path / cache_dir)
    validation, calls = Validation(stage, images, 50), []
    for network in (stage.latent_diffusion.first_stage_model.encoder, stage.latent_diffusion.cond_stage_model):
        network.register_forward_hook(lambda *_: calls.append(1))
    assert validation.measure() == pytest.approx(expected, rel=1e-5)
    count = len(calls)
    assert validation.measure() == pytest.approx(expected, rel=1e-5)
    assert len(calls) == count <= (0 if cache_dir else 6)  # the captions of as many batches, in memory


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_whose_loss_is_not_finite_are_counted(capsys, value):
    stage, images = prepared("classifier", TEST)
    own, expected = stage.validate, Validation(stage, part(images, range(2, 12)), 5).measure()

    def validate(batch, places, noise):
        wrong = (
            torch.stack([(x == images[i]["image"]).all() for x in batch["image"] for i in (0, 1)]).view(-1, 2).any(1)
        )
        values = own(batch, places, noise)
        return values | {"loss": torch.where(wrong, value, values["loss"])}

    stage.validate = validate
    assert Validation(stage, images, 5).measure() == pytest.approx(expected | {"not_finite": 2}, rel=1e-6)
    assert capsys.readouterr().err == (
        "note: validation: the loss of 2 of 12 images is not finite: they are left out of the means\n"
    )


@pytest.mark.parametrize(
    ("name", "data", "settings", "message"),
    [
        ("pixel", {"validation": 0.01}, {}, "data.validation 0.01 of 16 images leaves none on one of the two sides"),
        ("pixel", {"validation": 2}, {}, "validation 2 must be a number from 0 to 1 or a mapping"),
        ("pixel", {"validation": {"first": 16}}, {}, "changes nothing: these are the images that are trained on"),
        ("pixel", {"validaton": 0.1}, {}, "data: .*'validaton'; did you mean validation"),
        ("pixel", {}, {"validate_every": 2}, "need data.validation"),
        (
            "pixel",
            {"validation": 0.25},
            {"validate_both": True, "ema": 0.0},
            "validate_both has no effect with loop.ema",
        ),
        ("folder", {"validation": {"size": 16}}, {}, r"of data.validation are \(1, 16, 16\), and those to train on"),
        (
            "folder",
            {"validation": {"root": "./instance"}},
            {},
            "3 files of data.validation are also trained on: .*0.png",
        ),
        ("ddgan", {"validation": 0.25}, {}, "DenoisingGANStage cannot be validated: leave out data.validation"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_training(tmp_path, name, data, settings, message):
    config = config_of(name) | {"outdir": str(tmp_path)}
    config["data"] |= data
    config["loop"] |= settings
    refused(message, rehearse, [config], False, torch.device("cpu"))


def test_few_noise_levels_are_not_validated_at_all_of_them():
    stage = instantiate_from_config(config_of("distillation")["stage"])
    refused("DistillationStage cannot be validated", hold_out, stage, {}, range(8), 0.25)


def test_a_command_can_add_it(tmp_path):
    path = tmp_path / "pixel.yaml"
    path.write_text(json.dumps(config_of("pixel")))
    for change, value in (("data.validation=0.1", 0.1), ("data.validation.root=a", {"root": "a"})):
        (config,) = read_configs([str(path)], [change])
        assert config["data"]["validation"] == value
