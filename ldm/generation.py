"""From prompts to pictures: condition, guide, sample, decode. `LatentDiffusion.generate` is `generate` here."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.batching import batches
from ldm.conditioning.prompt import count_chunks
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import BoundDenoise, Cond, from_vp, to_vp
from ldm.diffusion.sampling import Sampler, Step, choose_sampler, get_sampler
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.schedule import sampling_sigmas
from ldm.images import to_pil
from ldm.source import Pictures, Source, steps_taken


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Any],
    negative: Any = None,
    steps: int | None = None,
    scale: float | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 16,
    fixed_code: bool = False,
    interval: Sequence[float] | None = None,
    rescale: float = 0.0,
    clip_skip: int = 1,
    plain: bool = False,
    image: Pictures | None = None,
    mask: Pictures | None = None,
    strength: float | None = None,
    guide: guidance.Guide | None = None,
    callback: Callable[[Step], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture per prompt; what is None is the model's own default.

    Args:
        model: the LatentDiffusion; not to be given where this is its method.
        prompts: texts; classes or pictures for models conditioned on those.
        sampler: a name, or auto (`choose_sampler`).
        negative: what to steer away from: one prompt, or one per picture.
        scale: of classifier-free guidance; 1 is none and halves the work.
        eta: share of fresh noise in each step, 0 to 1.
        seed, seeds: picture i is drawn with the noise of seed + i, or of seeds[i]: the same alone and in any batch.
        height, width: in pixels; with an `image`, its own.
        batch_size: pictures at a time; bounds memory and changes nothing else.
        fixed_code: every picture starts from picture 0's noise.
        interval: (low, high) in sigma outside which all guidance is off.
        rescale: phi of guidance rescale, 0 to 1.
        clip_skip: which of CLIP's layers is read, counted back from the model's own, 1.
        plain: take prompts literally; otherwise brackets in them are weights (`ldm.conditioning.prompt`).
        image, mask: draw over this picture, or one for each prompt; only where the mask is white, if there is one
            (`ldm.source.Source`).
        strength: share of the steps that are taken (`steps_taken`), from the `image` noised to the first of their
            levels; 0 gives it back through the first stage, 1 takes all. Its default is `usual_strength`.
        guide: guidance besides the classifier-free one (`ldm.inference.guiders`): guide(denoise, cond, prompts) ->
            denoise; the model's `guide` if not given.
        callback: is given every `Step` (index, sigma, x, x0: latents of the current batch) as it is made.

    Raises ValueError for a setting that is out of range or a size that the model cannot make.
    """
    own, source = model.defaults, None
    row, sigmas = plan_sampling(model, steps, sampler, spacing)
    if image is not None:
        source = Source(image, mask, len(prompts), model.image_channels, model.multiple)
        strength = given(strength, model.usual_strength(mask is not None))
        sigmas = sigmas[len(sigmas) - 1 - steps_taken(strength, len(sigmas) - 1) :]
        for name, asked, own_size in (("height", height, source.height), ("width", width, source.width)):
            if asked not in (None, own_size):
                raise ValueError(f"{name} {asked} is not that of the picture, {own_size}: resize the picture first")
        height, width = source.pixels.shape[-2:]
    elif mask is not None or strength is not None:
        raise ValueError("a mask and a strength are for drawing over a picture, and no image is given")
    seeds = list(range(seed, seed + len(prompts)) if seeds is None else seeds)
    scale, negative = plan_guidance(model, scale, negative)
    negatives = negative if isinstance(negative, list | tuple | Tensor) else [negative] * len(prompts)
    if batch_size < 1 or not len(prompts) == len(seeds) == len(negatives):
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds and negative prompts, and batches of at least 1; "
            f"got {len(seeds)} seeds, {len(negatives)} negative prompts, batch_size {batch_size}"
        )
    run = _Run(
        sampler=partial(row, sigmas=sigmas, eta=eta),
        sigmas=sigmas,
        strength=strength,
        size=model.latent_size(given(height, own["height"]), given(width, own["width"])),
        scale=scale,
        interval=tuple(given(given(interval, own["interval"]), guidance.ALL_SIGMAS)),
        rescale=rescale,
        start_seed=seeds[0] if fixed_code and seeds else None,
        guide=given(guide, model.guide),
        callback=callback,
    )
    lengths = count_chunks(model.cond_stage_model, prompts, plain)
    if scale != 1:
        lengths = list(map(max, lengths, count_chunks(model.cond_stage_model, negatives, plain)))
    images = []
    for batch in batches(lengths, batch_size):
        part = None if source is None else source[batch]
        encode = partial(model.condition, chunks=lengths[batch.start], clip_skip=clip_skip, plain=plain)
        cond, uncond = encode(prompts[batch]), None if scale == 1 else encode(negatives[batch])
        images += to_pil(_draw(model, run, prompts[batch], cond, uncond, seeds[batch], part))
    return images


def plan_sampling(
    model: Any, steps: int | None = None, sampler: str | None = None, spacing: str | None = None
) -> tuple[Sampler, list[float]]:
    """The sampler and the levels that it visits, in sigma; what is None is the model's own default.

    Raises ValueError for an unknown name, and for steps that the model's schedule does not have.
    """
    own = model.defaults
    steps = given(steps, own["steps"])
    row = get_sampler(choose_sampler(given(sampler, own["sampler"]), steps, model.schedule.T))
    spacing = given(given(spacing, own["spacing"]), row.spacing)
    return row, sampling_sigmas(model.schedule, steps, spacing, row.final_sigma).tolist()


def plan_guidance(model: Any, scale: float | None = None, negative: Any = None) -> tuple[float, Any]:
    """The scale and what to steer away from; what is None is the model's own. ValueError where there is nothing to."""
    scale, negative = given(scale, model.defaults["scale"]), given(negative, model.null)
    if isinstance(negative, str) and negative == "":  # as scripts give it: nothing, in a model's own words for it
        negative = model.null
    if scale != 1 and (negative is None or model.cond_stage_model is None):
        raise ValueError(f"scale {scale} has nothing to steer away from: this model is drawn with scale 1")
    return scale, negative


def _draw(
    model: Any,
    run: "_Run",
    prompts: Sequence[Any],
    cond: Cond,
    uncond: Cond | None,
    seeds: list[int],
    source: Source | None,
) -> Tensor:
    """One batch of `generate`: its pixels (b, c, h, w) in [-1, 1], or uint8 where there is a source."""
    noise = SeededNoise(seeds, run.size)
    start = noise()
    if run.start_seed is not None:
        start = SeededNoise([run.start_seed], run.size)().expand_as(start)
    start = start.to(model.device)
    if model.concat is not None:
        picture = _concat(model, source, run.size, len(seeds))
        cond, uncond = cond | picture, None if uncond is None else uncond | picture
    denoise = guidance.classifier_free(
        model.denoiser(seeds), cond, uncond, run.scale, run.interval, run.rescale, model.prediction
    )
    if run.guide is not None:
        denoise = guidance.in_interval(run.interval, run.guide(denoise, cond, prompts), denoise)
    if model.clip is not None:
        denoise = guidance.clip_x0(denoise, model.clip)
    x = from_vp(start, run.sigmas[0])
    if source is not None:
        x, denoise = _over(model, source, x, start, run, denoise)
    for step in run.sampler(denoise, x, noise=noise) if len(run.sigmas) > 1 else ():
        if run.callback is not None:
            run.callback(step)
        x = step.x
    pixels = model.decode(to_vp(x, run.sigmas[-1]))
    return pixels if source is None else source.finish(pixels)


def _concat(model: Any, source: Source | None, size: tuple[int, int, int], count: int) -> Cond:
    """What a model with `concat` is given of the source; with text alone, that there is none of it."""
    if source is None and model.concat == "latents":
        return {"c_concat": torch.zeros(count, *size, device=model.device)}
    if source is None:
        height, width = (model.downsampling * side for side in size[1:])
        images, mask = torch.zeros(1, model.image_channels, height, width), None
    else:
        images, mask = source.pixels, source.mask
    picture = model.concat_image(images, torch.ones_like(images[:, :1]) if mask is None else mask)
    return {key: value.expand(count, -1, -1, -1) for key, value in picture.items()}


def _over(
    model: Any, source: Source, x: Tensor, start: Tensor, run: "_Run", denoise: BoundDenoise
) -> tuple[Tensor, BoundDenoise]:
    """(x, denoise) for drawing over a source, where x is the source at the first level that is denoised.

    With all steps to take, nothing of it is in the x of what is drawn anew: x stays noise alone under a mask, and
    where the model is given the whole picture in its input.
    """
    known, mask = model.encode(source.pixels, mode=True).float(), source.mask
    noised = known + run.sigmas[0] * start
    if mask is not None:
        mask = nn.functional.adaptive_max_pool2d(mask, run.size[1:]).to(x)  # a latent is new if any pixel of it is
        if model.concat in (None, "latents"):  # the others are told of the mask
            denoise = guidance.inpaint(denoise, known, mask)
    if run.strength < 1:
        return noised, denoise
    if mask is None:
        return x if model.concat == "latents" else noised, denoise
    return torch.lerp(noised, x, mask), denoise


class _Run(NamedTuple):
    """What all batches of a `generate` have in common."""

    sampler: Callable[..., Iterator[Step]]
    sigmas: list[float]
    strength: float | None
    size: tuple[int, int, int]
    scale: float
    interval: tuple[float, float]
    rescale: float
    start_seed: int | None  # of the start noise that all pictures share
    guide: guidance.Guide | None
    callback: Callable[[Step], None] | None


def given(value: Any, default: Any) -> Any:
    """`value`, or the default where it is None (0 and "" are values)."""
    return default if value is None else value
