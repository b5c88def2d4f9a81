"""DreamBooth on Stable Diffusion XL: the UNet takes each image's own size and crop, and adapters are files for it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from PIL import Image
from safetensors.torch import load_file
from tiny_sdxl import build_pipeline, our_images
from torch.utils.data import default_collate as collate

import ldm
from ldm.data.dreambooth import DreamBooth
from ldm.data.transforms import Transform
from ldm.finetune.dreambooth import DreamBoothStage
from ldm.finetune.lora_files import merge_lora
from ldm.training.diffusion import LatentStage
from ldm.training.loop import train
from ldm.training.objective import Objective

SHAPES = {"subject": [(80, 60), (32, 48), (32, 32)], "class": [(32, 32), (64, 40), (32, 32)]}  # (width, height)


@pytest.fixture(scope="module")
def theirs(no_hub, tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> dict:
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, shapes in SHAPES.items():
        (root / name).mkdir()
        for i, (width, height) in enumerate(shapes):
            pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    classes = {"class_dir": str(root / "class"), "class_images": {f"{i}.png": "a bag" for i in range(3)}}
    return {"instance_dir": str(root / "subject"), "instance_prompt": "a photo of a sks bag", **classes}


def stage_of(theirs, **settings) -> DreamBoothStage:
    prompts = {"instance_prompt": "a photo of a sks bag", "class_prompt": "a bag"}
    return DreamBoothStage(str(theirs[1]), **{"resolution": 32, "learning_rate": 1e-3, **prompts, **settings})


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, (80, 60), [60, 80, 0, 5, 32, 32]),  # scaled to 43 x 32, of which 5 columns on the left are cut off
        ({}, (30, 100), [100, 30, 37, 0, 32, 32]),
        ({"resize": "none"}, (80, 60), [60, 80, 14, 24, 32, 32]),
        ({"resize": "exact"}, (80, 60), [60, 80, 0, 0, 32, 32]),
        ({"buckets": [(32, 32), (40, 24)]}, (100, 60), [60, 100, 0, 0, 24, 40]),
    ],
)
def test_sizes_of_an_image(settings, size, expected):
    transform = Transform(32, **settings)
    assert transform.sizes(*size, 0, 0, transform.shape(*size)).tolist() == expected


def test_a_random_crop_is_where_its_sizes_say():
    """An image of which each pixel says where it is, at its own scale."""
    columns, rows = np.meshgrid(np.arange(60), np.arange(50))
    image = Image.fromarray(np.stack([columns, rows, rows], -1).astype(np.uint8))
    transform = Transform(16, crop="random", resize="none")
    found = set()
    for epoch in range(5):
        height, width, top, left, *shape = transform.sizes(60, 50, epoch, 3, (16, 16)).tolist()
        corner = (transform(image, epoch, 3)[:, 0, 0] + 1) * 127.5
        assert [height, width, *shape] == [50, 60, 16, 16] and corner.round().tolist() == [left, top, top]
        found.add((top, left))
    assert len(found) > 3


@pytest.mark.parametrize("cache", [True, False])
def test_the_loss_by_diffusers(theirs, subject, cache):
    """The mean squared error of diffusers' UNet, given the same noise and the size and crop of each image."""
    pipe = theirs[0]
    stage = stage_of(theirs, cache=cache, prior_weight=0.3)
    assert stage.reads == ("image", "caption", "sizes")
    data = stage.prepare(DreamBooth([subject], 32, reads=stage.reads))
    batch = collate([data[0], data[1]])
    assert batch["sizes"].tolist() == [[60, 80, 0, 5, 32, 32], [48, 32, 8, 0, 32, 32]]
    assert batch["class_sizes"].tolist() == [[32, 32, 0, 0, 32, 32], [40, 64, 0, 10, 32, 32]]
    torch.manual_seed(5)
    loss, values = stage.loss(batch)
    torch.manual_seed(5)
    z, given = torch.cat([stage.latents(batch), stage.latents(batch, "class_")]), (stage.share, 2)
    t, noise = stage.objective.sample_timesteps(z, *given), stage.objective.sample_noise(z, *given)
    ab = stage.latent_diffusion.schedule.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
    embeds, _, pooled, _ = pipe.encode_prompt(batch["caption"] + batch["class_caption"])
    added = {"text_embeds": pooled, "time_ids": torch.cat([batch["sizes"], batch["class_sizes"]])}
    with torch.no_grad():
        x = ab.sqrt() * z + (1 - ab).sqrt() * noise
        found = pipe.unet(x, t, embeds, added_cond_kwargs=added).sample
    errors = F.mse_loss(found, noise, reduction="none").mean(dim=(1, 2, 3))
    expected = (errors[0] + errors[1]) / 2, (errors[2] + errors[3]) / 2
    torch.testing.assert_close(values["instance_loss"], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected[0] + 0.3 * expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_text", ["none", "all"])
def test_adapters_are_trained_and_loaded(theirs, subject, train_text, tmp_path):
    file = tmp_path / "lora.safetensors"
    stage = {
        "ckpt": str(theirs[1]),
        "resolution": 32,
        "learning_rate": 1e-2,
        "lora": {"rank": 2},
        "lora_file": str(file),
    }
    stage |= {"train_text": train_text, "text_learning_rate": 1e-2, "previews": ["a bag"], "preview_columns": 1}
    data = {"instance_data_dir": subject["instance_dir"], "instance_prompt": "a sks bag", "class_data_dir": "unused"}
    loop = {"steps": 2, "batch_size": 2, "ema": 0.0, "report_to": "none", "preview_every": 2, "precision": "fp32"}
    config = {
        "stage": {"target": "ldm.finetune.dreambooth.DreamBoothStage", "params": stage},
        "data": {"target": "ldm.inference.class_images.SubjectImages", "params": data},
        **{"name": "run", "outdir": str(tmp_path), "seed": 1, "loop": loop},
    }
    trained = train(config)
    parts = {name.split("_text_model")[0] for name in load_file(file) if "_text_model" in name}
    assert parts == ({"lora_te1", "lora_te2"} if train_text == "all" else set())
    model, merged = ldm.load(theirs[1], device="cpu"), ldm.load(trained, device="cpu")
    before, after = our_images(model), our_images(merged)
    assert np.abs(after - before).max() > 1e-3
    merge_lora(model, file)
    np.testing.assert_allclose(our_images(model), after, atol=1e-4)


def test_what_cannot_be_trained_is_refused(theirs):
    model = ldm.load(theirs[1], device="cpu")
    adam = {"lr": 1e-3}
    latents = (True, None, False, None, "sample", None, 1)
    refused(
        "Stable Diffusion XL is tuned by DreamBooth and LoRA alone", LatentStage, Objective(model), *latents, **adam
    )
    model.cond_stage_model.sizes = ("original_size", "crop", "aesthetic_score")
    refused("refiner takes an aesthetic score, which images here do not have", DreamBoothStage, model, 1e-3)
