"""What shows before the first stage trains: every mistake of a later one, and what own classes lack."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused
from PIL import Image
from test_reference_pages import SCRIPTS as COMMANDS
from test_reference_pages import parser_of
from test_train_script import ROOT, SHORT, configs

import ldm
from ldm.commands import train
from ldm.data.digits import Digits
from ldm.training import rehearsal
from ldm.training.config import read_configs
from ldm.training.contract import build_dataset, check_dataset
from ldm.training.stage import Stage

CPU = torch.device("cpu")
UNET = "diffusion.stage.params.unet_config.params"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with the two first stages of configs/sklearn."""
    outdir = tmp_path_factory.mktemp("trained")
    train.main([*configs("sklearn")[:2], *SHORT[:3], f"outdir={outdir}", "data.params.first=40", "--device=cpu"])
    return outdir


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("diffusion.stage.params.defaults.sampler=ddimm", "sampler 'ddimm'"),
        ("diffusion.stage.params.prediction=velocity", "'velocity'"),
        (f"{UNET}.context_dim=64", "context_dim"),
        (f"{UNET}.norm_groups=7", "7"),
        (f"{UNET}.attention_resolutions=[2,3]", r"attention_resolutions \[3\] would have no effect: .* \[1, 2\]"),
        ("diffusion.stage.params.timesteps.std=-1", "std -1 must be a number of at least 0"),
        (f"{UNET}.in_channels=3", "does not fit latents"),
        ("diffusion.stage.params.unet_config.target=ldm.models.unet.UNet", "'ldm.models.unet.UNet' does not exist"),
        ("diffusion.stage.params.defaults.height=64", "defaults' height and width, .1, 64, 32."),
        ("diffusion.stage.params.caption_dropout=2", "caption_dropout 2"),
        ("diffusion.data.params.first=5000", "first must be from 1 to 1400"),
        ("diffusion.data.params.first=2", "has 2 images, fewer than one batch of 4"),
        ("diffusion.loop.precision=fp16", "precision fp16 trains on CUDA GPUs"),
        ("diffusion.stage.params.learning_rate=-1", "learning_rate -1 must be a number of at least 0"),
    ],
)
def test_a_mistake_in_the_last_stage_shows_at_once(trained, change, said):
    changes = [*SHORT, f"outdir={trained}", "data.params.first=40", change]
    refused(said, rehearsal.rehearse, read_configs(configs("sklearn"), changes), True, CPU)
    assert not (trained / "diffusion").exists()


def test_nothing_is_trained_before_all_stages_were_tried(tmp_path):
    """From nothing: the last stage is tried on what the trials of the others would write."""
    changes = [*SHORT, f"outdir={tmp_path / 'out'}", "data.params.first=40", "--device=cpu"]
    refused("diffusion: .*context_dim", train.main, [*configs("sklearn"), *changes, f"{UNET}.context_dim=64"])
    refused("two configurations.*name 'clip'", train.main, [*configs("sklearn"), configs("sklearn")[1], *changes])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out/diffusion").mkdir(parents=True)
    for name in ("config.yaml", "resume.pt"):
        (tmp_path / "out/diffusion" / name).write_text("seed: 0")
    refused("already holds a run", train.main, [*configs("sklearn"), *changes])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diffusion"]


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """Eight grey images, wide and square in turn, with captions."""
    folder = tmp_path_factory.mktemp("squares")
    for i in range(8):
        Image.new("L", (96, 48) if i % 2 else (48, 48), 30 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


@pytest.mark.parametrize(
    ("size", "channels", "mode", "cached"), [(32, 3, "RGB", "true"), (48, 1, "L", "false")], ids=["colour", "grey"]
)
def test_size_and_channels_are_said_once(squares, tmp_path, size, channels, mode, cached):
    """With images of two shapes for the diffusion stage, whose latents are cached or not."""
    given = [f"data.params.root={squares}", f"data.params.size={size}", f"data.params.channels={channels}"]
    given += [f"diffusion.data.params.buckets=[[{size},{size}],[{2 * size},{size // 2 // 16 * 16}]]"]
    given += [f"diffusion.stage.params.cache_latents={cached}", "diffusion.stage.params.preview_prompts=['']"]
    given += ["autoencoder.stage.params.discriminator={ndf: 4, n_layers: 1}", f"outdir={tmp_path}", "--device=cpu"]
    train.main([*configs("folder"), *SHORT, *given])
    (image,) = ldm.load(tmp_path / "diffusion/model.safetensors", device="cpu").generate(["number"])
    assert (image.mode, image.size) == (mode, (size, size))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.params.size=50", "autoencoder: the images of Folder are 50 x 50 .*multiples of 4"),
        ("data.params.size=104", "diffusion: .*height 104 cannot be made .* positive multiple of 16"),
        ("clip.data.params.size=60", "clip: the images of Folder are 60 x 60 .*multiples of 8"),
        ("clip.stage.params.vision.image_size=32", "clip: .* 64 x 64 .*image_size, 32"),
        ("autoencoder.stage.params.ddconfig.in_channels=1", "autoencoder: .*3 channels.* 1"),
        ("data.params.buckets=[[64,64],[96,50]]", "autoencoder: .*96 x 50 pixels.*multiples of 4"),
        ("data.params.buckets=[[64]]", "autoencoder: .*buckets .*a list of 2 entries"),
        ("diffusion.data.params.buckets=[[64,64],[100,40]]", "diffusion: height 40 cannot be made"),
    ],
)
def test_sizes_that_do_not_fit(squares, tmp_path, change, said):
    argv = [*configs("folder"), *SHORT, f"data.params.root={squares}", f"outdir={tmp_path / 'out'}", change]
    refused(said, train.main, [*argv, "--device=cpu"])
    assert not (tmp_path / "out").exists()


# Own data sets


class Own(Digits):
    """A data set whose samples are changed by `change`."""

    change: dict = {}

    def __getitems__(self, indices):
        return [{**sample, **self.change} for sample in super().__getitems__(indices)]


class WithoutTexts(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"image": torch.zeros(1, 32, 32), "caption": "a"}

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": torch.zeros(32, 32)}, r"must be floats \(channels, height, width\), not float32 \(32, 32\)"),
        ({"image": torch.zeros(1, 32, 32, dtype=torch.uint8)}, "not uint8"),
        ({"image": torch.full((1, 32, 32), 255.0)}, r"in \[-1, 1\], not from 255 to 255"),
        ({"caption": 5}, "caption must be a text, not 5"),
    ],
)
def test_samples_that_a_stage_cannot_use(change, said):
    data, stage = Own(first=2), Stage(1)
    data.change = change
    refused("Own is not a data set for Stage: .*" + said, check_dataset, stage, data)


def test_what_a_data_set_lacks_is_named():
    stage = Stage(1)
    stage.reads, stage.methods = ("image", "label"), ("texts",)
    refused("it has no method texts", check_dataset, stage, WithoutTexts())
    refused("no method __len__, texts", check_dataset, stage, torch.utils.data.Dataset())
    stage.methods = ()
    refused("its samples have no label, only image, caption", check_dataset, stage, WithoutTexts())
    refused("its samples are of type tuple", check_dataset, stage, [(torch.zeros(1), 0)])


def test_what_follows_from_the_model_is_not_set_again():
    stage = Stage(1)
    stage.data_params = lambda: {"size": 32}
    config = {"target": "ldm.data.folder.Folder", "params": {"root": ".", "size": 64}}
    refused("data.params.size follows from the model of Stage: leave it out", build_dataset, stage, config)


def test_the_example_of_own_classes_trains_and_samples(tmp_path, monkeypatch, capsys):
    """As docs/how-to/own_modules.md has it; a program that did not import the module needs --allow."""
    page = (ROOT / "docs/how-to/own_modules.md").read_text()
    for suffix in ("python", "yaml"):
        (text,) = re.findall(rf"^```{suffix}\n(.*?)^```$", page, re.M | re.S)
        (tmp_path / f"shapes.{suffix.removesuffix('thon')}").write_text(text)
    commands = [line.split()[1:] for line in re.findall(r"^ldm .*--allow shapes$", page, re.M)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    short = ["loop.steps=2", "data.params.count=70", "--device=cpu"]

    def run(command, *more, allowed=True):
        monkeypatch.setenv("LDM_ALLOW", "")
        monkeypatch.delitem(sys.modules, "shapes", raising=False)  # each command is a program of its own
        name, *argv = [*command, *more]
        argv = argv if allowed else [word for word in argv if word not in ("--allow", "shapes")]
        importlib.import_module(f"ldm.commands.{name}").main(argv)

    refused("shapes.Shapes.* not an allowed class", run, commands[0], *short, allowed=False)
    for old, new, said in (
        ("    downsampling = 1", "", "the network Network lacks downsampling"),
        ("downsampling = 1", "downsampling = 0.5", "network Network has the downsampling 0.5: it must be"),
        ("return self.last(", "return 0, self.last(", r"returns a tuple, and not a tensor of shape \(1, 1, 16, 16\)"),
        ("return self.last(", "return h + self.last(", r"returns \(1, 64, 16, 16\), and not a tensor of shape"),
        ('return {"image"', 'return {"picture"', "not a data set for PixelDiffusionStage: its samples have no image"),
        (", y: Tensor | None = None", "", "Network.forward.* unexpected keyword argument 'y'"),
    ):
        text = (tmp_path / "shapes.py").read_text()
        (tmp_path / "shapes.py").write_text(text.replace(old, new))
        importlib.invalidate_caches()
        refused(said, run, commands[0], *short)
        (tmp_path / "shapes.py").write_text(text)
    assert not (tmp_path / "runs").exists()
    run(commands[0], *short)
    refused("shapes.Network", run, commands[1], "--device=cpu", allowed=False)
    run(commands[1], "--device=cpu")
    assert len(list(tmp_path.rglob("samples/*.png"))) == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_loads_a_model_has_allow(name):
    parser = parser_of(name)
    subs = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for part in [parser] if not subs else subs[0]:
        if {"--ckpt", "--vae", "--resume"} & set(part._option_string_actions):
            assert "--allow" in part._option_string_actions, part.prog
