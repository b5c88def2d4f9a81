"""Nothing that a user asks for is ignored: every option of a command changes what can be seen of a run, or is refused.

What can be seen: its status, what it prints but bars of progress, its files and the order in which they are written,
what the networks computed (shape, dtype and memory format), and how it loads its data.
"""

import argparse
import copy
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomised, save_noise
from lora_models import learned
from PIL import Image
from test_classifier_guide import write as write_classifier
from test_doctor import write_run
from test_emoji_evaluation import write_packages
from test_evaluation import small_networks
from test_likelihood import SHORTER
from test_mnist import idx, make_images
from test_pixel_diffusion import build
from test_reference_pages import parser_of
from test_scenes import TINY_SCENES

import ldm
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.finetune.lora_files import save_lora
from ldm.models import kernels

LOADING = """
--config: missing.yaml
--vae: weaker.safetensors
--unet: weaker.safetensors
--text-encoder: weaker.safetensors
--ema:
--prediction: eps
--vocab: missing.txt
--variant: fp16
"""
SAMPLING = """
--steps: 2
--scale: 3
--sampler: dpmpp_2m
--spacing: karras
--eta: 0.5
--interval: 1 2
--rescale: 0.7
"""
GUIDANCE = """
--final-sigma: sigma_min
--clip-skip: 2
--original-size: 64 32
--crop: 0 8
--aesthetic-score: 7
--plms:
--pag: 1
--pag-layers: input_blocks.4 | --pag 1
--threshold: 0.5
--autoguide: weaker.safetensors
--autoguide-scale: 3 | --autoguide weaker.safetensors
"""
MODEL = """
--device: meta
--lora: lora.safetensors
--precision: bf16
--attention: math
--channels-last:
--no-optimize:
--compile:
--vae-tiling: 16
--offload: swap
"""
IMAGES = """
--from-file: prompts.txt
--from-png: earlier.png
--n_samples: 3
--n_iter: 2
--batch-size: 1 | --n_samples 2
--seed: 9
--fixed_code: | --n_samples 2
--H: 48
--W: 48
--C: 99
--f: 99
--negative-prompt: four
--vae-slicing: | --n_samples 2
--outdir: other
--format: webp
--enlarge: 2
--grid: scale=1,2
--skip_save:
--skip_grid:
--n_rows: 1 | --n_samples 2
--strip:
"""
TEXT = """
--prompt: four
--plain: | --prompt (five:1.5)
--embedding: word.safetensors | --prompt <it>
--ckpt: weaker.safetensors
"""
INIT = """
--init-img: second.png
--strength: 0.5
"""
OF_TEXT = LOADING + SAMPLING + GUIDANCE + MODEL + IMAGES + TEXT
OF_PIXELS = (
    (LOADING + SAMPLING + GUIDANCE + MODEL + IMAGES).replace("weaker", "pixel_weaker").replace("lora.s", "pixel_lora.s")
)
OF_PAIRS = (
    LOADING
    + SAMPLING
    + MODEL
    + """
--prompt: four
--to: two
--seed: 9
--H: 48
--W: 48
--negative-prompt: four
--final-sigma: sigma_min
--clip-skip: 2
--original-size: 64 32
--crop: 0 8
--aesthetic-score: 7
--plain: | --prompt (five:1.5)
--embedding: word.safetensors | --prompt <it>
--ckpt: weaker.safetensors
--vae-slicing:
--outdir: other
--enlarge: 2
"""
)
OF_REPORTS = """
--batch-size: 7
--out: report.json
--image: a.png
--data: missing
"""
OF_GENERATED = (
    LOADING
    + SAMPLING
    + MODEL
    + OF_REPORTS
    + """
--seed: 1
--embedding: word.safetensors
--vae-slicing:
"""
)
OF_DATA_SETS = """
--ckpt: weaker.safetensors
--dataset: third
--split: heldout
--n: 21
--judge: missing
--features: missing
"""
TUNING = """
--ckpt: weaker.safetensors
--device: meta
--max_train_steps: 3
--lr_scheduler: constant
--lr_warmup_steps: 2
--seed: 1
--resolution: 64
--train_batch_size: 3
--learning_rate: 0.002
--error: l1
--snr_gamma: 5
--noise_offset: 0.1
--offset_noise:
--gradient_accumulation_steps: 2
--gradient_checkpointing:
--mixed_precision: bf16
--output_dir: other
--checkpointing_steps: 1
--keep_every: 1
--discard_state:
--validation_steps: 1
--report_to: tensorboard
--resume_from_checkpoint:
--num_validation_images: 2
"""
SHORT = "--device cpu --output_dir out --max_train_steps 2 --train_batch_size 2 --num_validation_images 1"
SHORT = f"--ckpt model.safetensors {SHORT} --report_to none --mixed_precision fp32"
SAMPLED = "--ckpt model.safetensors --device cpu --steps 3 --outdir out"
MEASURED = "--n 20 --batch-size 20"
OF_MNIST = "--outdir: other\n--data: none\n--judge: missing\n--features: missing"
NETWORKS = "--judge judge.safetensors --features features.safetensors"
# Command -> what it is run with; a table of options, each with a value that must make a difference, after `|` with what
# it needs beside it, which the run that it is compared with has too. A value of `-` there leaves the option out.
COMMANDS: dict[str, tuple[str, str]] = {
    "txt2img": (SAMPLED, OF_TEXT),
    "img2img": (f"{SAMPLED} --init-img first.png", OF_TEXT + INIT + "--resize: | --init-img large.png\n--upscale:"),
    "inpaint": (
        f"{SAMPLED} --init-img first.png --mask first_mask.png",
        OF_TEXT + INIT + """
--resize: | --init-img large.png --mask large_mask.png
--mask: second_mask.png
--invert-mask:
--indir: pairs
""",
    ),
    "sample": (
        SAMPLED.replace("model", "pixel"),
        OF_PIXELS + """
--ckpt: pixel_weaker.safetensors
--class: 1
--layout: layout.json
--map: first.png
--plain:
--embedding: word.safetensors
--classifier: pixel_classifier.safetensors | --class 1
--classifier-scale: 3 | --class 1 --classifier pixel_classifier.safetensors
""",
    ),
    "edit": (
        f"{SAMPLED} --prompt five --to six",
        OF_PAIRS + """
--reweight: six=2
--silence: six
--cross-steps: 0 0.3
--self-steps: 0 1
--pooled-steps: 0 1
--blend: six
--blend-threshold: 0.9 | --blend six
--show-attention:
--init-img: first.png
--resize: | --init-img large.png
--null-text: | --init-img first.png
--corrections: 0 | --init-img first.png
--null-steps: 2 | --init-img first.png --null-text
--n_samples: 2
""",
    ),
    "interpolate": (
        f"{SAMPLED} --prompt five --to six --frames 3",
        OF_PAIRS + """
--seed-to: 9
--frames: 2
--per-second: 2
--batch-size: 1
""",
    ),
    "convert": (
        "IN model.safetensors OUT out.safetensors",
        LOADING + """
--dtype: fp16
--format: compvis
--lora: lora.safetensors
--default: steps=7
--sigma-rel: 0.1
--rank: 1 | IN lora.safetensors
--lora-format: peft | IN lora.safetensors
""",
    ),
    "textual_inversion": (
        f"{SHORT} --train_data_dir instance --placeholder_token <its> --initializer_token five --num_vectors 2",
        LOADING + TUNING + """
--train_data_dir: class
--placeholder_token: <that>
--initializer_token: four
--num_vectors: 3
--learnable_property: style
--templates: templates.txt
--pull: 1
--format: a1111
""",
    ),
    "dreambooth": (
        f"{SHORT} --instance_data_dir instance --instance_prompt sks --class_prompt five --class_data_dir class",
        LOADING + TUNING + """
--instance_data_dir: third
--instance_prompt: zwx
--class_prompt: four
--class_data_dir: class2
--keep_prompt: six
--with_prior_preservation: | --class_prompt - --class_data_dir -
--prior_loss_weight: 0.5
--num_class_images: 6
--class_guidance_scale: 3 | --num_class_images 7
--sample_batch_size: 1 | --num_class_images 7
--crop: random
--center_crop: | --crop random
--enable_bucket: | --instance_data_dir third
--random_flip:
--mask: file
--train_text: none
--train_text_encoder:
--text_encoder_lr: 0.1
--train_layers: attention
--rank: 2
--lora_alpha: 1 | --rank 2
--lora_targets: feed_forward | --rank 2
--merge_lora: no | --rank 2
--lora_format: peft | --rank 2
--use_ema:
--ema_decay: 0.5
--max_grad_norm: 0.001
--adam_beta1: 0.5
--adam_beta2: 0.5
--adam_weight_decay: 9
--optimizer: adafactor
--use_8bit_adam:
--no_cache:
--dataloader_num_workers: 1
--validation_prompt: four
--lr_scheduler: cosine
""",
    ),
    "doctor": (
        "IN run --device cpu --images 20 --overfit 0",
        "--images: 30\n--overfit: 2\n--device: meta",
    ),
    "evaluate model": (
        f"--ckpt model.safetensors --device cpu --dataset digits {MEASURED} {NETWORKS} --steps 3",
        OF_GENERATED + OF_DATA_SETS + """
--wording: unseen
--clip: missing
--classifier: classifier.safetensors
--classifier-scale: 3 | --classifier classifier.safetensors
""",
    ),
    "evaluate emoji": (
        "--ckpt colour.safetensors --device cpu --data emoji --cache cache --n 10 --epochs 1 --batch-size 20 --steps 3",
        OF_GENERATED + "--ckpt: weaker.safetensors\n--n: 11\n--cache: other\n--epochs: 2",
    ),
    "evaluate scenes": (
        "--ckpt scenes.safetensors --device cpu --n 10 --batch-size 10 --data digits --judge judge.safetensors"
        " --steps 3",
        OF_GENERATED + "--ckpt: model.safetensors\n--n: 11\n--judge: missing",
    ),
    "evaluate autoencoder": (
        f"--ckpt model.safetensors --device cpu --dataset digits {MEASURED} {NETWORKS}",
        OF_REPORTS + OF_DATA_SETS + "--device: meta",
    ),
    "evaluate bits": (
        "--ckpt pixel.safetensors --device cpu --dataset digits --n 4",
        """
--ckpt: model.safetensors
--device: meta
--dataset: third
--n: 5
--batch-size: 2
--out: report.json
--data: missing
--seed: 1
--variance: large
""",
    ),
    "evaluate dreambooth": (
        f"--ckpt model.safetensors --before weaker.safetensors --device cpu --subject subject --n 10 {NETWORKS}"
        " --batch-size 10 --instance-prompt sks --class-prompt five",
        """
--ckpt: weaker.safetensors
--before: model.safetensors
--without: weaker.safetensors
--embedding: word.safetensors=sks
--subject: other
--instance-prompt: <it>
--class-prompt: four
--digit: 5
--n: 11
--batch-size: 5
--device: meta
--out: report.json
--image: a.png
--judge: missing
--features: missing
""",
    ),
    "evaluate statistics": (f"--outdir out {NETWORKS} --data mnist", OF_MNIST),
    "evaluate subjects": (f"--outdir out {NETWORKS} --data mnist", OF_MNIST),
}  # fmt: skip
# seconds each; the others minutes
QUICK = ("sample", "convert", "doctor", "evaluate bits", "evaluate statistics", "evaluate subjects")


def table_of(command: str) -> dict[str, tuple[list[str], str]]:
    """{option: (its value, what is beside it)}"""
    lines = [line.partition(":") for line in COMMANDS[command][1].split("\n") if line]
    return {name: (value.partition("|")[0].split(), value.partition("|")[2].strip()) for name, _, value in lines}


def options_of(command: str) -> list[str]:
    """The long option of each action that --help shows, but --allow, which test_rehearsal.py tries on every command."""
    name, _, sub = command.partition(" ")
    parser = parser_of(name)
    if sub:
        (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parser = commands.choices[sub]
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest not in ("help", "allow")]
    return [action.option_strings[0] for action in shown if action.option_strings]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_value_here(command):
    assert sorted(table_of(command)) == sorted(options_of(command))


LORAS: dict[str, Any] = {
    "model": ("lora.safetensors", {}),
    "pixel": ("pixel_lora.safetensors", {"targets": ["convolution"]}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with every file that the options name."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(1)
    for model, names in (
        (randomised(ldm.LatentDiffusion(**TINY)), ("model", "weaker")),
        (randomised(ldm.LatentDiffusion(**TINY_SCENES)), ("scenes",)),
        (build(schedule=SHORTER), ("pixel", "pixel_weaker")),
    ):
        model.eval().requires_grad_(False)
        for name in names:
            ldm.save(model, folder / f"{name}.safetensors")
            if name in LORAS:
                lora = copy.deepcopy(model)
                save_lora(folder / LORAS[name][0], learned(lora, **LORAS[name][1]), lora)
                model.model.diffusion_model.out[2].bias += 0.5
            if name == "model":
                model.first_stage_model.decoder.conv_out.bias += 0.5
    colour = copy.deepcopy(TINY)
    colour["first_stage_config"]["params"]["ddconfig"].update(in_channels=3, out_ch=3)
    ldm.save(randomised(ldm.LatentDiffusion(**colour)), folder / "colour.safetensors")
    write_packages(folder / "emoji")
    write_words(folder / "word.safetensors", LearnedWord("<it>", torch.randn(2, 32)), "diffusers")
    for name, path in small_networks(folder).items():
        path.rename(folder / f"{name}.safetensors")
    write_classifier(folder / "classifier.safetensors", {"name": "linear"}, in_channels=4, image_size=8)
    write_classifier(folder / "pixel_classifier.safetensors", {"name": "linear"}, in_channels=1, image_size=32)
    save_noise(folder)
    write_images(folder)
    write_mnist(folder / "mnist" / "MNIST" / "raw")
    write_mnist(folder / "digits" / "MNIST" / "raw", classes=10)
    write_run(folder / "run")
    (folder / "templates.txt").write_text("my own {}\n")
    for name, count in (
        ("class2", 5),
        ("third", 50),
        ("subject/heldout", 3),
        ("subject/others", 3),
        ("other/heldout", 3),
    ):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(0, 256, (32, 56 if name == "third" else 32), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / name / f"{i}.png")
    return folder


def write_images(folder: Path) -> None:
    """Init images, their masks, a folder of such a pair, prompts and a layout."""
    generator = torch.Generator().manual_seed(0)
    (folder / "pairs").mkdir()
    for name, side, box in (("first", 32, (16, 16)), ("second", 32, (16, 24)), ("large", 64, (16, 16))):
        noise = torch.randint(0, 256, (side, side), dtype=torch.uint8, generator=generator)
        mask = Image.new("L", (side, side))
        mask.paste(255, (0, 0, *box))
        for place in (folder, folder / "pairs") if name == "second" else (folder,):
            Image.fromarray(noise.numpy()).save(place / f"{name}.png")
            mask.save(place / f"{name}_mask.png")
    (folder / "earlier.png").write_bytes((folder / "large.png").read_bytes())
    (folder / "prompts.txt").write_text("1\n2\n")
    (folder / "layout.json").write_text("[]")


def write_mnist(folder: Path, classes: int = 5) -> None:
    """120 training and 40 test images: bars, every other one on a foot."""
    folder.mkdir(parents=True)
    for name, count in (("train", 120), ("t10k", 40)):
        images, labels = make_images(count)
        images[::2, 22:24, 6:22] = 255
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels * classes // 10))


@pytest.fixture
def outcome(inputs, few_triples, tmp_path, monkeypatch, capsys):
    """`outcome("convert", "--dtype fp16")` runs the command and gives all that can be seen of it."""
    calls: list[Any] = []

    def watch(owner: object, name: str, describe: Any) -> None:
        own = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, describe(*args, **kwargs)))
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(F, "conv2d", lambda x, *a, **k: (x.shape, x.dtype, x.is_contiguous()))
    watch(F, "linear", lambda x, *a, **k: (x.shape, x.dtype))
    watch(os, "replace", lambda old, new: Path(new).name)
    watch(torch.utils.data.DataLoader, "__init__", lambda self, *a, num_workers=0, **k: num_workers)
    watch(kernels, "_math_attention", lambda q, *a, **k: q.shape)
    monkeypatch.setattr("ldm.inference.compile.compile_calls", lambda *args, **kwargs: print("compiled"))
    monkeypatch.setattr("ldm.inference.compile.compile_ahead", lambda *args: None)  # of what was compiled
    monkeypatch.setattr("ldm.data.emoji.HELD_OUT_NAMES", inputs / "emoji" / "held_out.txt")
    monkeypatch.setattr("ldm.evaluation.commands.process_seconds", lambda path, prompt: {})  # other processes

    def run(command: str, options: dict[str, list[str]]) -> tuple:
        calls.clear()
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        for path in inputs.iterdir():
            if path.is_dir():  # the images that are generated beside them
                Path(path.name).mkdir()
                for file in path.rglob("*"):
                    place = Path(path.name) / file.relative_to(path)
                    place.mkdir() if file.is_dir() else place.symlink_to(file)
            else:
                Path(path.name).symlink_to(path)
        name, *sub = command.split()
        argv = [*sub]
        for option, values in options.items():
            argv += values if option in ("IN", "OUT") else [] if values == ["-"] else [option, *values]
        status: Any = 0
        try:
            importlib.import_module(f"ldm.commands.{name}").main(argv)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            status = 2
        except SystemExit as end:
            status = end.code
        finally:
            kernels.set_attention("auto")
        said = capsys.readouterr()
        assert status in (0, 2), said.err
        lines = [line for line in re.split(r"[\r\n]", said.err) if "it/s" not in line and "%|" not in line]
        files = {}
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in ("config.yaml", "resume.pt"):
                files[str(path.relative_to(folder))] = None if "tfevents" in path.name else path.read_bytes()
        text = re.sub(r'"seconds": \{[^}]*\}', "", said.out)  # how long it took
        files |= {name: re.sub(rb'"seconds": \{[^}]*\}', b"", c) for name, c in files.items() if name.endswith(".json")}
        kept = (folder / "out" / "resume.pt").exists()
        return status, text.replace(str(folder), ""), "".join(lines).replace(str(folder), ""), files, kept, tuple(calls)

    return run


def parsed(text: str) -> dict[str, list[str]]:
    """{option: values} of "--a 1 --b"."""
    found: dict[str, list[str]] = {}
    for word in text.split():
        if word.startswith("--") or word in ("IN", "OUT"):
            found[word] = []
        else:
            found[next(reversed(found))].append(word)
    return found


@pytest.mark.parametrize("command", [pytest.param(c, marks=() if c in QUICK else pytest.mark.full) for c in COMMANDS])
def test_it_makes_a_difference_or_is_refused(command, outcome):
    fixed, plain = parsed(COMMANDS[command][0]), {}
    ignored, broken = [], []
    for option, (value, beside) in table_of(command).items():
        base = fixed | parsed(beside)
        if beside not in plain:
            plain[beside] = outcome(command, base)
            assert plain[beside][0] == 0, plain[beside][:3]
            if command in ("txt2img", "img2img", "inpaint", "sample"):
                assert plain[beside] == outcome(command, base), "two runs of the same options differ"
        try:
            if outcome(command, base | {option: value}) == plain[beside]:
                ignored.append(option)
        except Exception as error:  # all are reported together
            broken.append((option, repr(error)[:300]))
    assert (ignored, broken) == ([], [])
