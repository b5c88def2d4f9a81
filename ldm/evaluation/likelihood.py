"""How many bits an image costs under a pixel-space diffusion model: the variational bound, term by term."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import trange

from ldm.data.captioned import CaptionedDigits
from ldm.diffusion.bound import prior_bits, step_bits
from ldm.diffusion.denoiser import from_vp
from ldm.diffusion.guidance import classifier_free, clip_x0
from ldm.diffusion.schedule import q_sample
from ldm.evaluation.samples import ask
from ldm.pixel_diffusion import PixelDiffusion

VARIANCES = {"small": 0.0, "large": 1.0}  # the share of log beta_t in the log variance of a step
LEARNED = "learned"


class Bits(NamedTuple):
    """The bound's terms, each of all images: terms (T, n), level t's in row t; prior (n,); bits per dimension."""

    terms: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of each image: (n,)."""
        return self.terms.sum(0) + self.prior


def check_variance(model: Any, variance: str | None) -> str:
    """The variance's name, by default the model's own; ValueError for one that it does not have."""
    if getattr(model, "target", None) != PixelDiffusion.target:
        raise ValueError(f"bits per dimension are of a PixelDiffusion: this is a {type(model).__name__}")
    names = [*([LEARNED] if model.learned_variance else []), *VARIANCES]
    if variance is not None and variance not in names:
        raise ValueError(f"variance {variance!r} is not one of this model's: use {', '.join(names)}")
    return names[0] if variance is None else variance


@torch.inference_mode()
def bits_per_dimension(
    model: Any, images: Tensor, told: Sequence[Any], seed: int = 0, variance: str | None = None
) -> Bits:
    """The bound for one batch of images, by one evaluation of the network at each of the schedule's T levels.

    Two of a self-conditioned network's: what it is told must follow from x_t alone, as a step of the chain does. At
    each level x_t is noised anew, so that the sum is an unbiased estimate of the bound.

    model: a `PixelDiffusion`. images: (n, c, h, w) in [-1, 1], as 8-bit pixels are. told: prompts or classes of the
    images, as the model takes them. seed: of the noise. variance: learned, where the model learned one, small or
    large; by default the first of these that there is.

    Raises ValueError for another kind of model, and for a variance that the model does not have.
    """
    name, schedule = check_variance(model, variance), model.schedule
    x0, cond = images.to(model.device), model.condition(told)
    generator, terms = torch.Generator().manual_seed(seed), []
    for level in trange(schedule.T - 1, -1, -1, desc="levels", leave=False, mininterval=1):
        denoise = classifier_free(model.denoiser([0] * len(x0)), cond)
        if model.clip is not None:
            denoise = clip_x0(denoise, model.clip)
        t, sigma = torch.full((len(x0),), level), schedule.sigma_at(level)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = q_sample(x0, t, noise, schedule)
        for _ in range(2 if model.self_condition else 1):
            found = denoise(from_vp(x, sigma), sigma)
        share = found.variance_share if name == LEARNED else VARIANCES[name]
        terms.append(step_bits(x0, x, t, found.x0, share, schedule).cpu())
    return Bits(torch.stack(terms[::-1]), prior_bits(x0, schedule).cpu())


def measure_bits(
    model: Any, data: CaptionedDigits, n: int, batch_size: int, seed: int = 0, variance: str | None = None
) -> dict[str, Any]:
    """The bound of the first n images: its mean, that one's standard error, and its parts, in bits per dimension.

    Raises ValueError as `bits_per_dimension`, and for images of another size than the model's.
    """
    size = model.latent_size(model.defaults["height"], model.defaults["width"])
    if n > len(data) or tuple(data[0]["image"].shape) != size:
        raise ValueError(f"{n} images {size} are asked for, and there are {len(data)} {tuple(data[0]['image'].shape)}")
    found = []
    for first in range(0, n, batch_size):
        places = list(range(first, min(first + batch_size, n)))
        images = torch.stack([sample["image"] for sample in data.__getitems__(places)])
        told, _ = ask(model, [data.caption(i) for i in places])
        found.append(bits_per_dimension(model, images, told, seed + first, variance))
    bits = Bits(torch.cat([part.terms for part in found], dim=1), torch.cat([part.prior for part in found]))
    return {
        "variance": check_variance(model, variance),
        "levels": model.schedule.T,
        "bits_per_dimension": bits.total.mean().item(),
        "standard_error": (bits.total.std() / n**0.5).item(),
        "prior": bits.prior.mean().item(),
        "steps": bits.terms[1:].sum(0).mean().item(),
        "decoder": bits.terms[0].mean().item(),
    }
