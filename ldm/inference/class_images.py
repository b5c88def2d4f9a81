"""Class images: what the model itself generates for the class's prompt before tuning (Ruiz et al. 2022, sec. 3.3).

They are PNG files named class-KEY-SEED.png, where the key stands for everything that decides them (model, prompt, size,
sampling) but the seed, and each carries its recipe. So a folder can hold those of many models and prompts, and a second
run finds its own; any other image there is the user's.
"""

import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.conditioning.prompt import count_chunks
from ldm.data.buckets import bucket_shapes
from ldm.data.dreambooth import DreamBooth, Subject, as_list, choices, identifiers, notes_on_images, subjects
from ldm.data.folder import find_images
from ldm.finetune.parts import known_prompts
from ldm.inference.generate import default_recipe, generate_run
from ldm.inference.recipe import Recipe, plan, read_png_text, save_png
from ldm.latent_diffusion import LatentDiffusion

DRAWN = re.compile(r"class-[0-9a-f]{8}-\d{5,}\.png")


def users_images(folder: Path) -> list[str]:
    """Names of the images below the folder that were not drawn for a class; none if there is no such folder."""
    try:
        paths = find_images(folder)
    except FileNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in paths if not DRAWN.fullmatch(path.name)]


class SubjectImages(DreamBooth):
    """DreamBooth's data by folders and prompts; class images that are missing are generated.

    Args:
        model: what generates them: the one that will be tuned. It is given by the stage, as `size` and `channels` are.
        instance_data_dir, instance_prompt, class_prompt: one, or a list with one for each subject. Without a class
            there are no class images. A class prompt may have choices (`ldm.data.dreambooth.choices`).
        class_data_dir: the class images' folder, one for all or a list with one for each subject.
        keep_prompt: prompts, with choices, of what else is kept: as many images of them are generated as of the class.
            None: what the model is known to have learned; "": nothing.
        prior_weight: 0: no class images.
        num_class_images: of each subject; None: your own images in its folder, or, where there are none,
            `default_class_images`.
        class_guidance_scale, sample_batch_size: how class images are generated.
        least: samples in an epoch at least, for each process.
        buckets: cut the subjects' images to the nearest of `bucket_shapes`.
        crop, flip, seed: as in `Folder`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        size: int,
        channels: int,
        instance_data_dir: str | Sequence[str] | None,
        instance_prompt: str | Sequence[str] | None,
        class_data_dir: str | Sequence[str],
        class_prompt: str | Sequence[str] | None = None,
        keep_prompt: str | Sequence[str] | None = None,
        prior_weight: float = 1.0,
        num_class_images: int | None = None,
        default_class_images: int = 200,
        class_guidance_scale: float | None = None,
        sample_batch_size: int = 4,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        least: int = 1,
        buckets: bool = False,
    ) -> None:
        found = subjects(instance_data_dir, instance_prompt, class_prompt, class_data_dir)
        shapes = bucket_shapes(size, model.multiple) if buckets else None
        for note in (note for subject in found for note in notes_on(subject, model)):
            print(f"note: {note}", file=sys.stderr)
        keep = [prompt for one in as_list(keep_prompt) if one for prompt in choices(one)]
        classes = [
            Class(
                one.class_dir,
                choices(one.class_prompt) if one.class_prompt is not None and prior_weight else [],
                num_class_images,
                None if keep_prompt is None else keep,
            )
            for one in found
        ]
        known = known_prompts(model.cond_stage_model.tokenizer)
        model.eval()
        images = collect(model, classes, default_class_images, size, class_guidance_scale, sample_batch_size, known)
        rows = [{"instance_dir": one.instance_dir, "instance_prompt": one.instance_prompt} for one in found]
        for row, one, own in zip(rows, found, images, strict=True):
            if own:
                row |= {"class_dir": one.class_dir, "class_images": own}
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        super().__init__(rows, size, channels, crop, flip, seed, least * processes, shapes)


def notes_on(subject: Subject, model: LatentDiffusion) -> list[str]:
    """Return what a user should know of a subject before it is learned."""
    notes, encoder = notes_on_images(subject.instance_dir), model.cond_stage_model
    kinds = [] if subject.class_prompt is None else choices(subject.class_prompt)
    for word in identifiers(subject.instance_prompt, "" if subject.class_prompt is None else subject.class_prompt):
        tokens = len(encoder.tokenizer.encode(word))
        if tokens > 1:
            notes.append(f"the tokenizer splits {word!r} into {tokens} tokens, which are learned together")
    for prompt in [subject.instance_prompt, *kinds]:
        if count_chunks(encoder, [prompt], True)[0] > 1:
            notes.append(f"the prompt {prompt!r} is too long for the text encoder and is cut")
    return notes


class Class(NamedTuple):
    """A class whose images are wanted in a folder.

    count: None takes all that are not ours, or draws the usual number where there are none.
    keep: prompts besides the class's, of which as many images are drawn. None takes those known of the model where
    all of the class's are drawn; who brings his own has chosen what is kept.
    """

    folder: Path
    prompts: Sequence[str]  # none: no images either
    count: int | None = None
    keep: Sequence[str] | None = None


class Share(NamedTuple):
    """So many images of a prompt, with seeds from 0 on."""

    folder: Path
    prompt: str
    count: int


def collect(
    model: LatentDiffusion,
    classes: Sequence[Class],
    usual: int,
    size: int,
    scale: float,
    batch_size: int,
    known: Sequence[str] = (),
) -> list[dict[str, str | None]]:
    """Of each class, names of its images and their captions: those that are not ours first, the rest drawn.

    The prompts share what is drawn evenly. Images that are not ours are captioned with the prompt if there is one
    alone; if there are several, they need captions of their own, and have none here.

    usual: how many of a class where nobody says. known: prompts of what the model can draw.
    """
    found, shares = zip(*(_wanted(one, usual, known) for one in classes), strict=True)
    names = iter(draw_class_images(model, [share for row in shares for share in row], size, scale, batch_size))
    for images, row in zip(found, shares, strict=True):
        for share in row:
            images |= dict.fromkeys(next(names), share.prompt)
    return list(found)


def _wanted(one: Class, usual: int, known: Sequence[str]) -> tuple[dict[str, str | None], list[Share]]:
    """The images of a class that are not ours with their captions, and what is to be drawn besides."""
    if not one.prompts:
        return {}, []
    folder, prompts, count, keep = one
    own = users_images(folder)
    if count is None:
        count = len(own) if own else usual
    found = dict.fromkeys(own[:count], prompts[0]) if len(prompts) == 1 else dict.fromkeys(own[:count])
    missing = count - len(own)
    if own and missing > 0:
        print(f"class images in {folder}: {len(own)}; the model draws {missing} more")
    if keep is None:
        keep = () if own else known
    shares = []
    for asked, number in ((prompts, missing), ([prompt for prompt in keep if prompt not in prompts], count)):
        counts = [len(range(i, number, len(asked))) for i in range(len(asked))]
        shares += [Share(folder, prompt, part) for prompt, part in zip(asked, counts, strict=True) if part]
    return found, shares


def draw_class_images(
    model: LatentDiffusion, shares: Sequence[Share], size: int, scale: float, batch_size: int
) -> list[list[str]]:
    """Names of the images of each share, size x size pixels; those that are not in its folder are drawn.

    They are written one by one, whole or not at all, so that an interrupted run goes on.

    scale: of guidance. Raises ValueError for a size that the model cannot make, OSError when a file cannot be written.
    """
    from tqdm import tqdm

    first = default_recipe(model, "" if model.path is None else model.path.stem, scale=scale, height=size, width=size)
    runs = [plan(first, [share.prompt], share.count, batch_size) for share in shares]
    paths = [[share.folder / _name(recipe) for recipe in run] for share, run in zip(shares, runs, strict=True)]
    rows = list(zip(runs, paths, strict=True))
    # A set, because shares may overlap: what a subject's class is may be kept beside another subject.
    missing = {path for row in rows for recipe, path in zip(*row, strict=True) if not _is_there(path, recipe)}
    if missing:
        with tqdm(total=len(missing), desc="class images", unit="image") as bar:
            for row in rows:
                for path in _draw_missing(model, *row, missing):
                    missing.remove(path)
                    bar.update()
    return [[path.name for path in row] for row in paths]


def _draw_missing(
    model: LatentDiffusion, recipes: Sequence[Recipe], paths: Sequence[Path], missing: Collection[Path]
) -> Iterator[Path]:
    """Draw a share's images from the first missing one on, and write the missing ones, each yielded when written."""
    places = [i for i, path in enumerate(paths) if path in missing]
    if not places:
        return
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    start = places[0] - recipes[places[0]].batch_position  # whole batches, so that the recipes say what was done
    for drawn in generate_run(model, recipes[start:]):
        path = paths[start + drawn.index]
        if path in missing:
            save_png(drawn.image, path, drawn.recipe.to_text())
            yield path


def _name(recipe: Recipe) -> str:
    key = hashlib.sha256(_whatever_the_batch(recipe).to_text().encode()).hexdigest()[:8]
    return f"class-{key}-{recipe.seed:05}.png"


def _whatever_the_batch(recipe: Recipe) -> Recipe:
    """The recipe without its place in a batch, which moves the last bits of an image only, and without its seed."""
    return replace(recipe, seed=0, index=0, batch_size=1, batch_position=0, batch_prompts=1, prompt_position=0)


def _is_there(path: Path, recipe: Recipe) -> bool:
    try:
        return _whatever_the_batch(Recipe.from_text(read_png_text(path))) == _whatever_the_batch(recipe)
    except (FileNotFoundError, ValueError):  # none, or damaged: drawn anew
        return False
