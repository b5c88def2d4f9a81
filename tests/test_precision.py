"""Each precision: which part is in which dtype, how far its images are from float32's, and what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

import ldm
from ldm.checkpoint.compvis import single_file
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.writing import save_file
from ldm.commands.txt2img import main as txt2img
from ldm.conditioning.words import token_embedding
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.finetune.lora import DEFAULT_TARGETS, Adapter, places, select
from ldm.finetune.lora_files import save_lora
from ldm.inference import precision
from ldm.inference import widened as widened_weights
from ldm.inference.generate import default_recipe, generate_again, generate_run
from ldm.inference.precision import DTYPES, precision_of, set_precision
from ldm.input_files import read_yaml
from ldm.latent_diffusion import LatentDiffusion

WORDS = "zero one two three four five six seven eight nine".split()


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_of_the_parts(model, name):
    set_precision(model, name, device="meta")  # where float16 is allowed without a GPU
    dtype = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    for network in (model.model, model.cond_stage_model):
        assert {p.dtype for p in network.parameters()} == {dtype}
    assert {p.dtype for p in model.first_stage_model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.model.parameters()} == {"meta"}
    assert precision_of(model) == name


@pytest.fixture(scope="module")
def exact_digits() -> np.ndarray:
    """The shipped model's images of the ten digits in float32."""
    return np.stack(ldm.load(device="cpu").generate([f"a handwritten digit {word}" for word in WORDS])).astype(int)


# Difference of a pixel from float32, in levels of 255. Measured over 40 digits of 20 steps: bf16 0.08 in the mean and
# 24 at most (on the edge of a stroke that moved), autocast 0.06 and 12; 94 and 95 % of the pixels are the same.
@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_images_in_half_precision(exact_digits, name):
    model = ldm.load(device="cpu")
    set_precision(model, name)
    images = model.generate([f"a handwritten digit {word}" for word in WORDS])
    difference = np.abs(np.stack(images) - exact_digits)
    assert 0 < difference.mean() < 0.3 and difference.max() <= 48


def test_autocast_is_torchs_but_for_the_first_stage(model):
    x, t, latents = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu"):
        cond = model.condition(["a one", "a two"])
        expected = model.apply_model(x, t, cond)
    pixels = model.decode(latents)
    exact = model.apply_model(x, t, model.condition(["a one", "a two"]))
    set_precision(model, "autocast")
    found = model.condition(["a one", "a two"])
    assert all(torch.equal(found[key], cond[key]) for key in cond)
    assert torch.equal(model.apply_model(x, t, found), expected) and not torch.equal(expected, exact)
    assert torch.equal(model.decode(latents), pixels)
    other = copy.deepcopy(model)  # computes with its own weights
    other.model.diffusion_model.out[2].weight.zero_()
    assert torch.equal(model.apply_model(x, t, found), expected)
    assert not torch.equal(other.apply_model(x, t, found), expected)
    set_precision(model, "full")
    assert torch.equal(model.apply_model(x, t, model.condition(["a one", "a two"])), exact)


@pytest.mark.parametrize("name", ["full", "bf16", "autocast"])
@pytest.mark.parametrize(("stored", "traced"), [(torch.float16, False), (torch.bfloat16, False), (torch.float16, True)])
def test_half_precision_weights_that_wait_make_the_same_images(model, monkeypatch, name, stored, traced):
    """Byte for byte those of weights that are converted at once; afterwards the weights are as they were."""
    model.to(stored)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    widened = copy.deepcopy(model).float()
    set_precision(widened, name)
    monkeypatch.setattr(precision, "MANY", 0)
    monkeypatch.setattr(widened_weights, "LARGE", 300)
    undo = set_precision(model, name, as_stored=True, traced=traced)
    own = {p.dtype for network in model.children() for p in network.parameters() if p.numel() >= 300}
    assert precision_of(model) == name and stored in own
    image = Image.fromarray(np.full((32, 32), 99, np.uint8))
    for options in ({}, {"image": image, "strength": 0.5}):
        images = [m.generate(["a one", "a (bold:1.2) two"], seed=3, **options) for m in (model, widened)]
        assert all(np.array_equal(a, b) for a, b in zip(*images, strict=True))
    if name == "full":  # from then on in another precision
        for m in (model, widened):
            set_precision(m, "bf16")
        assert np.array_equal(*(m.generate(["a one"])[0] for m in (model, widened)))
    undo.close()
    after = model.state_dict()
    assert all(tensor.dtype == stored and torch.equal(tensor, before[key]) for key, tensor in after.items())


def add_lora_and_word(model: LatentDiffusion, folder: Path) -> list[str]:
    """Write a LoRA and a word for the model; return the options that use them."""
    found, generator = places(model), torch.Generator().manual_seed(0)
    adapters = {}
    for name in select(list(found), DEFAULT_TARGETS):  # the model may be on the meta device
        out, width = found[name].weight.shape
        up = 0.1 * torch.randn(out, 2, generator=generator)
        adapters[name] = Adapter(torch.randn(2, width, generator=generator) / 2, up, 2.0)
    save_lora(folder / "lora.safetensors", adapters, model)
    width = token_embedding(model.cond_stage_model).embedding_dim
    write_words(folder / "word.safetensors", LearnedWord("<it>", 0.1 * torch.randn(2, width)), "diffusers")
    return ["--lora", f"{folder}/lora.safetensors:0.7", "--embedding", f"{folder}/word.safetensors"]


@pytest.mark.parametrize("name, most", [("full", 1), ("bf16", 24)])
def test_loras_and_words_beside_weights_that_wait(model, tmp_path, monkeypatch, name, most):
    """As with weights that are converted at once, but for rounding; the LoRA is not merged into half precision."""
    added = add_lora_and_word(model, tmp_path)
    ldm.save(model, tmp_path / "half.safetensors", torch.float16)
    monkeypatch.setattr(widened_weights, "LARGE", 300)
    options = ["--ckpt", f"{tmp_path}/half.safetensors", "--prompt", "a <it>", "--n_samples", "2", "--device", "cpu"]
    options += ["--steps", "4", "--precision", name, "--outdir"]
    images = {}
    for way, many, more in (("wide", 2**28, added), ("lean", 0, added), ("without", 2**28, added[2:])):
        monkeypatch.setattr(precision, "MANY", many)
        txt2img([*options, f"{tmp_path}/{way}", *more])
        files = sorted((tmp_path / way / "samples").iterdir())
        images[way] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert np.abs(images["lean"] - images["wide"]).max() <= most < np.abs(images["without"] - images["wide"]).max()


PEAK = """
import atexit, sys
from benchmarks.common import process_memory
atexit.register(lambda: print(process_memory()["VmHWM"]))
"""
LEAN = f"""{PEAK}
from ldm.commands.txt2img import main
main(sys.argv[1:])
"""
PLAIN = f"""{PEAK}
import ldm
ldm.load(sys.argv[1], "cpu").generate(["a"], steps=2, width=64, height=64)[0].save(sys.argv[2])
"""


@pytest.mark.full
@pytest.mark.parametrize("name, changed", [("full", False), ("bf16", False), ("full", True)])
def test_memory_of_a_half_precision_stable_diffusion_on_a_cpu(tmp_path, name, changed):
    """At most 1.6 times the file, where the plain way takes 3.3 times; and in full precision the same image.

    changed: with a LoRA and a learned word, where an image of another model is not to be compared.
    """
    config = from_compvis(read_yaml(Path(__file__).parents[1] / "configs/stable-diffusion/v1-inference.yaml"))
    with torch.device("meta"):
        model = LatentDiffusion(**config["params"])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    state = {name: torch.randn(shape).half() * max(1, shape[:1].numel()) ** -0.5 for name, shape in shapes.items()}
    file = tmp_path / "sd1.safetensors"
    save_file(file, single_file(state, config)[0])
    del state
    options = ["--prompt", "a <it>" if changed else "a"]
    options += ["--steps", "2", "--W", "64", "--H", "64", "--skip_grid", "--device", "cpu"]
    options += ["--precision", name, "--ckpt", str(file), "--outdir", str(tmp_path)]
    options += add_lora_and_word(model, tmp_path) if changed else []
    found = {}
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for way, *arguments in (("lean", LEAN, *options), ("plain", PLAIN, str(file), "x.png")):
        command = [sys.executable, "-c", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=paths, check=True)
        found[way] = int(done.stdout.splitlines()[-1]) / file.stat().st_size
    print(f"peak of resident memory, in sizes of the file: {found}")
    assert found["lean"] < 1.6 and found["plain"] > 2.5
    images = [Image.open(tmp_path / path) for path in ("samples/00000.png", "x.png")]
    assert name != "full" or changed or images[0].tobytes() == images[1].tobytes()


def test_sampler_state_stays_in_float32(model):
    set_precision(model, "bf16")
    dtypes = set()
    model.generate(["a one"], callback=lambda step: dtypes.update((step.x.dtype, step.x0.dtype)))
    assert dtypes == {torch.float32}


def test_what_is_refused(model):
    refused("precision 'half' is unknown: it is one of full, bf16, fp16, autocast", set_precision, model, "half")
    refused("precision fp16 on a CPU .* use bf16", set_precision, model, "fp16")
    model.cond_stage_model = None  # a model without text is converted, too
    set_precision(model, "bf16")
    set_precision(model, "bf16")
    assert precision_of(model) == "bf16"
    refused("rounded to bf16 already: load it again for precision full", set_precision, model, "full")


@pytest.mark.parametrize("name", ["bf16", "autocast"])
def test_a_recipe_says_the_precision_and_brings_it_back(model, name):
    rounded = copy.deepcopy(model)
    set_precision(rounded, name)
    recipe = default_recipe(rounded, "tiny", prompt="a one", steps=3)
    assert recipe.precision == name and default_recipe(model, "tiny").precision == "full"
    ((_, image, _),) = generate_run(rounded, [recipe])
    ((_, again, _),) = generate_again(model, recipe)  # which is in full precision until then
    assert np.array_equal(np.asarray(image), np.asarray(again))
    assert precision_of(model) == name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name, mean, most", [("bf16", 0.3, 48), ("fp16", 0.05, 12), ("autocast", 0.05, 12)])
def test_images_on_a_gpu(name, mean, most):
    prompts = [f"a handwritten digit {word}" for word in WORDS]
    exact = np.stack(ldm.load(device="cuda").generate(prompts)).astype(int)
    model = ldm.load(device="cpu")
    set_precision(model, name, "cuda")
    difference = np.abs(np.stack(model.to("cuda").generate(prompts)) - exact)
    assert difference.mean() < mean and difference.max() <= most
