"""scripts/train.py: the shipped configurations from nothing to a model that draws, and every mistake one sentence."""

import json
import struct
from pathlib import Path

import pytest
from conftest import refused
from omegaconf import OmegaConf
from PIL import Image

import ldm
from ldm.commands import train
from ldm.program import run
from ldm.training.config import read_configs

ROOT = Path(__file__).parents[1]
STAGES = ("autoencoder", "clip", "diffusion")
# The networks as they are; of everything else as little as possible.
SHORT = ["loop.steps=2", "loop.batch_size=4", "loop.report_to=none", "diffusion.stage.params.defaults.steps=2"]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def configs(system: str) -> list[str]:
    return [str(ROOT / "configs" / system / f"{stage}.yaml") for stage in STAGES]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve pictures of squares, wide and high, half of them with NAME.txt and half in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(12):
        name, colour = list(COLOURS.items())[i % 3]
        picture = Image.new("RGB", (70 + 5 * i, 120 - 3 * i), (240, 240, 240))
        picture.paste(colour, (10, 10, 60, 60))
        picture.save(folder / f"{i:02}.png")
        caption = f"a {name} square, number {i}"
        if i < 6:
            (folder / f"{i:02}.txt").write_text(caption)
        else:
            lines.append(json.dumps({"file_name": f"{i:02}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def assert_draws(folder: Path, mode: str, size: int) -> None:
    """Every stage left its checkpoint and what it was made from, and the last one is a whole model."""
    for stage in STAGES:
        assert OmegaConf.load(folder / stage / "config.yaml").name == stage
        assert json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
        assert (folder / stage / "previews" / "000002.png").is_file()
        assert (folder / stage / "resume.pt").is_file()
    model = ldm.load(folder / "diffusion" / "model.safetensors", device="cpu")
    (image,) = model.generate(["a red five"])
    assert (image.mode, image.size) == (mode, (size, size))
    assert model.config["schedule"] == {"name": "cosine"} and model.defaults["steps"] == 2


@pytest.fixture(scope="module")
def folder_run(pictures, tmp_path_factory) -> Path:
    outdir = tmp_path_factory.mktemp("folder_run")
    changes = [f"data.params.root={pictures}", f"outdir={outdir}"]
    train.main([*configs("folder"), *SHORT, *changes, "--device", "cpu"])
    return outdir


def test_a_folder_of_images(folder_run):
    assert_draws(folder_run, "RGB", 64)


def test_a_folder_with_pixels_that_change(pictures, folder_run, tmp_path, capsys):
    """Random crops in the third stage: refused with the latents cached, and possible without."""
    changes = [f"data.params.root={pictures}", f"outdir={tmp_path}", "data.params.crop=random", "data.params.flip=true"]
    stages = zip(("first_stage", "cond_stage"), STAGES, strict=False)
    changes += [f"stage.params.{key}={folder_run / stage / 'model.safetensors'}" for key, stage in stages]
    diffusion = [configs("folder")[2], *SHORT, *changes, "--device=cpu"]
    with pytest.raises(ValueError, match="stage.params.cache_latents=false"):
        train.main(diffusion)
    train.main([*diffusion, "stage.params.cache_latents=false"])
    assert capsys.readouterr().out == f"diffusion: {tmp_path / 'diffusion' / 'model.safetensors'}\n"
    assert ldm.load(tmp_path / "diffusion" / "model.safetensors", device="cpu").generate(["blue"])[0].size == (64, 64)


def test_scikit_learns_digits(tmp_path):
    train.main([*configs("sklearn"), *SHORT, "data.params.first=40", f"outdir={tmp_path}", "--device", "cpu"])
    assert_draws(tmp_path, "L", 32)


@pytest.mark.smoke
def test_the_model_that_ships(mnist, tmp_path):
    changes = [f"data.params.root={mnist}", "data.params.first=null", f"outdir={tmp_path / 'runs'}"]
    train.main([*configs("digits"), *SHORT, *changes, "--device", "cpu"])
    assert_draws(tmp_path / "runs", "L", 32)


def test_the_speedrun(mnist, tmp_path):
    changes = [f"data.params.root={mnist}", "data.params.first=null", f"outdir={tmp_path / 'runs'}"]
    paths = [str(ROOT / "configs" / "speedrun" / f"{stage}.yaml") for stage in ("autoencoder", "diffusion")]
    train.main([*paths, *SHORT, *changes, "--device", "cpu"])
    (image,) = ldm.load(tmp_path / "runs" / "diffusion", device="cpu").generate(["a handwritten digit five"])
    assert (image.mode, image.size) == ("L", (32, 32)) and not list(tmp_path.rglob("resume.pt"))


def test_the_two_digit_systems_are_alike():
    """configs/sklearn is configs/digits on other data, smaller and shorter: one is a first look at the other."""
    for stage in STAGES:
        config, other = (
            OmegaConf.load(ROOT / "configs" / system / f"{stage}.yaml") for system in ("sklearn", "digits")
        )
        assert (config.outdir, other.outdir) == ("runs/sklearn", "runs/digits") and config.name == other.name == stage
        assert config.stage.target == other.stage.target
        for name in ("embed_dim", "vision.image_size", "schedule", "prediction", "defaults.height"):
            assert OmegaConf.select(config.stage.params, name) == OmegaConf.select(other.stage.params, name), name


FORBIDDEN = """
name: bad
outdir: OUT
seed: 0
stage: {target: os.system, params: {command: touch OUT}}
data: {target: ldm.data.digits.Digits, params: {first: 8}}
loop: {steps: 1, batch_size: 2}
"""


def mistakes(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """name -> (arguments, what the sentence must say)."""
    out, digits = f"outdir={tmp_path / 'out'}", configs("sklearn")[0]
    (tmp_path / "forbidden.yaml").write_text(FORBIDDEN.replace("OUT", str(tmp_path / "hit")))
    raw = tmp_path / "corrupt" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 16, 28, 28) + bytes(100))
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 16) + bytes(16))
    mnist, root = configs("digits")[0], f"data.params.root={tmp_path}"
    return {
        "none": (["loop.steps=2"], "no configuration is given"),
        "unknown stage key": ([digits, "stage.params.learning_rat=2", out], "'learning_rat'"),
        "unknown network key": ([digits, "stage.params={ddconfig: {chh: 2}}", out], "'chh'"),
        "unknown key of a part": ([digits, "stage.params.discriminator={ndff: 2}", out], "discriminator: "),
        "unknown data key": ([digits, "data.params.splitt=train", out], "'splitt'"),
        "forbidden": ([str(tmp_path / "forbidden.yaml")], "target 'os.system' is not"),
        "no root": ([configs("folder")[0], out], "data.params.root=DIR"),
        "no pictures": ([configs("folder")[0], root + "/nowhere", out], "nowhere is not a folder"),
        "no stage before": ([configs("sklearn")[2], out], "autoencoder/model.safetensors' does not exist"),
        "corrupt data": ([mnist, root + "/corrupt", out], "train-images-idx3-ubyte is corrupt"),
    }


def test_every_mistake_is_one_sentence(tmp_path, capsys):
    for name, (arguments, message) in mistakes(tmp_path).items():
        with pytest.raises(SystemExit) as ended:
            run(lambda arguments=arguments: train.main([*arguments, "--device", "cpu"]))
        said = capsys.readouterr().err
        assert ended.value.code == 2, f"{name}: {said}"
        assert said.startswith("error: ") and said.count("\n") == 1 and message in said, f"{name}: {said}"
    assert not (tmp_path / "hit").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_a_change_that_no_yaml_can_hold():
    refused("is not UTF-8", read_configs, configs("digits")[:1], ["outdir=b\udcff"])
