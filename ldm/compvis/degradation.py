"""Small pictures as they are found, made from good ones: what super-resolution is trained on.

After BSRGAN (Zhang et al. 2021, https://arxiv.org/abs/2103.14006, section 3), for latent diffusion's super-resolution.

Blur, shrinking, noise and JPEG come in random order, each of a random kind and strength. All that is random is drawn
from Python's `random`, so that one seed decides it.
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
from PIL import Image
from torch import Tensor

from ldm.images import to_pil

KERNEL = 21  # pixels across
SHRINKS = ("bilinear", "bicubic", "area")


class Strength(NamedTuple):
    """How much is done: blurs, their greatest width in pixels of the result, noise in 255ths, JPEG's qualities."""

    blurs: int
    width: float
    noise: tuple[float, float]
    quality: tuple[int, int]


FULL = Strength(blurs=2, width=1.0, noise=(2.0, 25.0), quality=(30, 95))
LIGHT = Strength(blurs=1, width=0.5, noise=(1.0, 2.0), quality=(80, 95))


def gaussian_kernel(along: float, across: float, angle: float) -> Tensor:
    """A Gaussian of two standard deviations in pixels, the first along `angle`: (KERNEL, KERNEL), of sum 1."""
    at = torch.arange(KERNEL, dtype=torch.float64) - KERNEL // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / along) ** 2 + (v / across) ** 2))
    return (kernel / kernel.sum()).float()


def blur(x: Tensor, widest: float) -> Tensor:
    """x (1, c, h, w) under a Gaussian of standard deviations up to `widest` pixels, as often round as not."""
    along = random.uniform(0.1, widest)
    across = along if random.random() < 0.5 else random.uniform(0.1, widest)
    kernel = gaussian_kernel(along, across, random.uniform(0, math.pi))
    padded = F.pad(x, [KERNEL // 2] * 4, mode="replicate")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (1, c, h, w) at another size, by one of SHRINKS."""
    mode = random.choice(SHRINKS)
    return F.interpolate(x, size=size, mode=mode, **({} if mode == "area" else {"align_corners": False}))


def add_noise(x: Tensor, levels: tuple[float, float]) -> Tensor:
    """Gaussian noise on x (1, c, h, w) in [-1, 1]: in each channel its own (2 of 5), or the same in all (3 of 5)."""
    own = random.random() < 0.4
    generator = torch.Generator().manual_seed(random.getrandbits(63))
    noise = torch.randn(x.shape if own else (1, 1, *x.shape[2:]), generator=generator)
    return x + random.uniform(*levels) * 2 / 255 * noise


def jpeg(x: Tensor, qualities: tuple[int, int]) -> Tensor:
    """x (1, c, h, w) in [-1, 1], written as JPEG and read again."""
    file = io.BytesIO()
    to_pil(x)[0].save(file, format="JPEG", quality=random.randint(*qualities))
    return _tensor(np.asarray(Image.open(file)))


def _tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, h, w)


def _degrade(strength: Strength, image: np.ndarray, sf: int = 4, isp_model: Any = None) -> dict[str, np.ndarray]:
    """uint8 (h, w, 3) -> {"image": uint8 (h // sf, w // sf, 3)}. Raises ValueError for anything else, and isp_model."""
    if isp_model is not None:
        raise ValueError("isp_model, a camera's own processing, has no counterpart here: it must be None")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < sf:
        raise ValueError(
            f"a picture to degrade is uint8 (h, w, 3), at least {sf} pixels, not {image.dtype} {image.shape}"
        )
    size = (image.shape[0] // sf, image.shape[1] // sf)
    x = _tensor(image[: size[0] * sf, : size[1] * sf])
    between = random.uniform(1, sf)  # the first of two shrinkings, to a size on the way
    way = (round(size[0] * between), round(size[1] * between))
    smaller = [partial(shrink, size=way), partial(shrink, size=size)]
    others: list[Callable] = [lambda x: blur(x, strength.width * x.shape[2] / size[0])] * strength.blurs
    others += [partial(add_noise, levels=strength.noise), partial(jpeg, qualities=strength.quality)]
    random.shuffle(others)
    places = sorted(random.sample(range(len(others) + 2), 2))  # in this order, wherever they come
    for place, step in zip(places, smaller, strict=True):
        others.insert(place, step)
    for step in [*others, partial(jpeg, qualities=strength.quality)]:
        x = step(x).clamp(-1, 1)
    return {"image": np.asarray(to_pil(x)[0])}


degradation_fn_bsr = partial(_degrade, FULL)
degradation_fn_bsr_light = partial(_degrade, LIGHT)
