"""Fixtures: a tiny latent diffusion model with random weights, as an object and as a checkpoint; a tiny MNIST."""

import copy
import gc
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from warm_python import WarmPython

TINY = {
    "unet_config": {
        "target": "ldm.models.unet.UNetModel",
        "params": {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 16,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "num_head_channels": 16,
            "use_spatial_transformer": True,
            "context_dim": 32,
            "num_classes": "sequential",
            "adm_in_channels": 24,
            "legacy": False,
            "norm_groups": 8,
        },
    },
    "first_stage_config": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 4,
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 32,
                "in_channels": 1,
                "out_ch": 1,
                "ch": 8,
                "ch_mult": [1, 1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
                "norm_groups": 4,
            },
        },
    },
    "cond_stage_config": {
        "target": "ldm.conditioning.text.TextEncoder",
        "params": {
            "layout": "openclip",
            "width": 32,
            "layers": 1,
            "heads": 2,
            "activation": "gelu",
            "vocab_size": 514 + 2,
            "context_length": 16,
            "projection_dim": 24,
            "pooled": True,
            "tokenizer": {"merges": ["f i", "v e</w>"]},
        },
    },
    "schedule": {"name": "cosine"},
    "prediction": "v",
    "defaults": {"height": 32, "width": 32, "steps": 4, "scale": 2.0},
}

FROZEN = pytest.StashKey[int]()  # how many modules were imported when `pytest_runtest_setup` last looked


def refused(match: str, function: Callable, *args, error: type[Exception] = ValueError, **options) -> None:
    """Check that the call raises `error` with a message in which `match` is found."""
    with pytest.raises(error, match=match):
        function(*args, **options)


def pytest_configure(config: pytest.Config) -> None:
    os.fsync = lambda file: None  # for power cuts, which tests do not survive either: it waits for the disk
    if getattr(config.option, "numprocesses", None):  # one thread each: threads of several processes slow each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:  # this process collects tests: of its imports nothing is garbage, and looking for some takes a third as long
        gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.set_threshold(20_000, 50, 100)  # networks are made of thousands of objects, few of them in cycles


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep the garbage collector off the million objects of collected tests and of modules, whenever many are imported.

    accelerate has it look through all there are at the end of every training, which would take half a second.
    """
    if len(sys.modules) > item.config.stash.get(FROZEN, 0) + 100:
        item.config.stash[FROZEN] = len(sys.modules)
        gc.collect()
        gc.freeze()


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters that start at zero (the ends of residual branches) get weights, so that nothing is trivially equal."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.detach().any():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model


@contextmanager
def peers(*names: str) -> Iterator[None]:
    """Skip the test when one of these packages refuses the installed version of another; `pytest -rs` lists the reason.

    Only calls of the packages themselves belong inside. Any other error, a missing package included, fails the test.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        refused = isinstance(error, ImportError) or "version" in str(error)
        missing = isinstance(error, ModuleNotFoundError) and error.name in names
        if missing or not refused or not any(name in str(error).lower() for name in names):
            raise
        pytest.skip(f"{' and '.join(f'{name} {version(name)}' for name in names)} do not work together: {error}")


def pixels(images) -> np.ndarray:
    """The 8-bit levels of PIL images of one size, in a type with room for differences: (b, h, w) or (b, h, w, c)."""
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.fixture(scope="session")
def tiny_model():
    from ldm.latent_diffusion import LatentDiffusion

    torch.manual_seed(0)
    return randomised(LatentDiffusion(**TINY)).eval().requires_grad_(False)


@pytest.fixture
def model(tiny_model):
    """The tiny model as a copy, which a test may change."""
    return copy.deepcopy(tiny_model)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory) -> Path:
    from ldm.saving import save

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def tiny_parts(tiny_model, tmp_path_factory) -> dict[str, str]:
    """The tiny model's autoencoder and text encoder as checkpoints: arguments of `DiffusionStage`."""
    from ldm.checkpoint.writing import save_file

    paths = {name: tmp_path_factory.mktemp("parts") / name for name in ("first_stage", "cond_stage")}
    for name, path in paths.items():
        save_file(path, getattr(tiny_model, f"{name}_model").state_dict(), TINY[f"{name}_config"])
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs code in a process of its own that starts with torch imported."""
    python = WarmPython()
    yield python
    python.close()


@pytest.fixture(scope="module")
def no_hub() -> Iterator[None]:
    """Lets the libraries of Hugging Face ask nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def few_triples(monkeypatch) -> None:
    """Validation on 40 triples of image, timestep and noise in place of 260, whose number is tested elsewhere."""
    monkeypatch.setattr("ldm.training.denoising.TRIPLES", 40)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder with a tiny text encoder in transformers' layout."""
    from compvis_models import clip_folder

    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


def save_noise(folder: Path) -> dict[str, str]:
    """Three images of a subject and five of its class, of noise -> their folders, by the names of DreamBooth's data."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("instance", 3), ("class", 5)):
        (folder / name).mkdir()
        for i in range(count):
            noise = torch.randint(0, 255, (32, 32), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / name / f"{i}.png")
    return {"instance_dir": str(folder / "instance"), "class_dir": str(folder / "class")}


@pytest.fixture
def mnist(tmp_path) -> Path:
    """Sixteen images in MNIST's files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.zeros((16, 28, 28), np.uint8)
    images[:, 4:24, 12:16] = np.random.default_rng(0).integers(200, 256, (16, 20, 4))
    labels = np.arange(16, dtype=np.uint8) % 10
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 16, 28, 28) + images.tobytes())
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 16) + labels.tobytes())
    return tmp_path
