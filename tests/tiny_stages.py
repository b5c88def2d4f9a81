"""A configuration of every kind of stage with tiny networks, which trains in a second, and the files that it needs."""

import copy
import functools
import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, randomised
from PIL import Image
from test_ddgan_stage import PARAMS as GAN
from test_noisy_classifier_stage import NETWORK as NOISY
from test_pixel_diffusion import CONFIG as PIXEL

import ldm
from ldm.checkpoint.writing import save_file
from ldm.models.classifier import Judge

JUDGE = {"target": "ldm.models.classifier.Judge", "params": {"widths": [4, 4, 8]}}
DIGITS = {"target": "ldm.data.digits.Digits", "params": {"first": 16}}
SUBJECT = {"instance_data_dir": "instance", "instance_prompt": "a sks five", "class_prompt": "five"}
RATE = {"learning_rate": 1e-3}
POOLED = ("num_classes", "adm_in_channels")
WITHOUT_POOLED, UNCONDITIONAL = (
    {**TINY["unet_config"], "params": {k: v for k, v in TINY["unet_config"]["params"].items() if k not in left_out}}
    for left_out in (POOLED, (*POOLED, "context_dim", "use_spatial_transformer"))
)
# name -> the stage's class and arguments, and its data
STAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "autoencoder": (
        "ldm.training.autoencoder.AutoencoderStage",
        {**TINY["first_stage_config"]["params"], **RATE, "discriminator": {"input_nc": 1, "ndf": 4, "n_layers": 1}},
        DIGITS,
    ),
    "decoder": (
        "ldm.training.decoder.DecoderStage",
        {"first_stage": "first_stage", **RATE, "discriminator": {"input_nc": 1, "ndf": 4, "n_layers": 1}},
        DIGITS,
    ),
    "clip": (
        "ldm.training.clip.CLIPStage",
        {**RATE, "vision": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}}
        | {"width": 16, "layers": 1, "heads": 2, "projection_dim": 16, "merges_first": 10},
        DIGITS,
    ),
    "diffusion": (
        "ldm.training.diffusion.DiffusionStage",
        {"unet_config": TINY["unet_config"], "first_stage": "first_stage", "cond_stage": "cond_stage", **RATE}
        | {"schedule": {"name": "cosine"}, "defaults": TINY["defaults"], "preview_prompts": ["five"]},
        DIGITS,
    ),
    "folder": (
        "ldm.training.diffusion.DiffusionStage",
        {"unet_config": TINY["unet_config"], "first_stage": "first_stage", "cond_stage": "cond_stage", **RATE}
        | {"schedule": {"name": "cosine"}, "defaults": TINY["defaults"], "cache_latents": False},
        {"target": "ldm.data.folder.Folder", "params": {"root": "instance", "size": 32, "channels": 1, "caption": ""}},
    ),
    "classes": (
        "ldm.training.diffusion.DiffusionStage",
        {"unet_config": WITHOUT_POOLED, "first_stage": "first_stage", **RATE, "schedule": {"name": "cosine"}}
        | {"cond_stage": {"target": "ldm.conditioning.classes.ClassEmbedder", "params": {"embed_dim": 32}}}
        | {"defaults": TINY["defaults"], "preview_columns": 2},
        {"target": "ldm.data.folder.Folder", "params": {"root": "sorted", "size": 32, "channels": 1}},
    ),
    "unconditional": (
        "ldm.training.diffusion.DiffusionStage",
        {"unet_config": UNCONDITIONAL, "first_stage": "first_stage", "cond_stage": None, **RATE}
        | {"schedule": {"name": "cosine"}, "defaults": TINY["defaults"] | {"scale": 1.0}, "preview_columns": 2},
        {"target": "ldm.data.folder.Folder", "params": {"root": "instance", "size": 32, "channels": 1}},
    ),
    "pixel": ("ldm.training.pixel_diffusion.PixelDiffusionStage", {"model": PIXEL, **RATE, "previews": 2}, DIGITS),
    "classifier": ("ldm.training.classifier.ClassifierStage", {"network": JUDGE, **RATE}, DIGITS),
    "dreambooth": (
        "ldm.finetune.dreambooth.DreamBoothStage",
        {"ckpt": "model", **RATE, "instance_prompt": "a sks five", "class_prompt": "five", "preview_columns": 1},
        {"target": "ldm.inference.class_images.SubjectImages", "params": {**SUBJECT, "class_data_dir": "class"}},
    ),
    "distillation": (
        "ldm.finetune.distillation.DistillationStage",
        {"ckpt": "model", **RATE, "steps": 4, "consistency": {"stage_batches": 1}, "preview_prompts": ["five"]},
        DIGITS,
    ),
    "textual_inversion": (
        "ldm.finetune.textual_inversion.TextualInversionStage",
        {"ckpt": "model", **RATE, "word": "<it>", "initial": "five", "previews": 1},
        {"target": "ldm.data.folder.Folder", "params": {"root": "instance", "caption": ""}},
    ),
    "noisy_classifier": (
        "ldm.optional.noisy_classifier_stage.NoisyClassifierStage",
        {"network": {**NOISY, "params": {**NOISY["params"], "image_size": 32, "out_channels": 10}}, **RATE}
        | {"schedule": {"name": "cosine"}},
        DIGITS,
    ),
    "ddgan": ("ldm.optional.ddgan_stage.DenoisingGANStage", GAN, DIGITS),
}
SHARDS = {"root": "[0-2].tar", "size": 32, "channels": 1, "caption": ""}
ROWS = {"root": "rows", "size": 32, "channels": 1, "caption": ""}
STAGES["rows"] = (*STAGES["folder"][:2], {"target": "ldm.data.hugging_face.HuggingFace", "params": ROWS})
STAGES["shards"] = (*STAGES["folder"][:2], {"target": "ldm.data.shards.Shards", "params": SHARDS})


def write_inputs(folder: Path) -> None:
    """Write the checkpoints and images that the configurations name, by paths relative to the folder."""
    made, random_state = _inputs()
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    torch.set_rng_state(random_state)


@functools.cache  # made once: it takes 50 times as long as to copy them
def _inputs() -> tuple[TemporaryDirectory, torch.Tensor]:
    """Return a folder of these files, and torch's random state after they were made."""
    torch.manual_seed(0)
    folder = Path((made := TemporaryDirectory(prefix="inputs-")).name)
    model = randomised(ldm.LatentDiffusion(**copy.deepcopy(TINY))).eval().requires_grad_(False)
    ldm.save(model, folder / "model")
    for name in ("first_stage", "cond_stage"):
        save_file(folder / name, getattr(model, f"{name}_model").state_dict(), TINY[f"{name}_config"])
    save_file(folder / "judge", Judge(**JUDGE["params"]).state_dict(), JUDGE)
    noise = np.random.default_rng(0)
    grey, counts = (32, 40), {"instance": 3, "class": 4, "sorted/cat": 2, "sorted/dog": 1, "faulty": 4}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        shape = (*grey, 4) if name == "faulty" else grey
        for i in range(count):
            Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)).save(folder / name / f"{i}.png")
    (folder / "faulty" / "damaged.png").touch()
    for name, images in (
        ("0", "instance/0.png"),
        ("1", "instance/1.png"),
        ("2", "instance/2.png"),
        ("faulty", "faulty/*"),
    ):
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for path in sorted(folder.glob(images)):
                shard.add(path, path.name)
    return made, torch.get_rng_state()


def write_rows(folder: Path) -> None:
    """Write images as data sets of Hugging Face's library, whose import takes seconds."""
    datasets = pytest.importorskip("datasets")
    for name, images in (("rows", "instance/*"), ("faulty_rows", "faulty/*")):
        paths = sorted(folder.glob(images))
        data = {"image": [path.read_bytes() for path in paths], "text": [path.name for path in paths]}
        parts = {"test": datasets.Dataset.from_dict(data).select([0, 1]), "train": datasets.Dataset.from_dict(data)}
        datasets.DatasetDict(parts).save_to_disk(folder / name)


def config_of(name: str, **settings: object) -> dict[str, Any]:
    """Return a run of two training steps, with a preview and a state to resume from after each, unless settings differ.

    settings: of the loop.
    """
    target, params, data = copy.deepcopy(STAGES[name])
    loop = {"steps": 2, "batch_size": 2, "log_every": 1, "preview_every": 1, "save_every": 1, "report_to": "none"}
    loop |= settings
    stage = {"target": target, "params": params}
    return {"name": name, "outdir": "out", "seed": 0, "stage": stage, "data": data, "loop": loop}
