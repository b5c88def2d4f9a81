"""Drawing recipes with a model: a run of them, or one again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ldm.conditioning.prompt import count_chunks
from ldm.conditioning.text import TextEncoder
from ldm.diffusion.sampling import Step, choose_sampler, get_sampler
from ldm.inference.nan_check import generate_checked
from ldm.inference.original import Original
from ldm.inference.precision import precision_of, set_precision
from ldm.inference.recipe import EVERYWHERE, Recipe, refill
from ldm.latent_diffusion import LatentDiffusion
from ldm.source import steps_taken

Callback = Callable[[Step], None]


class Drawn(NamedTuple):
    """A picture, what made it, and its place among all pictures that the model drew in this run."""

    recipe: Recipe
    image: Image.Image
    place: int


def own_recipe(model: LatentDiffusion, name: str, **settings: object) -> Recipe:
    """The recipe of the model's own defaults, with those `settings` that are not None in their place."""
    own = model.defaults
    interval = own.get("interval")
    recipe = Recipe(
        prompt="",
        negative="",
        steps=own["steps"],
        sampler=own["sampler"],
        scale=own["scale"],
        seed=0,
        width=own["width"],
        height=own["height"],
        spacing=own.get("spacing"),
        interval=EVERYWHERE if interval is None else tuple(map(float, interval)),
        precision=precision_of(model),
        model_hash=model.hash,
        changes="; ".join(model.changes),
        model_name=name,
    )
    return _complete(recipe.changed(**settings), model)


def changed_recipe(recipe: Recipe, model: LatentDiffusion, **settings: object) -> Recipe:
    """The recipe with those `settings` that are not None in their place; another sampler brings its own spacing, eta.

    A `batch_size` draws the picture at the head of such a batch instead of at its old place.
    """
    if settings.get("sampler") is not None:
        recipe = replace(recipe, spacing=None, eta=None)
    if settings.get("seed") is not None:
        recipe = replace(recipe, index=0)  # a picture of its own, not of the old run
    if settings.get("batch_size") is not None:
        recipe = replace(recipe, batch_position=0, batch_prompts=1, prompt_position=0)
    return _complete(recipe.changed(**settings), model)


def _complete(recipe: Recipe, model: LatentDiffusion) -> Recipe:
    """Write out what the sampler decides, so that the PNG tells it. ValueError for an unknown sampler."""
    name = choose_sampler(recipe.sampler, recipe.steps, model.schedule.T)
    row = get_sampler(name)
    return replace(
        recipe,
        sampler=name,
        spacing=row.spacing if recipe.spacing is None else recipe.spacing,
        eta=row.eta if recipe.eta is None else recipe.eta,
    )


def draw(
    model: LatentDiffusion,
    recipes: Sequence[Recipe],
    callback: Callback | None = None,
    original: Original | None = None,
) -> Iterator[Drawn]:
    """Draw a planned run (`recipe.plan`), yielding each picture when its batch is done, so that it can be saved then.

    They are drawn over the original, if there is one, which has the recipes' size. With `fixed_code` all pictures come
    from one call, whose picture 0 gives them their start.
    """
    done = 0
    while done < len(recipes):
        first = recipes[done]
        batch = recipes[done : done + first.batch_size]
        if first.fixed_code:
            batch = recipes[done:]
            first = replace(first, batch_size=max(r.batch_size for r in batch))
        images = _generate(model, first, [r.prompt for r in batch], [r.seed for r in batch], callback, original)
        for place, (recipe, image) in enumerate(zip(batch, images, strict=True), start=done):
            yield Drawn(recipe, image, place)
        done += len(batch)


def draw_again(
    model: LatentDiffusion, recipe: Recipe, callback: Callback | None = None, original: Original | None = None
) -> Iterator[Drawn]:
    """Draw that recipe's picture, to the byte: at the same place of a batch of the same shape.

    Raises ValueError if another model made it.
    """
    if recipe.model_hash not in ("", model.hash):
        raise ValueError(
            f"the picture was made by the model {recipe.model_name} with hash {recipe.model_hash}, "
            f"but the one loaded has hash {model.hash}: name the right checkpoint with --ckpt"
        )
    if recipe.changes != "; ".join(model.changes):
        raise ValueError(
            f"the picture was made with {recipe.changes or 'nothing'} in the model, and now there is "
            f"{'; '.join(model.changes) or 'nothing'}: give the same options"
        )
    shape = recipe
    if not isinstance(model.cond_stage_model, TextEncoder):  # others take classes, and encode each, equal or not
        shape = replace(recipe, batch_prompts=1, prompt_position=0)
    prompts = refill(shape, lambda prompt: chunks(model, recipe, [prompt])[0])
    seeds, place = [recipe.seed] * recipe.batch_size, recipe.batch_position
    if recipe.fixed_code:  # a batch of picture 0 goes before, for its start noise
        prompts, seeds = prompts * 2, [recipe.seed - recipe.index] * recipe.batch_size + seeds
        place += recipe.batch_size
    yield Drawn(recipe, _generate(model, recipe, prompts, seeds, callback, original)[place], place)


@contextmanager
def watching(recipes: Sequence[Recipe], recorder: Callback | None = None) -> Iterator[Callback]:
    """A callback that feeds the recorder and moves a progress bar, which a terminal shows after two seconds."""
    batches = max(1, sum(recipe.batch_position == 0 for recipe in recipes))
    with tqdm(total=batches * steps_of(recipes[0]), unit="step", delay=2, disable=None, leave=False) as bar:

        def callback(step: Step) -> None:
            bar.update()
            if recorder is not None:
                recorder(step)

        yield callback


def chunks(model: LatentDiffusion, recipe: Recipe, prompts: Sequence[str]) -> list[int]:
    """How many chunks each prompt makes, or the recipe's negative prompt if that makes more."""
    lengths = count_chunks(model.cond_stage_model, prompts, recipe.plain)
    (least,) = [1] if recipe.scale == 1 else count_chunks(model.cond_stage_model, [recipe.negative], recipe.plain)
    return [max(length, least) for length in lengths]


def steps_of(recipe: Recipe) -> int:
    """How many steps the recipe's picture takes."""
    return recipe.steps if recipe.strength is None else steps_taken(recipe.strength, recipe.steps)


def _generate(
    model: LatentDiffusion,
    recipe: Recipe,
    prompts: list[str],
    seeds: list[int],
    callback: Callback | None,
    original: Original | None,
) -> list[Image.Image]:
    """`generate_checked` with the settings of the recipe, the model put into its precision if it is in another one."""
    if recipe.precision != precision_of(model):
        set_precision(model, recipe.precision)
    images = generate_checked(
        model,
        prompts,
        negative=recipe.negative,
        steps=recipe.steps,
        scale=recipe.scale,
        sampler=recipe.sampler,
        spacing=recipe.spacing,
        eta=recipe.eta,
        seeds=seeds,
        height=recipe.height,
        width=recipe.width,
        batch_size=recipe.batch_size,
        fixed_code=recipe.fixed_code,
        interval=recipe.interval,
        rescale=recipe.rescale,
        clip_skip=recipe.clip_skip,
        plain=recipe.plain,
        image=None if original is None else original.image,
        mask=None if original is None else original.mask,
        strength=recipe.strength,
        callback=callback,
    )
    if original is not None:
        for image in images:
            original.give_profile(image)
    return images
