"""Inversion of given images: the noise from which DDIM returns to them, and null-text optimisation, by which it does so
under guidance, too (Mokady et al. 2022, https://arxiv.org/abs/2211.09794).

DDIM is Euler's method on an ODE (`ldm.diffusion.sampling.first_order`), which `ldm.diffusion.sampling.invert` follows
up to noise. Under guidance the way back is another one. So images are inverted at guidance scale 1, and in each step of
the guided way back the null condition is optimised until the step ends where the way up was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.prompt import count_chunks
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import BoundDenoise, Cond, Prediction, from_vp, to_vp
from ldm.diffusion.sampling import Step, invert
from ldm.diffusion.sampling.first_order import Point, euler, euler_to
from ldm.editing.settings import Inverting
from ldm.editing.words import POSITIVE
from ldm.generation import given, plan_guidance, plan_sampling, plan_sizes
from ldm.init_image import Images, InitImages
from ldm.models.compiler import uncompiled
from ldm.settings import ALL_SIGMAS, checked, from_keywords, listed, of_model

# As in their code: the learning rate of the first step, which falls to half, and the mean squared errors at which the
# optimisation of a step ends: of the first one, and what the last one has more.
RATE, ENOUGH, MORE = 1e-2, 1e-5, 1e-3
NOT_HERE = ("strength", "width", "height", "fixed_code")  # settings that do not decide the way


class Inversion(NamedTuple):
    """The way of b images up to noise: sampling's sigmas, descending, and x (b, z, h, w) at each; and what it is of."""

    sigmas: list[float]
    states: list[Tensor]
    prompts: Sequence[Any]
    settings: dict[str, Any]  # of `generate`

    @property
    def noise(self) -> Tensor:
        """Return `generate`'s argument of that name, (b, z, h, w)."""
        return to_vp(self.states[0], self.sigmas[0])


class NullText(NamedTuple):
    """Null conditions of b images, and at which timesteps the UNet gets each."""

    timesteps: list[float]
    conds: list[Cond]


@torch.no_grad()
def invert_images(
    model: Any,
    images: Images,
    prompts: Sequence[Any],
    negative: Any = None,
    *,
    corrections: int | None = None,
    callback: Callable[[Step], None] | None = None,
    **settings: Any,
) -> Inversion:
    """Invert images: `generate` with these settings and the result's `noise` makes them again.

    Args:
        model: a LatentDiffusion, ours or CompVis's.
        images: PIL images of one size, one for each prompt, or one for all.
        prompts: what they show.
        negative: as of `generate`, for another guidance scale than 1.
        corrections: `ldm.editing.settings.Inverting`.
        callback: is given every `Step` up.
        **settings: those of `ldm.settings.Settings` that decide steps, guidance (by default none: scale 1) and how
            prompts are read.

    Raises:
        ValueError: for a sampler that is not ddim, for models with noise of their own, or an image in their input, and
            for settings of guidance without guidance.
    """
    corrections = Inverting(**checked(Inverting, {"corrections": corrections})).corrections
    settings = settings | {"scale": given(settings.get("scale"), 1.0)}
    if not (count := len(prompts := listed("prompts", prompts))):
        raise ValueError("inversion needs the prompts of the images, and there are none")
    pixels = InitImages(images, None, count, model.image_channels, model.multiple).pixels
    sampling = _Sampling(model, prompts, negative, settings, pixels.shape[-2:])
    x = from_vp(model.encode(pixels, mode=True).float(), sampling.sigmas[-1]).expand(count, -1, -1, -1)
    states = [x]
    for step in invert(sampling.guided(sampling.uncond), x, sampling.sigmas, corrections):
        states.append(step.x)
        if callback is not None:
            callback(step)
    return Inversion(sampling.sigmas, states[::-1], sampling.prompts, settings)


@torch.no_grad()
def null_text(
    model: Any,
    inversion: Inversion,
    negative: Any = None,
    *,
    null_steps: int | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    **settings: Any,
) -> NullText:
    """Optimise the null condition in each step, so that guided sampling goes the way of an inversion without guidance.

    Args:
        negative: where the optimisation starts: one prompt, or one per image; the null condition if not given.
        null_steps: `ldm.editing.settings.Inverting`.
        callback: is given each step's index, and the mean squared error (b,) of the latents after it.
        **settings: those of guidance: scale (the model's own if not given), interval, rescale.

    Raises:
        ValueError: without guidance, which has no use for a null condition, and where that is no vector but a class.
    """
    null_steps = Inverting(**checked(Inverting, {"null_steps": null_steps})).null_steps
    size = [side * model.downsampling for side in inversion.states[0].shape[-2:]]
    settings = inversion.settings | {"scale": None} | settings
    sampling = _Sampling(model, inversion.prompts, negative, settings, size)
    low, high = sampling.interval
    if sampling.uncond is None or not any(low < sigma <= high for sigma in sampling.sigmas):
        raise ValueError("null-text optimisation has no effect at guidance scale 1, or outside of its interval")
    if not all(value.is_floating_point() for value in sampling.uncond.values()):
        raise ValueError("null-text optimisation needs a null condition of vectors, and this model's is a class number")
    if sampling.sigmas != inversion.sigmas:
        raise ValueError("null-text optimisation goes the inversion's way: leave out what changes its noise levels")
    x, cond, found = inversion.states[0], sampling.uncond, []
    steps = len(inversion.sigmas) - 1
    for i, (sigma, lower) in enumerate(pairwise(inversion.sigmas)):
        rate, enough = RATE * (1 - i / (2 * steps)), ENOUGH + MORE * i / steps
        cond, x = sampling.optimised(x, sigma, inversion.states[i + 1], lower, cond, null_steps, rate, enough)
        found.append(cond)
        if callback is not None:
            callback(i, _error(x, inversion.states[i + 1], lower))
    return NullText([sampling.timestep(sigma) for sigma in inversion.sigmas[:-1]], found)


class _Sampling:
    """What `generate` with these arguments does, by ddim: its noise levels, conditions and guidance."""

    def __init__(
        self, model: Any, prompts: Sequence[Any], negative: Any, settings: dict[str, Any], size: Sequence[int]
    ) -> None:
        chosen, own = from_keywords(settings), of_model(model.defaults)
        if unused := [name for name in NOT_HERE if settings.get(name) is not None and settings[name] is not False]:
            raise ValueError(f"{', '.join(unused)} would have no effect on an inversion")
        sampler, self.sigmas = plan_sampling(model, chosen.steps, chosen.sampler, chosen.spacing, chosen.final_sigma)
        if sampler.step is not euler or given(chosen.eta, sampler.eta) != 0:
            raise ValueError("inversion is of the sampler ddim with eta 0: give these")
        if model.concat is not None or model.random_x0:
            raise ValueError("inversion needs a model without an image in its input, and without noise of its own")
        self.model, self.prompts, self.rescale = model, prompts, chosen.rescale
        guided = {"negative": negative or None, "interval": chosen.interval, "rescale": chosen.rescale or None}
        self.scale, negative = plan_guidance(model, chosen.scale, negative)
        if self.scale == 1 and (unused := [name for name, value in guided.items() if value is not None]):
            raise ValueError(f"{', '.join(unused)} would have no effect at guidance scale 1")
        self.interval = tuple(given(given(chosen.interval, own["interval"]), ALL_SIGMAS))
        negatives = list(negative) if isinstance(negative, list | tuple) else [negative] * len(self.prompts)
        if len(negatives) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many negative prompts, or one; got {len(negatives)}")
        both = [self.prompts] if self.scale == 1 else [self.prompts, negatives]
        chunks = max(count for texts in both for count in count_chunks(model.cond_stage_model, texts, chosen.plain))
        options = {"chunks": chunks, "clip_skip": chosen.clip_skip, "plain": chosen.plain}
        sizes = plan_sizes(model, chosen, (size[0], size[1]))
        self.cond, *rest = (model.condition(texts, **options, **own) for texts, own in zip(both, sizes, strict=False))
        self.uncond: Cond | None = rest[0] if rest else None

    def timestep(self, sigma: float) -> float:
        """Return what the UNet gets as its timestep."""
        schedule = self.model.schedule
        return schedule.T * sigma / (1 + sigma) if self.model.prediction == "flow" else schedule.t_at(sigma)

    def guided(self, uncond: Cond | None, x0_cond: Tensor | None = None) -> BoundDenoise:
        """Return the guided denoise(x, sigma). x0_cond: the conditional prediction, if it is known already."""
        model, plain = self.model, self.model.denoiser()

        def predict(x: Tensor, sigma: float, cond: Cond) -> Prediction:
            if x0_cond is None:
                return plain(x, sigma, cond)
            n = len(x) // 2
            return Prediction(torch.cat([plain(x[:n], sigma, {k: v[:n] for k, v in cond.items()}).x0, x0_cond]))

        options = self.scale, self.interval, self.rescale, model.prediction
        denoise = guidance.classifier_free(predict, self.cond, uncond, *options)
        return denoise if model.clip is None else guidance.clip_x0(denoise, model.clip)

    def optimised(
        self, x: Tensor, sigma: float, goal: Tensor, lower: float, start: Cond, steps: int, rate: float, enough: float
    ) -> tuple[Cond, Tensor]:
        """Return the null condition with which the step from x at sigma ends nearer to the goal, and where it ends."""
        low, high = self.interval
        if not low < sigma <= high:  # without guidance
            return start, euler_to(Point(sigma, x, self.guided(start)(x, sigma).x0), lower)
        x0_cond = self.model.denoiser()(x, sigma, self.cond).x0
        leaves = {name: value.float().clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=rate)
        for _ in range(steps):
            with torch.enable_grad():
                cond = {name: leaf.to(start[name].dtype) for name, leaf in leaves.items()}
                end = euler_to(Point(sigma, x, self.guided(cond, x0_cond)(x, sigma).x0), lower)
                total = (error := _error(end, goal, lower)).sum()  # the images' gradients are apart
            if error.max() < enough:
                break
            slopes = torch.autograd.grad(total, list(leaves.values()))
            for leaf, slope in zip(leaves.values(), slopes, strict=True):
                leaf.grad = slope
            optimizer.step()
        cond = {name: leaf.detach().to(start[name].dtype) for name, leaf in leaves.items()}
        return cond, euler_to(Point(sigma, x, self.guided(cond, x0_cond)(x, sigma).x0), lower)


def _error(x: Tensor, goal: Tensor, sigma: float) -> Tensor:
    """Return the mean squared error of each of b latents at a noise level, variance-preserving: (b,)."""
    return to_vp(x - goal, sigma).square().flatten(1).mean(1)


@contextmanager
def null_text_guidance(model: Any, nulls: NullText, copies: int = 1) -> Iterator[None]:
    """Guide the next batches away from these null conditions, in this thread, until the block ends.

    They take the place of `generate`'s negative prompt: that of `null_text` is where they come from.

    copies: how often a batch has the inverted images: 2 for pairs of `prompt_to_prompt`.

    ValueError from the sampler for a batch of other images or steps; after the block, where none had guidance.
    """
    if not isinstance(nulls, NullText):
        raise ValueError(f"nulls must be what null_text returns, got {type(nulls).__name__}")
    unet, thread, guided = model.model.diffusion_model, get_ident(), []  # whether each call of the UNet was
    images = POSITIVE.checked("copies", copies) * len(next(iter(nulls.conds[0].values())))

    def enter(unet: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        x, t = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("x", "timesteps")))
        if get_ident() != thread:
            return None
        guided.append(len(x) != images)
        if not guided[-1]:
            return None
        distance, i = min((abs(float(t[0]) - own), i) for i, own in enumerate(nulls.timesteps))
        if len(x) != 2 * images or distance > 0.5:
            raise ValueError(
                f"the null conditions are of {images} images and {len(nulls.conds)} steps: generate these, in one batch"
            )
        inputs = dict(zip(("context", "y"), args[2:], strict=False)) | kwargs
        for name, key in (("context", "c_crossattn"), ("y", "c_adm")):
            if (null := nulls.conds[i].get(key)) is not None:
                inputs[name] = torch.cat([torch.cat([null] * copies).to(inputs[name]), inputs[name][images:]])
        return args[:2], inputs

    with unet.register_forward_pre_hook(enter, with_kwargs=True), uncompiled():
        yield
    if guided and not any(guided):
        raise ValueError("the null conditions had no effect: at guidance scale 1 there is no guidance away from them")
