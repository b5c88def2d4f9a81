"""From prompts to images: condition, guide, sample, decode. `LatentDiffusion.generate` is `generate` here."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from ldm.arrays import Tensor, cast_like, is_tensor, library
from ldm.batching import batches, of_ends
from ldm.conditioning.prompt import count_chunks
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import Cond, from_vp, to_vp
from ldm.diffusion.sampling import Sampler, Step, choose_sampler, get_sampler, sampler_named
from ldm.diffusion.schedule import sampling_sigmas
from ldm.images import to_pil
from ldm.settings import ALL_SIGMAS, BATCH_SIZE, SEED, Settings, check_size, documented, from_keywords, listed, of_model

if TYPE_CHECKING:
    from ldm.init_image import Images, InitImages

SIZE_SETTINGS = ("original_size", "crop", "aesthetic_score")  # Stable Diffusion XL's


@documented
def generate(
    model: Any,
    prompts: Sequence[Any],
    negative: Any = None,
    *,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    noise: Tensor | None = None,
    image: "Images | None" = None,
    mask: "Images | None" = None,
    batch_size: int | None = 16,
    guide: guidance.Guide | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[Image.Image]:
    """Generate one image per prompt.

    Args:
        model: the LatentDiffusion; not to be given where this is its method.
        prompts: texts; classes or images for models conditioned on those. `ldm.interpolate` makes prompts and seeds
            between two.
        negative: what guidance leads away from: one prompt, or one per image; the null condition if not given.
        seed, seeds: image i has the noise of seed (0) + i, or of seeds[i]: the same alone and in any batch.
        noise: to start from, not from the seeds': unit normal (b, z, h, w); `ldm.editing.invert_images` finds images'.
        image, mask: an init image, or one per prompt, and what to change in it (`ldm.init_image.InitImages`).
        batch_size: images at a time; bounds memory and changes nothing else.
        guide: guidance besides the classifier-free one (`ldm.inference.guiders`): guide(denoise, cond, prompts) ->
            denoise.
        callback: is given every `Step` (index, sigma, x, x0: latents of the current batch) as it is made.
        progress: show a bar of all denoising steps.
        **settings: `ldm.settings.Settings`.
    """
    chosen, own, init = from_keywords(settings), of_model(model.defaults), None
    prompts = prompts if is_tensor(prompts) else listed("prompts", prompts)
    seeds, batch_size = _seeds(seed, seeds, len(prompts)), BATCH_SIZE.checked("batch_size", given(batch_size, 16))
    for name, function in (("guide", guide), ("callback", callback)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}")
    sampler, sigmas = plan_sampling(model, chosen.steps, chosen.sampler, chosen.spacing, chosen.final_sigma)
    strength, height, width = chosen.strength, given(chosen.height, own["height"]), given(chosen.width, own["width"])
    if image is not None:
        from ldm.init_image import prepare_images  # only where there is one

        init = prepare_images(model, image, mask, len(prompts), chosen)
        strength = given(strength, model.default_strength(mask is not None))
        sigmas = sigmas[len(sigmas) - 1 - steps_taken(strength, len(sigmas) - 1) :]
        height, width = init.pixels.shape[-2:]  # padded
    elif mask is not None or strength is not None:
        raise ValueError("mask and strength need an init image: give image too")
    scale, negative = plan_guidance(model, chosen.scale, negative)
    several = isinstance(negative, list | tuple) or is_tensor(negative)
    negatives = negative if several else [negative] * len(prompts)
    if not len(prompts) == len(seeds) == len(negatives):
        raise ValueError(
            f"{len(prompts)} prompts need as many seeds and negative prompts; "
            f"got {len(seeds)} seeds, {len(negatives)} negative prompts"
        )
    interval = tuple(given(given(chosen.interval, own["interval"]), ALL_SIGMAS))
    chosen = replace(chosen, strength=strength, scale=scale, interval=interval)
    # A size that the UNet does not make is padded: more is generated, and cut off below. So are inverted images.
    refused = model.downsampling if noise is None else 1
    padded = (side if side % refused else side + -side % model.multiple for side in (height, width))
    size, first = model.latent_size(*padded), seeds[0] if seeds else 0
    if noise is not None and chosen.fixed_code:
        raise ValueError("fixed_code would have no effect beside noise: leave one of them out")
    if noise is not None and (found := tuple(getattr(noise, "shape", ()))) != (shape := (len(prompts), *size)):
        raise ValueError(f"noise to start these images from is a tensor {shape}, got {found}")
    lengths = count_chunks(model.cond_stage_model, prompts, chosen.plain)
    if scale != 1:
        lengths = list(map(max, lengths, count_chunks(model.cond_stage_model, negatives, chosen.plain)))
    sizes, negative_sizes = plan_sizes(model, chosen, (height, width))
    images, parts = [], batches(lengths, batch_size)
    with tqdm(total=len(parts) * (len(sigmas) - 1), unit="step", disable=not progress) as bar:
        run = _Run(chosen, sampler, sigmas, size, first, guide, callback, bar)
        for batch in parts:
            part, start = None if init is None else init[batch], None if noise is None else noise[batch]
            options = {"chunks": lengths[batch.start], "clip_skip": chosen.clip_skip, "plain": chosen.plain}
            cond = model.condition(prompts[batch], **options, **sizes)
            uncond = None if scale == 1 else model.condition(negatives[batch], **options, **negative_sizes)
            pixels = _sample(model, run, prompts[batch], cond, uncond, seeds[batch], start, part)
            images += to_pil(pixels[..., :height, :width])
    return images


def plan_sizes(model: Any, chosen: Settings, size: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return further arguments of `condition` for prompts and negative prompts of images of this size in pixels."""
    settings = {name: getattr(chosen, name) for name in SIZE_SETTINGS}
    if not hasattr(model.cond_stage_model, "with_sizes") and set(settings.values()) == {None}:
        return {}, {}
    from ldm.conditioning.sizes import sizes_of  # which few models need

    return sizes_of(model, settings, size)


def _seeds(seed: int | None, seeds: Sequence[int] | None, count: int) -> list[int]:
    """Return `count` seeds from `seed` (0) on, or those that are given. ValueError for what is not a seed."""
    if seeds is not None and seed is not None:
        raise ValueError(f"seed {seed} would have no effect beside seeds: leave one of them out")
    if seeds is not None:
        return [of_ends(lambda own: SEED.checked("seed", own), one) for one in listed("seeds", seeds)]
    first = SEED.checked("seed", given(seed, 0))
    return list(range(first, first + count))


def steps_taken(strength: float, steps: int) -> int:
    """Return how many of the steps a strength takes: strength x steps, rounded down, but at least 1 if above 0.

    As in CompVis's img2img, but in decimals: 0.29 of 100 steps are 29, though 0.29 * 100 is 28.999999999999996.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 to 1, got {strength}")
    return max(int(round(strength * steps, 6)), 1 if strength > 0 else 0)


def plan_sampling(
    model: Any,
    steps: int | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    final_sigma: str | None = None,
) -> tuple[Sampler, list[float]]:
    """Return the sampler and the noise levels that it visits, in sigma; what is None is the model's own default.

    A spacing in the sampler's name ("DPM++ 2M Karras") comes before the model's own.
    """
    own = of_model(model.defaults)
    steps = given(steps, own["steps"])
    name = given(sampler, own["sampler"])
    row = get_sampler(choose_sampler(name, steps, model.schedule.T))
    spacing = given(spacing, given(sampler_named(name)[1], given(own["spacing"], row.spacing)))
    final = given(final_sigma, own["final_sigma"])
    return row, sampling_sigmas(model.schedule, steps, spacing, final).tolist()


def plan_guidance(model: Any, scale: float | None = None, negative: Any = None) -> tuple[float, Any]:
    """Return the guidance scale and the negative condition; what is None is the model's own."""
    scale, negative = given(scale, of_model(model.defaults)["scale"]), given(negative, model.null)
    if isinstance(negative, str) and negative == "":  # scripts' way to give none
        negative = model.null
    if scale != 1 and (negative is None or model.cond_stage_model is None):
        raise ValueError(f"guidance scale {scale:g} needs a null or negative condition; use scale 1")
    return scale, negative


def check_defaults(model: Any) -> tuple[int, int, int]:
    """Return the latents' size by the model's own settings. ValueError where no image can be generated with those."""
    try:
        plan_sampling(model)
        plan_guidance(model)
        return model.latent_size(model.defaults["height"], model.defaults["width"])
    except ValueError as error:
        raise ValueError(f"the model's defaults: {error}") from None


def latent_size(model: Any, height: int, width: int) -> tuple[int, int, int]:
    """Return the (z, h, w) of the latents of an image of that size in pixels; ValueError if it does not fit."""
    defaults, own = of_model(model.defaults), model.multiple
    check_size(width, height, defaults["width"], defaults["height"])
    for name, size in (("height", height), ("width", width)):
        if size < own or size % own:
            raise ValueError(f"{name} {size} cannot be made by this model: use a positive multiple of {own}")
    return model.channels, height // model.downsampling, width // model.downsampling


def _sample(
    model: Any,
    run: "_Run",
    prompts: Sequence[Any],
    cond: Cond,
    uncond: Cond | None,
    seeds: list[int],
    start: Tensor | None,
    init: "InitImages | None",
) -> Tensor:
    """Sample one batch: its pixels (b, c, h, w) in [-1, 1], or uint8 where there is an init image."""
    scale, interval, rescale = run.settings.scale, run.settings.interval, run.settings.rescale
    noise = model.seeded_noise(seeds, run.size)
    own = noise()
    start = own if start is None else cast_like(start, own)
    if run.settings.fixed_code:
        start = library(own).broadcast_to(model.seeded_noise([run.first_seed], run.size)(), own.shape)
    start = library(own).asarray(start, device=model.device)
    if model.concat is not None:
        from ldm.init_image import concat_for  # only such models need it

        extra = concat_for(model, init, run.size, len(seeds))
        cond, uncond = cond | extra, None if uncond is None else uncond | extra
    denoise = guidance.classifier_free(model.denoiser(seeds), cond, uncond, scale, interval, rescale, model.prediction)
    if run.guide is not None:
        denoise = guidance.in_interval(interval, run.guide(denoise, cond, prompts), denoise)
    if model.clip is not None:
        denoise = guidance.clip_x0(denoise, model.clip)
    x = from_vp(start, run.sigmas[0])
    if init is not None:
        from ldm.init_image import start_from_image

        x, denoise = start_from_image(model, init, x, start, run.sigmas[0], run.settings.strength, denoise)
    steps = run.sampler(denoise, x, run.sigmas, eta=run.settings.eta, noise=noise) if len(run.sigmas) > 1 else ()
    for step in steps:
        run.bar.update()
        if run.callback is not None:
            run.callback(step)
        x = step.x
    pixels = model.decode(to_vp(x, run.sigmas[-1]))
    return pixels if init is None else init.finish(pixels)


class _Run(NamedTuple):
    """What all batches of a `generate` have in common."""

    settings: Settings  # with the model's own strength, scale and interval where none was given
    sampler: Sampler
    sigmas: list[float]
    size: tuple[int, int, int]  # of a latent
    first_seed: int  # of the start noise that all images share with `fixed_code`
    guide: guidance.Guide | None
    callback: Callable[[Step], None] | None
    bar: tqdm


def given(value: Any, default: Any) -> Any:
    """Return `value`, or the default where it is None (0 and "" are values)."""
    return default if value is None else value
