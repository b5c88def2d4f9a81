"""Realistic low-resolution images made from good ones, to train latent diffusion's super-resolution on.

After BSRGAN (Zhang et al. 2021, https://arxiv.org/abs/2103.14006, section 3): blur, downsampling, noise and JPEG in
random order, each of a random kind and strength. All randomness comes from Python's `random`, so one seed decides it.
"""

import io
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.image_formats import open_pillow
from ldm.images import to_pil

KERNEL = 21  # pixels across
SHRINKS = ("bilinear", "bicubic", "area")


class Strength(NamedTuple):
    """The number of blurs, their maximum width in pixels of the result, noise in 255ths, and JPEG qualities."""

    blurs: int
    width: float
    noise: tuple[float, float]
    quality: tuple[int, int]


FULL = Strength(blurs=2, width=1.0, noise=(2.0, 25.0), quality=(30, 95))
LIGHT = Strength(blurs=1, width=0.5, noise=(1.0, 2.0), quality=(80, 95))


def gaussian_kernel(along: float, across: float, angle: float) -> Tensor:
    """Return a Gaussian of two standard deviations in pixels, the first along `angle`: (KERNEL, KERNEL), sum 1."""
    at = torch.arange(KERNEL, dtype=torch.float64) - KERNEL // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return (kernel / kernel.sum()).float()


def blur(x: Tensor, widest: float) -> Tensor:
    """Blur x (1, c, h, w) by a Gaussian of standard deviations up to `widest` pixels, isotropic half of the time."""
    along = random.uniform(0.1, widest)
    across = along if random.random() < 0.5 else random.uniform(0.1, widest)
    kernel = gaussian_kernel(along, across, random.uniform(0, math.pi))
    padded = F.pad(x, [KERNEL // 2] * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize x (1, c, h, w) by one of SHRINKS."""
    mode = random.choice(SHRINKS)
    return F.interpolate(x, size=size, mode=mode, **({} if mode == "area" else {"align_corners": False}))


def add_gaussian_noise(x: Tensor, deviations: tuple[float, float]) -> Tensor:
    """Add Gaussian noise to x (1, c, h, w) in [-1, 1]: one per channel (2 of 5 times), or the same in all (3 of 5)."""
    per_channel = random.random() < 0.4
    generator = torch.Generator().manual_seed(random.getrandbits(63))
    noise = torch.randn(x.shape if per_channel else (1, 1, *x.shape[2:]), generator=generator)
    return x + random.uniform(*deviations) * 2 / 255 * noise


def jpeg(x: Tensor, qualities: tuple[int, int]) -> Tensor:
    """Encode x (1, c, h, w) in [-1, 1] as JPEG and decode it."""
    file = io.BytesIO()
    to_pil(x)[0].save(file, format="JPEG", quality=random.randint(*qualities))
    return _tensor(np.asarray(open_pillow(file)))


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, h, w)


def _degrade(strength: Strength, image: np.ndarray, sf: int = 4, isp_model: Any = None) -> dict[str, np.ndarray]:
    """Degrade uint8 (h, w, 3) to {"image": uint8 (h // sf, w // sf, 3)}."""
    if isp_model is not None:
        raise ValueError("isp_model, the processing of a camera, is not supported: it must be None")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < sf:
        raise ValueError(
            f"an image to degrade is uint8 (h, w, 3), at least {sf} pixels, not {image.dtype} {image.shape}"
        )
    size = (image.shape[0] // sf, image.shape[1] // sf)
    x = _tensor(image[: size[0] * sf, : size[1] * sf])
    between = random.uniform(1, sf)  # the size between the two downsamplings
    middle = (round(size[0] * between), round(size[1] * between))
    smaller = [partial(shrink, size=middle), partial(shrink, size=size)]
    others: list[Callable] = [lambda x: blur(x, strength.width * x.shape[2] / size[0])] * strength.blurs
    others += [partial(add_gaussian_noise, deviations=strength.noise), partial(jpeg, qualities=strength.quality)]
    random.shuffle(others)
    places = sorted(random.sample(range(len(others) + 2), 2))  # in this order, at random places
    for place, step in zip(places, smaller, strict=True):
        others.insert(place, step)
    for step in [*others, partial(jpeg, qualities=strength.quality)]:
        x = step(x).clamp(-1, 1)
    return {"image": np.asarray(to_pil(x)[0])}


degradation_fn_bsr = partial(_degrade, FULL)
degradation_fn_bsr_light = partial(_degrade, LIGHT)
