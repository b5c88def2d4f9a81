"""`ldm doctor`: the model that ships, on images like those that it was trained on, passes; each mistake is found."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from omegaconf import OmegaConf
from tiny_stages import config_of, write_inputs

import ldm
from ldm.commands.doctor import main
from ldm.evaluation.doctor import (
    check_denoiser,
    check_ema,
    check_latents,
    check_type,
    diagnose,
    grade,
    open_run,
    read_outputs,
)
from ldm.training.loop import train

ROOT = Path(__file__).parents[1]
CHECKS = "latents, first stage, scaling, schedule end, prediction, denoiser, guidance, EMA, overfitting".split(", ")
CPU = torch.device("cpu")


def write_run(folder: Path, **changes) -> Path:
    """Write the digits model as a run with images that it generated as its data. changes: to the model."""
    config = OmegaConf.load(ROOT / "configs/digits/diffusion.yaml")
    config.data = {"target": "ldm.data.folder.Folder", "params": {"root": str(folder / "images"), "size": 32}}
    config.data.params.channels = 1
    model = ldm.load()
    if not (folder / "images").exists():
        (folder / "images").mkdir(parents=True)
        words = [word for word in config.stage.params.preview_prompts for _ in range(6)]
        for i, image in enumerate(model.generate(words, steps=8, batch_size=60)):
            image.save(folder / "images" / f"{i}.png")
            (folder / "images" / f"{i}.txt").write_text(words[i])
    for name, value in changes.items():
        setattr(model, name, value)
    OmegaConf.save(config, folder / "config.yaml")
    ldm.save(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder, CPU)


def test_the_model_that_ships_passes(folder, capsys):
    main([str(folder), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[12:].partition(":")[0] for line in lines] == CHECKS
    assert all(line.startswith("ok ") for line in lines)


def scale(run):
    run.stage.latent_diffusion.scale_factor *= 6


def collapse(run):
    for weights in run.stage.latent_diffusion.first_stage_model.quant_conv.parameters():
        weights.data.zero_()


def blank(run):
    run.stage.latent_diffusion.first_stage_model.decoder.conv_out.weight.data.zero_()


def decode(run):
    model = run.stage.latent_diffusion
    model.decode = lambda z: model.first_stage_model.decode(4 * z / model.scale_factor)


def short(run):
    run.stage.latent_diffusion.schedule_params = {"name": "linear", "T": 100}


def predict(run):
    run.stage.latent_diffusion.prediction = "eps"


def offset(run):
    run.stage.model.diffusion_model.out[2].bias.data += 2


def ignore(run):
    for name, weights in run.stage.model.named_parameters():
        if "attn2.to_out" in name or "label_emb" in name:
            weights.data.zero_()


def slow(run):
    run.stage.adam["lr"] = 1e-12


def old(run):
    return run._replace(settings=replace(run.settings, ema=0.9999))


@pytest.mark.usefixtures("few_triples")
@pytest.mark.parametrize(
    ("check", "verdict", "spoil", "change"),
    [
        ("latents", "wrong", scale, "divide scale_factor by"),
        ("latents", "wrong", collapse, "encodes all images alike"),
        ("first stage", "wrong", blank, "train the first stage"),
        ("scaling", "wrong", decode, "divide by it before decoding"),
        ("schedule end", "wrong", short, "use more steps or larger betas"),
        ("prediction", "wrong", predict, "set prediction to v"),
        ("denoiser", "wrong", offset, "train longer"),
        ("guidance", "wrong", ignore, "the condition is ignored"),
        ("EMA", "suspicious", old, "set loop.ema to 0.9993"),
        ("overfitting", "suspicious", slow, "learning_rate"),
    ],
    ids=["latents", "collapsed", *CHECKS[1:]],
)
def test_a_mistake_is_found(run, check, verdict, spoil, change):
    spoiled = run._replace(stage=copy.deepcopy(run.stage))
    spoiled = spoil(spoiled) or spoiled
    findings = {each.name: each for each in diagnose(spoiled, images=20, overfit=5 if spoil is slow else 0)}
    assert findings[check].verdict == verdict and change in str(findings[check])


def test_outputs_are_read_as_flow_of_a_model_of_flow_only(run):
    model, z = copy.deepcopy(run.stage.latent_diffusion), torch.zeros(2, 4, 8, 8)
    cond = model.condition(["a handwritten five"] * 2)
    assert list(read_outputs(model, z, cond)[0]) == ["eps", "x0", "v"]
    model.prediction = "flow"
    assert list(read_outputs(model, z, cond)[0]) == ["eps", "x0", "v", "flow"]


@pytest.mark.usefixtures("few_triples")
def test_the_status_is_1_for_what_is_wrong(folder, tmp_path, capsys):
    (tmp_path / "images").symlink_to(folder / "images")
    with pytest.raises(SystemExit, match="1"):
        main([str(write_run(tmp_path, prediction="x0")), "--device", "cpu", "--images", "20", "--overfit", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 8 and lines[4].startswith("wrong       prediction") and lines[4].endswith("set prediction to v")
    )


@pytest.mark.usefixtures("few_triples")
@pytest.mark.parametrize("name", ["diffusion", "classes", "unconditional"])
def test_every_kind_of_condition(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    path = train(config_of(name, preview_every=2, save_every=2), device="cpu").parent
    (tmp_path / "first_stage").unlink()  # what a run's checkpoint has, it needs no other file for
    (tmp_path / "cond_stage").unlink()
    findings = {each.name: each for each in diagnose(open_run(path, CPU), images=2, overfit=2)}
    assert list(findings) == CHECKS
    assert ("no null condition" in findings["guidance"].found) == (name == "unconditional")
    assert "of 2 steps" in findings["EMA"].found and findings["denoiser"].verdict != "ok"


def test_what_is_no_run_of_latent_diffusion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run: it has no config.yaml"):
        open_run(tmp_path, CPU)
    refused("the checks are for DiffusionStage", open_run, train(config_of("autoencoder"), device="cpu").parent, CPU)


def test_grades():
    assert [grade(x, 1, 2) for x in (1, 1.5, 3, math.nan)] == ["ok", "suspicious", "wrong", "wrong"]
    assert [grade(x, 20, 15) for x in (20, 16, 14, math.inf)] == ["ok", "suspicious", "wrong", "ok"]


def test_limits_by_hand():
    z = torch.randn(50, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    shifts = (0.0, 1.5, 3.0)
    assert [check_latents(z + shift).verdict for shift in shifts] == ["ok", "suspicious", "wrong"]
    assert [check_latents(z * factor).verdict for factor in (0.4, 0.2, 0.0)] == ["suspicious", "wrong", "wrong"]
    for factor, remedy in ((5, "with a larger kl_weight"), (0.2, "longer or with a smaller kl_weight")):
        change = check_latents(factor * z / z.transpose(0, 1).std()).change
        assert change == f"divide scale_factor by {factor}, or train the first stage {remedy}"
    trivial = {"loss_t0-4": 2.0, "loss_t5-9": 1.0}
    for losses, verdict in (((1, 0.5), "ok"), ((0.5, 1.1), "suspicious"), ((2, 1), "wrong"), ((1, math.nan), "wrong")):
        assert check_denoiser(dict(zip(trivial, losses, strict=True)), trivial).verdict == verdict
    errors = {"eps": 0.2, "x0": 1.0, "v": 0.5}
    assert [check_type("eps", errors, 1).verdict, check_type("v", errors, 1).verdict] == ["ok", "wrong"]
    assert check_type("v", errors, 0.2).verdict == "suspicious"  # an untrained network's 0 looks like v's best guess
    assert [check_ema(d, 3000).verdict for d in (0, 0.998, 0.9995, 1)] == ["ok", "ok", "suspicious", "suspicious"]
