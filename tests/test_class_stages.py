"""Latent diffusion conditioned on classes, or on nothing: training on a folder, and sampling from the result."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomised, refused
from PIL import Image
from test_pixel_diffusion import CONFIG as PIXEL
from tiny_stages import STAGES, config_of, write_inputs

import ldm
from ldm.commands import evaluate, sample, train
from ldm.data.digits import Digits
from ldm.finetune.distillation import DistillationStage
from ldm.models import compiler
from ldm.training.conditioner import shown_classes
from ldm.training.conditions import drop
from ldm.training.contract import build_dataset
from ldm.training.diffusion import DiffusionStage
from ldm.training.loop import train as train_run
from ldm.training.pixel_diffusion import PixelDiffusionStage
from ldm.training.share import BatchShare
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
EMBEDDER = "ldm.conditioning.classes.ClassEmbedder"


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)


def stage_of(name: str, **changes) -> DiffusionStage:
    return DiffusionStage(**copy.deepcopy(STAGES[name][1]) | changes)


def test_the_folders_classes_become_the_models():
    stage, config = stage_of("classes"), config_of("classes")
    data = stage.prepare(build_dataset(stage, config["data"]))
    conditioner = stage.latent_diffusion.cond_stage_model
    assert conditioner.names == ["cat", "dog"] and conditioner.n_classes == 3 and conditioner.null == 2
    assert [one["label"] for one in data.__getitems__([0, 1, 2])] == [0, 0, 1]
    assert stage.preview_prompts == [0, 1] and set(stage.networks) == {"model", "cond_stage"}
    randomised(stage.model)  # its last layers are zeros
    batch = {"mean": torch.zeros(3, 4, 8, 8), "std": torch.ones(3, 4, 8, 8), "label": torch.tensor([0, 1, 1])}
    loss, _ = stage.loss(batch)
    loss.backward()
    assert conditioner.embedding.weight.grad[:2].abs().sum(1).min() > 0
    assert stage.export()[0]["params"]["cond_stage_config"]["params"]["names"] == ["cat", "dog"]


def test_distillation_keeps_the_models_classes_and_its_scale_factor():
    """They belong to the teacher's weights, whatever data it is tuned on."""
    first = stage_of("classes")
    data = build_dataset(first, config_of("classes")["data"])
    first.prepare(data)
    model, conditioner = randomised(first.latent_diffusion), first.latent_diffusion.cond_stage_model
    model.scale_factor, before = 3.0, conditioner.embedding.weight.clone()
    stage = DistillationStage(model, 1e-3, 4, scale=2.0)
    stage.prepare(data)
    assert stage.latent_diffusion.scale_factor == 3.0 and list(stage.networks) == ["model"]
    assert model.cond_stage_model is conditioner and torch.equal(conditioner.embedding.weight, before)
    batch = {"mean": torch.zeros(3, 4, 8, 8), "std": torch.ones(3, 4, 8, 8), "label": torch.tensor([0, 1, 1])}
    loss, _, _ = stage.turn(batch, 0, 0, None)
    loss.backward()
    assert loss.item() > 0 and conditioner.embedding.weight.grad is None


def test_compiled_training_takes_any_list_of_labels(monkeypatch):
    """In more batches than a network is compiled for."""
    monkeypatch.setattr(compiler, "BACKEND", "eager")
    stage = stage_of("classes")
    stage.prepare(build_dataset(stage, config_of("classes")["data"]))
    latents = {"mean": torch.zeros(16, 4, 8, 8), "std": torch.ones(16, 4, 8, 8)}
    with compiler.compiled(stage.compiles()):
        for _ in range(compiler.SHAPES + 6):
            stage.loss(latents | {"label": torch.randint(2, (16,))})


def test_resuming_with_other_images_is_noted_and_with_other_classes_refused(tmp_path, capsys):
    config = config_of("classes") | {"outdir": str(tmp_path / "out")}
    train_run(config, device="cpu")
    config["loop"]["steps"] = 3
    shutil.copy("sorted/cat/0.png", "sorted/cat/9.png")
    train_run(config, resume=True, device="cpu")
    assert "is resumed with other images: 3 when it was started, 4 now" in capsys.readouterr().err
    config["loop"]["steps"] = 4
    Path("sorted/cat").rename("sorted/zebra")  # the dogs would become number 0
    refused("started with the classes cat, dog and the data has dog, zebra", train_run, config, True, device="cpu")
    Path("sorted/zebra").rename("sorted/cat")
    Path("sorted/emu").mkdir()
    shutil.copy("sorted/cat/0.png", "sorted/emu/0.png")
    refused("classes cat, dog and the data has cat, dog, emu", train_run, config, True, device="cpu")


def test_classes_are_dropped_at_their_share():
    labels = torch.arange(2000) % 3
    torch.manual_seed(0)
    dropped = torch.tensor(drop(labels, 3, 0.3, BatchShare()))
    assert ((dropped == labels) | (dropped == 3)).all() and drop(labels, 3, 0.0, BatchShare()) is labels
    assert (dropped == 3).float().mean() == pytest.approx(0.3, abs=0.041)  # 4 standard deviations of 0.0102
    assert set(drop(labels, 3, 1.0, BatchShare())) == {3}


def test_numbers_of_classes_that_do_not_fit():
    def prepare(dataset, **params) -> None:
        cond = {"target": EMBEDDER, "params": {"embed_dim": 32, **params}}
        stage_of("classes", cond_stage=cond).prepare(dataset)

    config = config_of("classes")["data"]
    folder = instantiate_from_config(config, reads=("image", "label"))
    prepare(folder, n_classes=3)
    prepare(Digits(first=4), n_classes=11)
    refused(
        r"has 2 classes \(cat, dog\): n_classes must be 3 with the null class, not 11", prepare, folder, n_classes=11
    )
    refused("Digits has no names of classes: set n_classes", prepare, Digits(first=4))
    cond = {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 3, "null": False}}
    unet = {"target": "ldm.models.unet.UNetModel"}
    unet["params"] = STAGES["unconditional"][1]["unet_config"]["params"] | {"num_classes": 3}
    options = {"unet_config": unet, "cond_stage": cond, "defaults": STAGES["unconditional"][1]["defaults"]}
    refused("dropout 0.1 needs a null condition", stage_of, "classes", **options, caption_dropout=0.1)
    stage_of("classes", **options).prepare(Digits(first=4))
    for ignored in ({"caption_dropout": 0.1}, {"pooled": False}):
        refused("leave (it|them) out", stage_of, "unconditional", **ignored)
    other = {"target": "torch.nn.Identity", "params": {}}
    refused("the conditioner Identity lacks null", stage_of, "classes", cond_stage=other)


def test_pixels_take_the_names_too():
    params = copy.deepcopy(PIXEL["params"]) | {"channels": 1}
    stage = PixelDiffusionStage({**PIXEL, "params": params}, 1e-3)
    side = stage.latent_diffusion.defaults["height"]
    config = {"target": "ldm.data.folder.Folder", "params": {"root": "sorted", "size": side, "channels": 1}}
    data = build_dataset(stage, config)
    refused("n_classes must be 3", stage.prepare, data)
    params["cond_stage_config"]["params"]["n_classes"] = params["unet_config"]["params"]["num_classes"] = 3
    stage = PixelDiffusionStage({**PIXEL, "params": params}, 1e-3)
    stage.prepare(data)
    assert stage.latent_diffusion.cond_stage_model.names == ["cat", "dog"]


def test_previews_show_each_class():
    conditioner = ldm.conditioning.classes.ClassEmbedder(4, 4)
    assert shown_classes(conditioner, 5) == [0, 1, 2, 0, 1] and shown_classes(None, 2) == ["", ""]


class Pose(torch.nn.Module):
    null, reads = None, "pose"

    def forward(self, poses):
        return {"c_crossattn": torch.zeros(len(poses), 1, 32)}


def test_a_conditioner_without_a_null_condition_needs_one_to_be_tried_with():
    own = {"target": f"{__name__}.Pose"}
    refused("the conditioner Pose reads 'pose' and has no null condition", stage_of, "classes", cond_stage=own)
    defaults = STAGES["classes"][1]["defaults"] | {"scale": 1.0}
    stage = stage_of("classes", cond_stage=own, preview_prompts=["standing"], defaults=defaults)
    assert stage.reads == ("image", "pose")


def test_a_network_of_ones_own_may_have_no_params():
    refused("differ about pooled text", stage_of, "diffusion", unet_config={"target": f"{__name__}.Pose"})


SHORT = [
    *("loop.steps=1", "loop.batch_size=2", "loop.report_to=none", "data.params.size=32", "data.params.channels=1"),
    *("autoencoder.stage.params.ddconfig.ch=8", "stage.params.unet_config.params.model_channels=16"),
    *("stage.params.unet_config.params.num_head_channels=16", "stage.params.defaults.steps=1"),
    "stage.params.preview_columns=2",
]


def files(folder) -> list[Image.Image]:
    return [Image.open(path) for path in sorted((folder / "samples").iterdir())]


def test_a_folder_by_class_from_images_to_figures(tmp_path):
    """One command trains the configurations that ship; names generate; figures are of the reference's classes."""
    for i in range(24):
        (tmp_path / "many" / ("cat", "dog", "5")[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 32), 60 + i).save(tmp_path / "many" / ("cat", "dog", "5")[i % 3] / f"{i}.png")
    (tmp_path / "many/metadata.jsonl").write_text("not read")
    configs = [f"{ROOT}/configs/folder/{name}.yaml" for name in ("autoencoder", "classes")]
    train.main([*configs, *SHORT, "data.params.root=many", "outdir=out", "--device", "cpu"])
    ckpt = ["--ckpt", "out/classes/model.safetensors"]
    sample.main([*ckpt, "--class", "dog", "2", "5", "--outdir", "by_name", "--scale", "2", "--device", "cpu"])
    named = [image.tobytes() for image in files(tmp_path / "by_name")]
    model = ldm.load("out/classes/model.safetensors", device="cpu")
    assert model.cond_stage_model.names == ["5", "cat", "dog"]  # a name comes before a number: "5" is class 0
    assert named == [image.tobytes() for image in model.generate([2, 2, 0], scale=2.0)]
    refused(
        "class 'bird' does not exist: this model's are 0 to 3: 5, cat, dog, and the null class",
        sample.main,
        [*ckpt, "--class", "bird"],
    )
    evaluate.main(["model", *ckpt, "--dataset", "many", "--steps", "1", "--device", "cpu", "--out", "report.json"])
    report = json.loads(Path("report.json").read_text())
    assert report["n"] == 12 and report["frechet"]["distance"] > 0
    refused("'ldm.conditioning.classes.ClassEmbedder' .*cannot|conditioner ldm.conditioning.classes.ClassEmbedder",
            ldm.save, model, "x", format="diffusers")  # fmt: skip


def test_a_folder_of_images_alone(tmp_path):
    for i in range(20):
        (tmp_path / "alone").mkdir(exist_ok=True)
        Image.effect_noise((40, 32), 60 + i).save(tmp_path / "alone" / f"{i}.png")
    configs = [f"{ROOT}/configs/folder/{name}.yaml" for name in ("autoencoder", "unconditional")]
    train.main([*configs, *SHORT, "data.params.root=alone", "outdir=out", "--device", "cpu"])
    ckpt = ["--ckpt", "out/unconditional/model.safetensors", "--device", "cpu"]
    sample.main([*ckpt, "--n_samples", "2"])
    assert len(files(tmp_path / "outputs/sample-samples")) == 2
    refused("--class needs a class-conditional model, .*unconditional", sample.main, [*ckpt, "--class", "1"])
    evaluate.main(["model", *ckpt, "--dataset", "alone", "--steps", "1", "--out", "report.json"])
    assert json.loads(Path("report.json").read_text())["n"] == 10
    model = ldm.load("out/unconditional/model.safetensors", device="cpu")
    refused("conditioner None", ldm.save, model, "x", format="diffusers")
