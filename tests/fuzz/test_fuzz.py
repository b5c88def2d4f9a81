"""Mutated files of every format that is read: each is loaded, or refused in one sentence, quickly and in little memory.

Nothing in them runs. 20 of each by default; `pytest -m full tests/fuzz` makes thousands. A failure names its seed.
"""

import copy
import gc
import io
import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzz.mutations import mutate_bytes, mutate_value, nothing_runs
from PIL import Image

import ldm
from benchmarks.common import process_memory, restart_peak
from ldm.checkpoint.file import load_file
from ldm.checkpoint.writing import save_file
from ldm.cli import shorten_values
from ldm.data.folder import Folder
from ldm.data.image_files import read_image
from ldm.data.image_formats import READ
from ldm.finetune import lora
from ldm.finetune.embedding_files import read_words
from ldm.finetune.embeddings import apply_embedding
from ldm.finetune.lora_files import load_lora, save_lora
from ldm.inference.again import read_recipe
from ldm.inference.recipe import save_image
from ldm.input_files import CONFIGS
from ldm.program import sentence
from ldm.training.config import read_configs
from ldm.training.loop_settings import LoopSettings
from ldm.util import Unfilled, instantiate_from_config

SECONDS, MEGABYTES = 5, 1500  # of CPU time for one file; of memory, of all
PARAMETERS = "a five\nNegative prompt: blur\nSteps: 20, Sampler: dpmpp_2m, CFG scale: 3.0, Seed: 7, Size: 32x32"


def safetensors(files, chance):
    return mutate_bytes(files["tiny"].read_bytes(), chance, first=4000), lambda path: ldm.load(path, device="cpu")


def header(files, chance):
    config, state = load_file(files["tiny"])
    save_file(files["folder"] / "made", state, mutate_value(config, chance))
    return (files["folder"] / "made").read_bytes(), lambda path: ldm.load(path, device="cpu")


def ckpt(files, chance):
    name = chance.choice(("zip", "legacy"))
    return mutate_bytes(files[name].read_bytes(), chance, first=3000), lambda path: ldm.load(path, device="cpu")


def lora_file(files, chance):
    content = mutate_bytes(files["lora"].read_bytes(), chance, first=8000)
    return content, lambda path: load_lora(path, files["model"])


def embedding(files, chance):
    content = mutate_bytes(files["embedding"].read_bytes(), chance, first=200)
    return content, lambda path: read_words(path, "zzz") and apply_embedding(files["copy"](), path, "zzz")


def yaml_file(files, chance):
    def build(path):
        (config,) = read_configs([str(path)])
        LoopSettings.of(config)
        with Unfilled():
            instantiate_from_config(config["stage"])

    config = yaml.safe_load((CONFIGS / "digits" / "autoencoder.yaml").read_text())
    text = yaml.safe_dump(mutate_value(config, chance), allow_unicode=False)
    return (text.encode() if chance.random() < 0.7 else mutate_bytes(text.encode(), chance)), build


def recipe(files, chance):
    text = mutate_bytes(PARAMETERS.encode(), chance).decode(errors="replace")
    save_image(Image.new("L", (8, 8)), files["folder"] / "made.png", text)
    content = (files["folder"] / "made.png").read_bytes()
    return (content if chance.random() < 0.7 else mutate_bytes(content, chance)), read_recipe


def captions(files, chance):
    row = mutate_value([{"file_name": "a.png", "text": "a caption"}], chance)
    text = "\n".join(map(json.dumps, row)) if isinstance(row, list) and chance.random() < 0.9 else "[" * 10**5
    content = text.encode() if chance.random() < 0.7 else mutate_bytes(text.encode(), chance)

    def read(path):
        (path.parent / "metadata.jsonl").write_bytes(path.read_bytes())
        Folder(path.parent, 8, channels=1, caption="none")

    return content, read


def image(files, chance):
    return mutate_bytes(chance.choice(files["images"]), chance, first=200), read_image


FORMATS = (safetensors, header, ckpt, lora_file, embedding, yaml_file, recipe, captions, image)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("fuzz")
    found = {"folder": folder, "tiny": tiny_checkpoint, "model": tiny_model, "copy": lambda: copy.deepcopy(tiny_model)}
    state = {name: tensor.clone() for name, tensor in tiny_model.first_stage_model.state_dict().items()}
    for name, zipped in (("zip", True), ("legacy", False)):
        found[name] = folder / f"{name}.ckpt"
        torch.save({"state_dict": state, "epoch": 3}, found[name], _use_new_zipfile_serialization=zipped)
    adapters = lora.attach(found["copy"](), 2, 2.0, ("to_q",), 0)
    found["lora"], found["embedding"] = folder / "lora.safetensors", folder / "word.pt"
    save_lora(found["lora"], adapters, tiny_model)
    torch.save({"string_to_param": {"*": torch.ones(1, 32)}, "name": "zzz"}, found["embedding"])
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    Image.init()
    found["images"] = []
    for name in sorted(READ.keys() & Image.SAVE.keys()):
        pixels.save(buffer := io.BytesIO(), format=name)
        found["images"].append(buffer.getvalue())
    found["images"].append(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    return found


def run_one(make, files, seed: int, folder: Path) -> None:
    """Read one mutated file; whatever is wrong with it must be a ValueError or OSError with a sentence."""
    content, read = make(files, random.Random(f"{make.__name__} {seed}"))
    (folder / "a.png").write_bytes(content)
    begin = time.process_time()
    try:
        with nothing_runs():
            read(folder / "a.png")
    except (ValueError, OSError) as error:
        text = shorten_values(sentence(error))
        assert 10 < len(text) < 4000 and "Traceback" not in text
    assert time.process_time() - begin < SECONDS


def run_many(make, files, folder: Path, seeds) -> None:
    restart_peak()
    before = process_memory()["VmHWM"]
    for seed in seeds:
        try:
            run_one(make, files, seed, folder)
        except BaseException as error:
            error.add_note(f"{make.__name__}, seed {seed}") if hasattr(error, "add_note") else print("seed", seed)
            raise
    gc.collect()
    assert (process_memory()["VmHWM"] - before) / 2**20 < MEGABYTES
    assert not (Path.cwd() / "hit").exists()


def test_the_guard_notices_a_process():
    with pytest.raises(AssertionError, match="subprocess.Popen"), nothing_runs():
        subprocess.run(["true"], check=True)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_file_is_read_or_refused_in_a_sentence(make, files, tmp_path):
    run_many(make, files, tmp_path, range(20))


@pytest.mark.full
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_mutated_files(make, files, tmp_path):
    run_many(make, files, tmp_path, range(100, 1600))
