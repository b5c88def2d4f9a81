"""Nothing that a user asks for is ignored: every option of the sampling commands changes what comes out, or is refused.

What comes out: the exit status, what is printed, the files with their contents, and what the networks computed (the
shape, dtype and memory format of each call), which shows options of speed and memory.
"""

import argparse
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomised
from lora_models import learned
from PIL import Image
from test_classifier_guide import write as write_classifier
from test_pixel_diffusion import build
from test_reference_pages import parser_of

import ldm
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.finetune.lora_files import save_lora
from ldm.models import kernels
from ldm.models.autoencoder import Decoder, Encoder
from ldm.models.unet import UNetModel

COMMANDS = ("txt2img", "img2img", "inpaint", "sample")
MARKS = {name: pytest.mark.full for name in ("txt2img", "img2img", "inpaint")}  # 20 seconds each
INPUTS = {
    "img2img": ["--init-img", "a.png"],
    "inpaint": ["--init-img", "a.png", "--mask", "a_mask.png"],
}
# What an option needs beside it to make a difference; what it is compared with has that too.
BESIDE = {
    "--batch-size": ["--n_samples", "2"],
    "--fixed_code": ["--n_samples", "2"],
    "--n_rows": ["--n_samples", "2"],
    "--vae-slicing": ["--n_samples", "2"],
    "--plain": ["--prompt", "(five:1.5)"],
    "--pag-layers": ["--pag", "1"],
    "--autoguide-scale": ["--autoguide", "weaker.safetensors"],
    "--classifier": ["--class", "1"],
    "--classifier-scale": ["--class", "1", "--classifier", "classifier.safetensors"],
    "--embedding": ["--prompt", "five <it>"],
    "--resize": ["--init-img", "large.png"],
}
BESIDE_OF = {  # where a command needs something else
    ("inpaint", "--resize"): ["--init-img", "large.png", "--mask", "large_mask.png"],
    ("sample", "--plain"): [],
    ("sample", "--embedding"): [],
}
# Option -> a value that must make a difference.
VALUES = {
    "--prompt": ["four"],
    "--class": ["1"],
    "--layout": ["layout.json"],
    "--map": ["a.png"],
    "--upscale": [],
    "--from-file": ["prompts.txt"],
    "--from-png": ["earlier.png"],
    "--n_samples": ["3"],
    "--n_iter": ["2"],
    "--batch-size": ["1"],
    "--seed": ["9"],
    "--fixed_code": [],
    "--H": ["48"],
    "--W": ["48"],
    "--C": ["99"],
    "--f": ["99"],
    "--negative-prompt": ["four"],
    "--steps": ["2"],
    "--sampler": ["dpmpp_2m"],
    "--scale": ["3"],
    "--spacing": ["karras"],
    "--final-sigma": ["sigma_min"],
    "--eta": ["0.5"],
    "--interval": ["1", "2"],
    "--rescale": ["0.7"],
    "--clip-skip": ["2"],
    "--plain": [],
    "--plms": [],
    "--pag": ["1"],
    "--pag-layers": ["input_blocks.4"],
    "--threshold": ["0.5"],
    "--autoguide": ["weaker.safetensors"],
    "--autoguide-scale": ["3"],
    "--classifier": ["classifier.safetensors"],
    "--classifier-scale": ["3"],
    "--ckpt": ["weaker.safetensors"],
    "--config": ["missing.yaml"],
    "--vae": ["weaker.safetensors"],
    "--unet": ["weaker.safetensors"],
    "--ema": [],
    "--prediction": ["eps"],
    "--vocab": ["missing.txt"],
    "--variant": ["fp16"],
    "--device": ["meta"],
    "--lora": ["lora.safetensors"],
    "--embedding": ["word.safetensors"],
    "--precision": ["bf16"],
    "--attention": ["math"],
    "--channels-last": [],
    "--compile": [],
    "--vae-slicing": [],
    "--vae-tiling": ["16"],
    "--offload": ["swap"],
    "--outdir": ["other"],
    "--format": ["webp"],
    "--enlarge": ["2"],
    "--grid": ["scale=1,2"],
    "--skip_save": [],
    "--skip_grid": [],
    "--n_rows": ["1"],
    "--strip": [],
    "--init-img": ["b.png"],
    "--strength": ["0.5"],
    "--resize": [],
    "--mask": ["b_mask.png"],
    "--invert-mask": [],
    "--indir": ["pairs"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with every file that the options name, and one earlier image of each command."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(0)
    for name, side in (("a", 32), ("b", 32), ("large", 64)):
        noise = torch.randint(0, 256, (side, side), dtype=torch.uint8, generator=generator)
        Image.fromarray(noise.numpy()).save(folder / f"{name}.png")
    for name in ("a_mask", "b_mask", "large_mask"):
        mask = Image.new("L", (64, 64) if name == "large_mask" else (32, 32))
        mask.paste(255, (0, 0, 16, 24 if name == "b_mask" else 16))
        mask.save(folder / f"{name}.png")
    (folder / "pairs").mkdir()
    for name in ("b.png", "b_mask.png"):
        (folder / "pairs" / name).write_bytes((folder / name).read_bytes())
    Image.fromarray(noise.numpy()).save(folder / "earlier.png", pnginfo=None)
    (folder / "prompts.txt").write_text("1\n2\n")
    (folder / "layout.json").write_text("[]")
    return folder


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKS.get(name, ())) for name in COMMANDS])
def command(request, inputs) -> str:
    """The command, with the files of its kind of model in the folder."""
    torch.manual_seed(1)
    name, text = request.param, request.param != "sample"
    model = randomised(ldm.LatentDiffusion(**TINY)) if text else build()
    model.eval().requires_grad_(False)
    for file in ("model", "weaker"):
        ldm.save(model, inputs / f"{file}.safetensors")
        model.model.diffusion_model.out[2].bias += 0.5
    lora = copy.deepcopy(model)
    targets = {} if text else {"targets": ["convolution"]}
    save_lora(inputs / "lora.safetensors", learned(lora, **targets), lora)
    write_words(inputs / "word.safetensors", LearnedWord("<it>", torch.randn(2, 32)), "diffusers")
    write_classifier(inputs / "classifier.safetensors", {"name": "linear"}, in_channels=1, image_size=32)
    return name


@pytest.fixture
def outcome(command, inputs, tmp_path, monkeypatch, capsys):
    """`outcome("--steps", "2")` runs the command and gives all that can be seen of it."""

    def watch(owner: object, name: str) -> None:
        own = getattr(owner, name)

        def watched(*args: object, **kwargs: object) -> object:
            calls.append((name, *map(layout, args)))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def layout(arg: object) -> tuple | None:
        if not isinstance(arg, torch.Tensor) or arg.ndim != 4:
            return None
        return tuple(arg.shape), arg.dtype, arg.is_contiguous()

    calls: list[tuple] = []
    for owner, name in ((UNetModel, "forward"), (Encoder, "forward"), (Decoder, "forward")):
        watch(owner, name)
    monkeypatch.setattr("ldm.inference.compile.compile_calls", lambda *args, **kwargs: print("compiled"))
    watch(kernels, "_math_attention")
    watch(F, "conv2d")

    def run(*options: str) -> tuple:
        calls.clear()
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        for path in inputs.iterdir():  # linked, so that runs have the same names for the same files
            Path(path.name).symlink_to(path)
        fixed = ["--ckpt", "model.safetensors", "--device", "cpu", "--steps", "3", "--outdir", "out"]
        fixed += [] if "--indir" in options else INPUTS.get(command, [])
        status = 0
        try:
            importlib.import_module(f"ldm.commands.{command}").main([*fixed, *options])
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            status = 2
        except SystemExit as end:
            status = end.code
        finally:
            kernels.set_attention("auto")
        said = capsys.readouterr()
        assert status in (0, 2), said.err
        written = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in written}
        return status, said.out, said.err, files, tuple(calls)

    return run


def options_of(command: str) -> list[str]:
    """The long option of each action that --help shows, but --allow, which test_rehearsal.py tries on every command."""
    shown = [a for a in parser_of(command)._actions if a.help != argparse.SUPPRESS and a.dest not in ("help", "allow")]
    return [action.option_strings[0] for action in shown]


def test_every_option_has_a_value_here():
    known = {option for command in COMMANDS for option in options_of(command)}
    assert known == VALUES.keys()


def test_it_makes_a_difference_or_is_refused(command, outcome):
    """One run with the option and one without; images may agree, if the networks computed them in another way."""
    plain = {}
    ignored, broken = [], []
    for option in options_of(command):
        beside = tuple(BESIDE_OF.get((command, option), BESIDE.get(option, [])))
        if beside not in plain:
            plain[beside] = outcome(*beside)
            assert plain[beside][0] == 0, plain[beside][:3]
            assert plain[beside] == outcome(*beside), "two runs of the same options differ"
        try:
            if outcome(*beside, option, *VALUES[option]) == plain[beside]:
                ignored.append(option)
        except Exception as error:  # all are reported together
            broken.append((option, repr(error)))
    assert (ignored, broken) == ([], [])
