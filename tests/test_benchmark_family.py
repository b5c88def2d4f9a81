"""benchmarks/family.py: overlap, seams and ink by hand, and the figures of models that are conditioned on images."""

import argparse
import copy

import numpy as np
import pytest
import torch
from conftest import TINY, randomised, refused
from tiny_stages import UNCONDITIONAL

import ldm
from benchmarks import family
from ldm.data.scenes import PALETTE
from ldm.evaluation.scenes import glyph


def test_overlap_and_seams():
    assert family.overlap((0, 0, 4, 4), (2, 0, 6, 4)) == pytest.approx(1 / 3)
    assert family.overlap((0, 0, 4, 4), (4, 0, 6, 4)) == 0 and family.overlap((1, 2, 3, 4), (1, 2, 3, 4)) == 1
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    step = torch.arange(4.0).expand(1, 1, 4, 4).clone()
    step[..., 2:] += 2
    assert family.seam(step, masks) == 3  # of four pairs of pixels, between columns 1 and 2


def test_ink_is_found_in_its_box():
    """Squares on grey: boxes and map are exactly theirs, or half."""
    image, sample = (
        torch.zeros(3, 64, 64),
        {"map": torch.zeros(64, 64), "boxes": torch.tensor([[8, 10, 20, 30, 21]] * 2)},
    )
    green = torch.tensor(PALETTE["green"]) / 127.5 - 1
    image[:, 10:30, 8:20], sample["map"][10:30, 8:20] = green[:, None, None], 22  # class 21 is a green one
    sample["boxes"][1] = -1

    class Ones(torch.nn.Module):
        def forward(self, x):
            return torch.eye(10)[[1]].expand(len(x), 10)

    right = {f"{what} right in their boxes": 1.0 for what in ("digits", "colours")}
    assert family.judge_boxes(image[None], [sample], Ones()) == right | {"objects": 1, "box IoU": 1.0, "map IoU": 1.0}
    assert family.judge_boxes(image[None].roll(1, 1), [sample], Ones())["colours right in their boxes"] == 0  # blue
    image[:, 20:30] = 0.0
    half = family.judge_boxes(image[None], [sample], Ones())
    assert half["box IoU"] == half["map IoU"] == 0.5
    assert family.judge_boxes(torch.zeros(1, 3, 64, 64), [sample], Ones())["box IoU"] == 0


def test_a_glyph_is_as_mnist_has_digits():
    found = glyph(np.full((10, 5), 255, np.uint8))
    assert found.shape == (28, 28) and np.nonzero(found.any(1))[0].tolist() == list(range(4, 24))
    assert np.nonzero(found.any(0))[0].tolist() == list(range(9, 19))
    heavy = np.full((10, 5), 60, np.uint8)
    heavy[5:] = 255  # its centre of mass is below its middle
    assert np.nonzero(glyph(heavy).any(1))[0][0] < 4


def test_a_sheet_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "load_model", lambda args: pytest.fail("loaded"))
    refused("is a folder: name a file", family.main, ["--image", str(tmp_path)], error=IsADirectoryError)


@pytest.mark.parametrize("reads", ["image", "mask"])
def test_figures_of_models_conditioned_on_images(mnist, tmp_path, reads):
    for file in (mnist / "MNIST/raw").iterdir():
        file.rename(str(file).replace("train", "t10k"))
    params = copy.deepcopy(TINY) | {"unet_config": copy.deepcopy(UNCONDITIONAL), "cond_stage_config": None}
    params["unet_config"]["params"]["in_channels"] += 1 if reads == "image" else 5
    if reads == "image":
        params["cond_stage_config"] = {"target": "ldm.conditioning.spatial.ConcatImage", "params": {}}
    concat = None if reads == "image" else "latents_mask"
    torch.manual_seed(0)
    model = randomised(ldm.LatentDiffusion(**params, concat=concat)).eval().requires_grad_(False)
    sheet = tmp_path / "new" / "sheet.png"
    args = argparse.Namespace(n=10, steps=2, scale=1.0, data=str(mnist), image=sheet)
    found = family.measure(model, args)
    assert sheet.stat().st_size > 500 and found["n"] == 10
    if reads == "image":
        assert found["made"]["psnr"] < found["bicubic"]["psnr"] and 0 <= found["made"]["accuracy"] <= 1
    else:
        assert found["pixels changed that the mask keeps"] == 0 and found["seam"] > 0
        assert 0 <= found["accuracy"] <= 1
        unlabelled = [{"image": sample["image"]} for sample in family.test_samples(model, "mask", args)]
        assert not any("accuracy" in name for name in family.of_masks(model, unlabelled, None, args))
