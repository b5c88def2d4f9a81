"""Aspect-ratio buckets: their shapes, what an image is cut to, and batches of one shape each."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_stages import STAGES, config_of, write_inputs

from ldm.data.buckets import bucket_shapes, nearest
from ldm.data.dreambooth import DreamBooth
from ldm.data.folder import Folder
from ldm.models.identity import IdentityFirstStage
from ldm.training.latents import encode_dataset
from ldm.training.loader import training_batches
from ldm.training.loop import train
from ldm.training.order import EpochBatches
from ldm.training.shapes import alike_batches, latent_statistics
from ldm.training.share import BatchShare


def test_shapes_at_stable_diffusions_size():
    """Those of kohya's scripts at 512 by steps of 64, from 256 to 1,024."""
    shapes = bucket_shapes(512, 64)
    upright = [(256, 1024), (320, 768), (384, 640), (448, 576)]
    assert sorted(shapes) == sorted([(512, 512), *upright, *((high, wide) for wide, high in upright)])
    refused("the square is the only bucket.*multiples of 64.*at least 128, not 64", bucket_shapes, 64, 64)


@given(st.integers(2, 40), st.sampled_from([1, 8, 64]))
def test_shapes_fit_the_model_and_the_memory(sides, multiple):
    size = sides * multiple
    shapes = bucket_shapes(size, multiple)
    assert len(set(shapes)) == len(shapes) and {(b, a) for a, b in shapes} == set(shapes)
    for shape in shapes:
        assert not any(side % multiple for side in shape) and math.prod(shape) <= size**2
        assert size / 2 <= min(shape) and max(shape) <= 2 * size


def test_nearest_is_by_a_factor():
    shapes = [(1, 1), (4, 1), (1, 4)]
    assert nearest(shapes, 199, 100) == (1, 1) and nearest(shapes, 201, 100) == (4, 1)
    assert nearest(shapes, 100, 199) == (1, 1) and nearest(shapes, 100, 201) == (1, 4)


def ramp(width, height):
    """Red rises to the right, green downwards, each from 0 to 255."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 0 * down], 2).round().astype(np.uint8))


def test_images_are_cut_as_little_as_can_be(tmp_path):
    """All of the side that is too short, the middle of the other; and turned as the camera says."""
    for name, size in (("a", (96, 32)), ("b", (20, 60)), ("c", (33, 32)), ("d", (64, 16))):
        ramp(*size).save(tmp_path / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying on its side
    ramp(96, 32).save(tmp_path / "e.png", exif=turned)
    data = Folder(tmp_path, 32, caption="", buckets=bucket_shapes(32, 8))
    assert data.shapes == [(64, 16), (16, 64), (32, 32), (64, 16), (16, 64)]
    assert [tuple(sample["image"].shape[1:]) for sample in data] == [(h, w) for w, h in data.shapes]
    wide = data[0]["image"]  # 96 x 24 of 96 x 32: rows 4 to 27 of 0 to 31
    assert wide[0, 0, [0, -1]].numpy() == pytest.approx([-1, 1], abs=0.05)
    assert wide[1, [0, -1], 0].numpy() == pytest.approx([2 * 4 / 31 - 1, 2 * 27 / 31 - 1], abs=0.05)
    assert np.array_equal(((data[3]["image"] + 1) * 127.5).round().numpy().transpose(1, 2, 0), np.asarray(ramp(64, 16)))
    random = Folder(tmp_path, 32, caption="", crop="random", buckets=bucket_shapes(32, 8))
    random.set_epoch(1)
    assert random[0]["image"].shape == (3, 16, 64) and not random[0]["image"].equal(wide)


def test_batches_are_of_one_group_and_lose_little():
    """Every group in turn where the shuffled order fills a batch of it; from any number on; shared by processes."""
    groups = ["a"] * 11 + ["b"] * 5 + ["c"] * 4
    order = EpochBatches(20, 2, seed=3, groups=groups)
    epoch = list(order)
    assert len(order) == len(epoch) == 5 + 2 + 2
    assert all(groups[i] == groups[j] for i, j in epoch) and len({i for batch in epoch for i in batch}) == 18
    assert [groups[i] for i, _ in epoch] != sorted(groups[i] for i, _ in epoch)
    assert list(order.seek(4)) == epoch[4:]
    parts = [list(EpochBatches(20, 1, seed=3, rank=rank, processes=2, groups=groups)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == epoch
    refused("has 4 images of one shape, c, fewer than one batch of 5", EpochBatches, 20, 5, seed=3, groups=groups)


@pytest.mark.parametrize("min_samples", [1, 8])
def test_subjects_in_buckets(tmp_path, min_samples):
    """All samples of a batch stack; every image, of a bucket of its own too, is in about as many batches."""
    for name, sizes in (("dog", [(32, 32), (64, 32), (70, 30), (30, 50), (20, 60)]), ("cat", [(60, 20), (32, 32)])):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size, 10 * i + len(sizes)).save(tmp_path / name / f"{i}.png")
    rows = [{"instance_dir": str(tmp_path / name), "instance_prompt": name} for name in ("dog", "cat")]
    for row in rows:
        row |= {"class_dir": str(tmp_path / "cat"), "class_images": {"1.png": "a cat"}}
    data = DreamBooth(rows, 32, channels=1, min_samples=min_samples, buckets=bucket_shapes(32, 8))
    assert set(data.groups) == {(32, 32), (40, 24), (24, 40), (64, 16), (16, 64)} and len(data.groups) == len(data)
    stream = training_batches(data, EpochBatches(len(data), min_samples, 0, groups=data.groups), workers=0)
    epoch = [next(stream)[1] for _ in range(len(data) // min_samples - len(set(data.groups)))]
    assert all(batch["class_image"].shape == (min_samples, 1, 32, 32) for batch in epoch)
    shown = [level for batch in epoch for level in ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().tolist()]
    counts = [shown.count(level) for level in (5, 15, 25, 35, 45)]
    assert min(counts) > 0.8 * len(data) / 10 and max(counts) <= len(data) / 10


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"dreambooth", "folder"}))
def test_stages_train_on_several_shapes(stage, tmp_path, monkeypatch):
    """In wide and high batches, with a preview and what is measured at the end; classifiers refuse them."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for i in range(20):
        path = tmp_path / "own" / str(i // 2) / f"{i}.png"  # of ten classes
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp(*((64, 32), (32, 64))[i % 2]).save(path)
    config = config_of(stage, preview_every=2, save_every=2)
    params = {"root": "own", "caption": "five", "buckets": [[32, 16], [16, 32]]}
    params |= {} if stage == "textual_inversion" else {"size": 16, "channels": 1}
    config["data"] = {"target": "ldm.data.folder.Folder", "params": params}
    if "classifier" in stage:
        refused("several shapes.*leave out buckets here", train, config, device="cpu")
    else:
        assert train(config, device="cpu").exists()
        lines = [json.loads(line) for line in Path("out", stage, "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and all(0 <= line["waits_for_data"] <= 1 for line in lines)


def test_latent_statistics_of_several_shapes():
    """Those of all pixels: of one shape as torch's own mean to the bit, of several by concatenation."""
    shapes = [(3, 4, 6)] * 5 + [(3, 6, 4)] * 3
    parts = [(torch.randn(shape), torch.rand(shape)) for shape in shapes]
    mean, std = latent_statistics([parts[:5], parts[5:]])
    means, stds = (torch.cat([p[k].flatten(1) for p in parts], 1).double() for k in (0, 1))
    torch.testing.assert_close(mean, means.mean(1))
    torch.testing.assert_close(std, ((means - mean[:, None]).square() + stds.square()).mean(1).sqrt())
    means, stds = (torch.stack([p[k] for p in parts[:5]]).double() for k in (0, 1))
    mean, std = latent_statistics([parts[:5]])
    assert mean.equal(means.mean((0, 2, 3)))
    assert std.equal(((means - mean[:, None, None]).square() + stds.square()).mean((0, 2, 3)).sqrt())


def test_images_of_several_shapes_are_encoded_in_their_order(tmp_path):
    for i, size in enumerate([(64, 32), (32, 64), (64, 32), (64, 32)]):
        Image.new("L", size, 60 * i).save(tmp_path / f"{i}.png")
    data = Folder(tmp_path, 8, 1, caption="", buckets=[[16, 8], [8, 16]])
    assert alike_batches(data, 2) == [[0, 2], [3], [1]]
    pixels = IdentityFirstStage(1)
    pixels.register_parameter("one", torch.nn.Parameter(torch.ones(())))  # which has a device
    means, stds = encode_dataset(pixels, data, BatchShare(), 2)
    assert all(mean.equal(data[i]["image"]) for i, mean in enumerate(means)) and len(stds) == 4
