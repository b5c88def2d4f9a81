"""Degradations for super-resolution: each by what it does to a known image, and their order by what comes out."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light

from ldm.compvis import degradation
from ldm.compvis.degradation import FULL, KERNEL, LIGHT, gaussian_kernel


def make_image(height: int = 64, width: int = 96) -> np.ndarray:
    """Smooth waves of three colours with an edge in the middle: uint8 (h, w, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 9), np.sin((x + y) / 11)], axis=2)
    return (127.5 + 90 * waves * np.where(x < width // 2, 1, 0.5)[..., None]).astype(np.uint8)


def shrunk(image: np.ndarray, sf: int) -> np.ndarray:
    """The mean of every square of sf x sf pixels."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return F.avg_pool2d(x, sf)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("angle", [0.0, 0.7, math.pi / 2])
def test_kernels_have_the_moments_of_their_gaussian(angle):
    kernel = gaussian_kernel(2.0, 1.0, angle).double()
    at = torch.arange(KERNEL).double() - KERNEL // 2
    rows, columns = kernel.sum(1), kernel.sum(0)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    assert float(rows @ at) == pytest.approx(0, abs=1e-5) and float(columns @ at) == pytest.approx(0, abs=1e-5)
    along, across = math.cos(angle) ** 2, math.sin(angle) ** 2
    assert float(columns @ at**2) == pytest.approx(4 * along + across, abs=0.01)  # the variances along x and y
    assert float(rows @ at**2) == pytest.approx(4 * across + along, abs=0.01)
    assert float(at @ kernel @ at) == pytest.approx(3 * math.cos(angle) * math.sin(angle), abs=0.01)


def test_noise_is_as_strong_as_said():
    random.seed(0)
    x, kinds, levels = torch.zeros(1, 3, 200, 200), [], []
    for _ in range(60):
        noise = degradation.add_gaussian_noise(x, (10.0, 10.0))
        assert noise.std().item() == pytest.approx(20 / 255, rel=0.03)
        kinds.append(bool((noise[:, 0] == noise[:, 1]).all()))
        levels.append(degradation.add_gaussian_noise(x, (2.0, 25.0)).std().item() * 127.5)
    assert 0.35 < sum(kinds) / 60 < 0.85 and 2 < min(levels) * 1.05 and max(levels) < 25 * 1.05


def test_jpeg_and_blur():
    x = torch.from_numpy(make_image()).permute(2, 0, 1)[None] / 127.5 - 1
    fine, coarse = (float((degradation.jpeg(x, (q, q)) - x).abs().mean()) for q in (95, 30))
    assert 0 < fine < coarse < 0.1
    grey = torch.full((1, 3, 30, 30), 0.25)
    assert torch.allclose(degradation.blur(grey, 3.0), grey, atol=1e-5)  # up to the edges
    random.seed(1)
    assert float(degradation.blur(x, 4.0).diff(dim=3).abs().mean()) < float(x.diff(dim=3).abs().mean())


@pytest.mark.parametrize("sf", [2, 4])
@pytest.mark.parametrize("degrade", [degradation_fn_bsr, degradation_fn_bsr_light])
def test_what_comes_out(degrade, sf):
    image, before = make_image(66, 99), make_image(66, 99)
    random.seed(3)
    small = degrade(image, sf=sf)["image"]
    assert small.shape == (66 // sf, 99 // sf, 3) and small.dtype == np.uint8 and (image == before).all()
    random.seed(3)
    assert (degrade(image, sf=sf)["image"] == small).all()
    assert (degrade(image, sf=sf)["image"] != small).any()


def test_it_stays_the_image_and_light_is_lighter():
    random.seed(0)
    image = make_image()
    clean = shrunk(image, 4)
    errors = {
        name: np.mean([np.abs(degrade(image)["image"] - clean).mean() for _ in range(40)])
        for name, degrade in (("full", degradation_fn_bsr), ("light", degradation_fn_bsr_light))
    }
    # JPEG alone, with its colours at half the resolution, is off by 5 to 7 levels in so small an image
    assert 4 < errors["light"] < 10 and 1.3 * errors["light"] < errors["full"] < 20, errors
    assert np.abs(np.mean([degradation_fn_bsr(image)["image"] for _ in range(40)], axis=0) - clean).mean() < 12


def test_the_last_thing_is_jpeg_and_sizes_only_fall(monkeypatch):
    steps = []

    def watched(name, own):
        def step(x, *args, **settings):
            steps.append((name, x.shape[2]))
            return own(x, *args, **settings)

        monkeypatch.setattr(degradation, name, step)

    for name in ("blur", "shrink", "add_gaussian_noise", "jpeg"):
        watched(name, getattr(degradation, name))
    orders = set()
    for seed in range(30):
        random.seed(seed)
        steps.clear()
        degradation_fn_bsr(make_image())
        names = [name for name, _ in steps]
        assert sorted(names) == ["add_gaussian_noise", "blur", "blur", "jpeg", "jpeg", "shrink", "shrink"]
        assert names[-1] == "jpeg"
        heights = [height for _, height in steps]
        assert heights == sorted(heights, reverse=True) and heights[0] == 64 and heights[-1] == 16
        orders.add(tuple(names))
    assert len(orders) > 20
    assert LIGHT.blurs < FULL.blurs and LIGHT.noise[1] <= FULL.noise[0]


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (make_image().astype(np.float32), {}, "is uint8 .* not float32"),
        (make_image()[..., 0], {}, "is uint8"),
        (make_image(3, 3), {}, "at least 4 pixels"),
        (make_image(), {"isp_model": object()}, "isp_model"),
    ],
)
def test_bad_input(given, settings, message):
    refused(message, degradation_fn_bsr_light, given, **settings)
