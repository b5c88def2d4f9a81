"""Generate images from recipes: a planned run of them, or one image again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.arrays import Tensor, float32_or_wider, to_numpy
from ldm.changes import changes_of, changes_to_text, same_changes
from ldm.conditioning.prompt import count_chunks
from ldm.conditioning.tokenizer import Tokenizer
from ldm.diffusion.guidance import Guide
from ldm.diffusion.sampling import Step, choose_sampler, get_sampler, sampler_named
from ldm.generation import given, plan_sampling, steps_taken
from ldm.inference.recipe import Recipe
from ldm.onnx.model import OnnxModel
from ldm.settings import Settings, of_model, setting_rows

if TYPE_CHECKING:  # they import torch
    from ldm.inference.init_image import InitImage
    from ldm.latent_diffusion import LatentDiffusion

Callback = Callable[[Step], None]


class Generated(NamedTuple):
    """An image, what made it, and its index among all images that the model generated in this run."""

    recipe: Recipe
    image: Image.Image
    index: int


def default_recipe(model: "LatentDiffusion", name: str, **settings: object) -> Recipe:
    """Return the recipe of the model's own defaults, with those `settings` that are not None in their place."""
    own = {key: value for key, value in of_model(model.defaults).items() if value is not None}
    own |= {"precision": _precision_of(model), "model_hash": model.hash, "model_name": name}
    return _complete(Recipe(**own, changes=changes_of(model)), model, settings)


def change_recipe(recipe: Recipe, model: "LatentDiffusion", **settings: object) -> Recipe:
    """Return the recipe with those `settings` that are not None in their place.

    Another sampler brings its own spacing and eta; another batch size puts the image at the head of its batch.
    """
    if settings.get("sampler") is not None:
        recipe = replace(recipe, spacing=None, eta=None)
    if settings.get("seed") is not None:
        recipe = replace(recipe, index=0)  # an image of its own, not of the old run
    if settings.get("batch_size") is not None:
        recipe = replace(recipe, batch_position=0, batch_prompts=1, prompt_position=0)
    return _complete(recipe, model, settings)


def _complete(recipe: Recipe, model: "LatentDiffusion", settings: Mapping[str, object]) -> Recipe:
    """Put in the settings and what the sampler decides. ValueError for a setting without the one that it needs."""
    recipe = recipe.changed(**settings)
    for name, row in setting_rows(Recipe).items():
        if row.needs and row.flags and settings.get(name) is not None and recipe.is_default(row.needs):
            raise ValueError(f"{row.flags[0]} has no effect without --{row.needs.removesuffix('_hash')}")
    name, spacing = choose_sampler(recipe.sampler, recipe.steps, model.schedule.T), sampler_named(recipe.sampler)[1]
    row, spacing = get_sampler(name), given(settings.get("spacing"), given(spacing, recipe.spacing))
    return replace(recipe, sampler=name, spacing=given(spacing, row.spacing), eta=given(recipe.eta, row.eta))


def check_recipes(model: "LatentDiffusion", recipes: Sequence[Recipe]) -> None:
    """Raise ValueError for what the model cannot be sampled with: noise levels, size, long prompts, CLIP's layers."""
    for recipe in recipes:
        plan_sampling(model, recipe.steps, recipe.sampler, recipe.spacing, recipe.final_sigma)
        model.latent_size(recipe.height, recipe.width)
        chunks(model, recipe, [recipe.prompt])
    for clip_skip in {recipe.clip_skip for recipe in recipes} - {1}:  # the text alone needs no network
        model.condition([model.null], clip_skip=clip_skip)


def check_other(model: "LatentDiffusion", recipe: Recipe, prompt: str) -> None:
    """Raise ValueError where the model reads another prompt as that of the recipe, in other letters, say."""
    found = model.condition([recipe.prompt, prompt], clip_skip=recipe.clip_skip, plain=recipe.plain).values()
    both = [to_numpy(float32_or_wider(part)) for part in found]  # numpy has no bfloat16
    if prompt != recipe.prompt and all(np.allclose(part[0], part[1]) for part in both):
        raise ValueError(f"this model reads {prompt!r} as it reads {recipe.prompt!r}: give --to other words than those")


def generate_run(
    model: "LatentDiffusion",
    recipes: Sequence[Recipe],
    callback: Callback | None = None,
    init: "InitImage | None" = None,
    guide: Guide | None = None,
    noise: Tensor | None = None,
) -> Iterator[Generated]:
    """Generate a planned run (`recipe.plan`), yielding each image when its batch is done, so that it can be saved then.

    With `fixed_code` all images come from one call, whose image 0 gives them their start.

    init: of the recipes' size. noise: of each image, see `generate`.
    """
    done = 0
    while done < len(recipes):
        first = recipes[done]
        batch = recipes[done : done + first.batch_size]
        if first.fixed_code:
            batch = recipes[done:]
            first = replace(first, batch_size=max(r.batch_size for r in batch))
        prompts, seeds, arguments = [r.prompt for r in batch], [r.seed for r in batch], arguments_of(model, first, init)
        prompts = prompts if init is None else init.prompts(model, prompts)
        arguments["noise"] = None if noise is None else noise[done : done + len(batch)]
        images = _generator(model)(prompts, seeds=seeds, guide=guide, callback=callback, **arguments)
        for index, (recipe, image) in enumerate(zip(batch, images, strict=True), start=done):
            yield Generated(recipe, image, index)
        done += len(batch)


def generate_again(
    model: "LatentDiffusion",
    recipe: Recipe,
    callback: Callback | None = None,
    init: "InitImage | None" = None,
    guide: Guide | None = None,
) -> Iterator[Generated]:
    """Generate that recipe's image, to the byte: at the same place of a batch of the same shape."""
    if recipe.model_hash not in ("", model.hash):
        raise ValueError(
            f"the image was made by the model {recipe.model_name} with hash {recipe.model_hash}, "
            f"but the one loaded has hash {model.hash}: name the right checkpoint with --ckpt"
        )
    if not same_changes(recipe.changes, changes_of(model)):
        made, now = (changes_to_text(changes) or "nothing" for changes in (recipe.changes, changes_of(model)))
        raise ValueError(
            f"the image was made with {made} in the model, which now has {now}: give the same --lora, --vae ..."
        )
    shape = recipe
    if not isinstance(model.tokenizer, Tokenizer):  # others take classes, and encode each, equal or not
        shape = replace(recipe, batch_prompts=1, prompt_position=0)
    from ldm.inference.again import refill

    prompts = refill(shape, lambda prompt: chunks(model, recipe, [prompt])[0])
    seeds, place = [recipe.seed] * recipe.batch_size, recipe.batch_position
    if recipe.fixed_code:  # a batch of image 0 goes before, for its start noise
        prompts, seeds = prompts * 2, [recipe.seed - recipe.index] * recipe.batch_size + seeds
        place += recipe.batch_size
    arguments = arguments_of(model, recipe, init)
    prompts = prompts if init is None else init.prompts(model, prompts)
    images = _generator(model)(prompts, seeds=seeds, guide=guide, callback=callback, **arguments)
    yield Generated(recipe, images[place], place)


@contextmanager
def progress(recipes: Sequence[Recipe], recorder: Callback | None = None) -> Iterator[Callback]:
    """Give a callback that feeds the recorder and a progress bar, which a terminal shows after two seconds."""
    batches = [recipe for recipe in recipes if recipe.batch_position == 0] or recipes[:1]
    with tqdm(total=sum(map(steps_of, batches)), unit="step", delay=2, disable=None, leave=False) as bar:

        def callback(step: Step) -> None:
            bar.update()
            if recorder is not None:
                recorder(step)

        yield callback


def chunks(model: "LatentDiffusion", recipe: Recipe, prompts: Sequence[str]) -> list[int]:
    """Return how many chunks each prompt makes, or the recipe's negative prompt if that makes more."""
    lengths = count_chunks(model.cond_stage_model, prompts, recipe.plain)
    (least,) = [1] if recipe.scale == 1 else count_chunks(model.cond_stage_model, [recipe.negative], recipe.plain)
    return [max(length, least) for length in lengths]


def steps_of(recipe: Recipe) -> int:
    """Return how many denoising steps the recipe's image takes."""
    return recipe.steps if recipe.strength is None else steps_taken(recipe.strength, recipe.steps)


def _generator(model: "LatentDiffusion") -> Callable[..., list[Image.Image]]:
    """Return what generates with a model; where a module of torch makes NaN or infinity, it is named."""
    if isinstance(model, OnnxModel):
        return model.generate
    from ldm.inference.nan_check import generate_checked

    return partial(generate_checked, model)


def _precision_of(model: "LatentDiffusion") -> str:
    if isinstance(model, OnnxModel):
        return "full"
    from ldm.inference.precision import precision_of

    return precision_of(model)


def arguments_of(model: "LatentDiffusion", recipe: Recipe, init: "InitImage | None") -> dict[str, Any]:
    """Return the arguments of `generate` that a recipe decides, and put the model into its precision."""
    if recipe.precision != _precision_of(model):
        if isinstance(model, OnnxModel):
            raise ValueError(f"an ONNX model computes in precision full: for {recipe.precision}, name the checkpoint")
        from ldm.inference.precision import set_precision

        set_precision(model, recipe.precision)
    return {
        "negative": recipe.negative,
        "batch_size": recipe.batch_size,
        **({} if init is None else init.arguments()),
        **{name: getattr(recipe, name) for name in setting_rows(Settings)},
    }
