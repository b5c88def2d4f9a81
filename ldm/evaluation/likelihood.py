"""How many bits an image costs under a pixel-space diffusion model: the variational bound, term by term."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.bound import prior_bits, step_bits
from ldm.diffusion.denoiser import from_vp
from ldm.diffusion.guidance import classifier_free, clip_x0
from ldm.diffusion.schedule import q_sample
from ldm.pixel_diffusion import PixelDiffusion
from ldm.training.conditions import read_by
from ldm.util import progress_bar

VARIANCES = {"small": 0.0, "large": 1.0}  # the share of log beta_t in the log variance of a step
LEARNED = "learned"


class Bits(NamedTuple):
    """The bound's terms for each image, in bits per dimension: terms (T, n), timestep t's in row t; prior (n,)."""

    terms: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound of each image: (n,)."""
        return self.terms.sum(0) + self.prior


def check_variance(model: Any, variance: str | None) -> str:
    """Return the variance's name, the model's own for None; ValueError for one that it does not have."""
    if getattr(model, "target", None) != PixelDiffusion.target:
        raise ValueError(f"bits per dimension are of a PixelDiffusion: this is a {type(model).__name__}")
    names = [*([LEARNED] if model.learned_variance else []), *VARIANCES]
    if variance is not None and variance not in names:
        raise ValueError(f"variance {variance!r} is not one of this model's: use {', '.join(names)}")
    return names[0] if variance is None else variance


@torch.inference_mode()
def bits_per_dimension(
    model: Any, images: Tensor, prompts: Sequence[Any], seed: int = 0, variance: str | None = None
) -> Bits:
    """Return the bound for one batch of images, by one evaluation of the network at each of the T timesteps.

    A self-conditioned network is evaluated twice: as in a step of sampling, its condition must follow from x_t alone.
    At each timestep x_t has new noise, so that the sum is an unbiased estimate of the bound.

    Args:
        model: a `PixelDiffusion`.
        images: (n, c, h, w) in [-1, 1], of 8-bit pixels.
        prompts: prompts or classes of the images, as the model takes them.
        seed: of the noise.
        variance: of each step: learned, small or large; None for the first of these that the model has.

    Raises:
        ValueError: another kind of model, or it does not have the variance.
    """
    name, schedule = check_variance(model, variance), model.schedule
    x0, cond = images.to(model.device), model.condition(prompts)
    generator, terms = torch.Generator().manual_seed(seed), []
    for step in progress_bar(range(schedule.T - 1, -1, -1), desc="timesteps"):
        denoise = classifier_free(model.denoiser([0] * len(x0)), cond)
        if model.clip is not None:
            denoise = clip_x0(denoise, model.clip)
        t, sigma = torch.full((len(x0),), step), schedule.sigma_at(step)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = q_sample(x0, t, noise, schedule)
        for _ in range(2 if model.self_condition else 1):
            found = denoise(from_vp(x, sigma), sigma)
        share: Any = found.variance_share if name == LEARNED else VARIANCES[name]
        terms.append(step_bits(x0, x, t, found.x0, share, schedule).cpu())
    return Bits(torch.stack(terms[::-1]), prior_bits(x0, schedule).cpu())


def measure_bits(
    model: Any, data: Any, n: int, batch_size: int, seed: int = 0, variance: str | None = None
) -> dict[str, Any]:
    """Return the bound of the first n images: its mean, the mean's standard error and its parts, in bits per dimension.

    Raises:
        ValueError: as `bits_per_dimension`, or the images have another size than the model's.
    """
    size = model.latent_size(model.defaults["height"], model.defaults["width"])
    if n > len(data) or tuple(data[0]["image"].shape) != size:
        raise ValueError(f"{n} images {size} are asked for, and there are {len(data)} {tuple(data[0]['image'].shape)}")
    found, name = [], next(iter(read_by(model)), "")
    for first in range(0, n, batch_size):
        indices = list(range(first, min(first + batch_size, n)))
        samples = data.__getitems__(indices)
        images, prompts = torch.stack([one["image"] for one in samples]), [one.get(name, "") for one in samples]
        found.append(bits_per_dimension(model, images, prompts, seed + first, variance))
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
