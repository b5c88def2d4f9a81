"""The options that scripts share: what they load, and that together they change no image beyond rounding."""

import argparse
import copy

import numpy as np
import pytest
import torch
from conftest import refused
from lora_models import learned

import ldm
from ldm.changes import changes_of
from ldm.cli import Parser
from ldm.diffusion.denoiser import PREDICTIONS
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.finetune.embeddings import apply_embedding
from ldm.finetune.lora import detach
from ldm.finetune.lora_files import merge_lora, save_lora
from ldm.inference import offload, precision
from ldm.inference.generate import default_recipe, generate_run
from ldm.inference.options import LOADING, add_model_options, image_parser, load_model
from ldm.inference.recipe import plan
from ldm.models import kernels


def parse(*options: object) -> argparse.Namespace:
    parser = Parser()
    add_model_options(parser)
    return parser.parse_args([str(option) for option in options])


@pytest.fixture(autouse=True)
def default_attention():
    yield
    kernels.set_attention("auto")


def drawn(model) -> np.ndarray:
    return np.stack(model.generate(["a one", "a two"], steps=3)).astype(int)


@pytest.fixture
def expected(tiny_model) -> np.ndarray:
    return drawn(tiny_model)


@pytest.fixture
def load(tiny_checkpoint):
    return lambda *options: load_model(parse("--ckpt", tiny_checkpoint, "--device", "cpu", *options))


def test_options_name_what_there_is():
    parser = Parser()
    add_model_options(parser)
    choices = {action.dest: action.choices for action in parser._actions if action.choices is not None}
    assert choices == {
        "prediction": PREDICTIONS,
        "precision": tuple(precision.DTYPES),
        "attention": kernels.BACKENDS,
        "offload": offload.WAYS,
    }


# Levels of 255 that a pixel may change. 1: a value on the edge between two. bf16: with random weights, which draw no
# digits, measured 9 and, all together, 12; see test_precision for the model that ships.
SETS = {
    "none": ([], 0),
    "attention": (["--attention", "math"], 1),
    "channels last": (["--channels-last"], 1),
    "slicing": (["--vae-slicing"], 1),
    "tiling": (["--vae-tiling", 16], 1),
    "offload": (["--offload", "swap"], 0),
    "bf16": (["--precision", "bf16"], 30),
    "all": ([*"--precision autocast --attention math --channels-last --vae-tiling 16 --offload cpu".split()], 30),
}


def test_loras_at_their_strengths_and_learned_words(load, tiny_checkpoint, tmp_path):
    """Several of both: the images are those of the library, and the recipe's changes name all."""
    model, word = ldm.load(tiny_checkpoint, device="cpu"), tmp_path / "word.safetensors"
    for name, seed in (("a", 0), ("b", 1)):
        adapters = learned(model, targets=("attention", "text"), seed=seed)
        detach(adapters)
        save_lora(tmp_path / f"{name}.safetensors", adapters, model)
        merge_lora(model, tmp_path / f"{name}.safetensors", {"a": 0.5, "b": 1.0}[name])
    write_words(word, LearnedWord("<it>", torch.randn(2, 32, generator=torch.Generator().manual_seed(0))), "diffusers")
    apply_embedding(model, word)
    loras = ["--lora", f"{tmp_path / 'a.safetensors'}:0.5", "--lora", tmp_path / "b.safetensors"]
    found = load(*loras, "--embedding", word)
    assert [str(change) for change in changes_of(found)] == [str(change) for change in changes_of(model)]
    kinds = [(change.kind, change.name, change.strength) for change in changes_of(found)]
    assert kinds == [("lora", "a", 0.5), ("lora", "b", 1.0), ("words", "<it>", None)]
    prompts = ["a <it>", "a one"]
    images = [np.stack(one.generate(prompts, steps=3)).astype(int) for one in (model, found)]
    assert abs(images[0] - images[1]).max() <= 1
    plain = np.stack(load().generate(prompts, steps=3)).astype(int)
    assert (abs(images[1] - plain).max(axis=(1, 2)) > 10).all()


@pytest.mark.parametrize("name", SETS)
def test_images_stay_what_they_are(load, expected, name):
    options, levels = SETS[name]
    model = load(*options)
    difference = np.abs(drawn(model) - expected)
    assert difference.max() <= levels and np.ptp(expected) > 20
    assert precision.precision_of(model) == {"bf16": "bf16", "all": "autocast"}.get(name, "full")


def test_a_broken_model_is_reported(tiny_model, tmp_path):
    ldm.save(tiny_model, tmp_path / "broken.safetensors")
    model = load_model(parse("--ckpt", tmp_path / "broken.safetensors", "--device", "cpu"))
    model.model.diffusion_model.out[2].weight.data[0] = torch.nan
    refused(
        "holds weights that are not finite.* of model.diffusion_model.out.2.weight", ldm.save, model, tmp_path / "x"
    )
    refused(r"an image is not finite", model.generate, ["a one"], steps=2)
    (recipe,) = plan(default_recipe(model, "broken", steps=2), ["a one"], 1, 1)
    refused(r"began in model.diffusion_model.out.2; its weights are not finite", list, generate_run(model, [recipe]))


def test_what_is_offloaded_is_not_on_the_device(load, tiny_checkpoint):
    # the meta device stands for a GPU, which can do float16
    args = parse("--ckpt", tiny_checkpoint, "--precision", "fp16", "--offload", "swap")
    args.device = "meta"
    model = load_model(args)
    found = {part: {p.device.type for p in getattr(model, part).parameters()} for part, _ in model.named_children()}
    assert found == {"model": {"meta"}, "cond_stage_model": {"cpu"}, "first_stage_model": {"cpu"}}
    assert model.condition(["a one"])["c_crossattn"].device.type == "meta"
    args.precision = args.offload = None
    model = load_model(args)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_ldm_load_is_given_what_was_given(monkeypatch, tiny_model, capsys):
    calls = []

    def load(path, device, dtype, **given):
        calls.append((path, device, given))
        model = copy.deepcopy(tiny_model)
        model.notes = ["it is taken to predict eps"]
        return model

    monkeypatch.setattr(ldm, "load", load, raising=False)
    load_model(parse())
    values = {
        "config": "c.yaml",
        "vae": "v.pt",
        "unet": "u.pt",
        "text_encoder": "t.pt",
        "prediction": "v",
        "vocab": "vocab.txt",
        "variant": "fp16",
    }
    options = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    load_model(parse("--ckpt", "some.ckpt", "--ema", *options))
    assert calls[0] == (None, "cpu", {})
    path, device, given = calls[1]
    assert str(path) == "some.ckpt" and device == "cpu"
    assert given.pop("ema") is True and {name: str(value) for name, value in given.items()} == values
    assert set(LOADING) == {"ema", *values}
    assert capsys.readouterr().err == "it is taken to predict eps\n" * 2


MISTAKES = {
    "device": (["--device", "gpu"], "device 'gpu' is not available"),
    "fp16": (["--precision", "fp16"], "precision fp16 on a CPU"),
    "tiles": (["--vae-tiling", "3"], "tiles of 3 pixels are too small"),
}


def test_a_device_without_numbers(load, capsys):
    with pytest.raises(SystemExit):
        load("--device", "meta")
    assert "'meta' holds no numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [("num_inference_steps", "steps", 3), ("guidance_scale", "scale", 3.0), ("cfg", "scale", 3.0),
     ("cfg-scale", "scale", 3.0), ("width", "width", 3), ("height", "height", 3),
     ("num_images_per_prompt", "n_samples", 3)],
)  # fmt: skip
def test_names_that_people_type(option, name, value, capsys):
    parser = image_parser("", "", "out")
    assert getattr(parser.parse_args([f"--{option}", "3"]), name) == value and f"--{option}" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{option}x", "3"])
    (shown,) = [a.option_strings[0] for a in parser._actions if a.dest == name and a.help != argparse.SUPPRESS]
    said = capsys.readouterr().err
    assert f"did you mean {shown}?" in said or option == "cfg"  # of which a mistake could be many names


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(load, name):
    options, message = MISTAKES[name]
    refused(message, load, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_xformers_without_a_gpu(load):
    refused("'xformers' needs a CUDA device", load, "--attention", "xformers")
