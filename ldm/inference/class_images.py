"""Class images: images of the class's prompt from the model itself, generated before tuning (Ruiz et al. 2022, 3.3).

They are PNG files class-KEY-SEED.png; the key is a hash of everything that decides them (model, prompt, size, sampling)
except the seed, and each file carries its recipe. So one folder can hold those of several models and prompts, and a
second run finds its own. Any other image in the folder is the user's.
"""

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.conditioning.prompt import count_chunks
from ldm.data.buckets import bucket_shapes
from ldm.data.dreambooth import DreamBooth, Subject, as_list, choices, identifiers, notes_on_images, subjects
from ldm.data.finding import find_images
from ldm.data.image_set import Mask
from ldm.finetune.parts import known_prompts
from ldm.inference.again import read_image_text, recipe_from_text
from ldm.inference.generate import default_recipe, generate_run
from ldm.inference.recipe import Recipe, plan, save_image
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import progress_bar

GENERATED = re.compile(r"class-[0-9a-f]{8}-\d{5,}\.png")


def users_images(folder: Path) -> list[str]:
    """Return the names of the images below the folder that were not generated here."""
    paths = find_images(folder, empty=True)
    return [path.relative_to(folder).as_posix() for path in paths if not GENERATED.fullmatch(path.name)]


class SubjectImages(DreamBooth):
    """DreamBooth's data by folders and prompts; class images that are missing are generated.

    Args:
        model, size, channels, reads: given by the stage; the model to tune generates the class images.
        instance_data_dir, instance_prompt, class_prompt: one, or a list with one for each subject. Without a class
            there are no class images. A class prompt may have choices (`ldm.data.dreambooth.choices`).
        class_data_dir: the class images' folder, one for all or a list with one for each subject.
        keep_prompt: prompts, with choices, of what else is kept: as many images of them are generated as of the class.
            None: what the model is known to have learned; "": nothing.
        prior_weight: 0: no class images.
        num_class_images, default_class_images: how many of each subject. None: as many as your own images in its
            folder, or, where there are none, the default.
        class_guidance_scale, sample_batch_size: how class images are generated.
        min_samples: smallest number of samples in an epoch, for each process.
        buckets: cut the subjects' images to the nearest of `bucket_shapes`.
        mask: as in `Folder`, for the subjects' images.
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
        min_samples: int = 1,
        buckets: bool = False,
        mask: Mask | None = None,
        reads: Sequence[str] = ("image", "caption"),
    ) -> None:
        if class_prompt is None and (num_class_images is not None or any(as_list(keep_prompt))):
            raise ValueError("num_class_images and keep_prompt need class_prompt: without it there are no class images")
        found = subjects(instance_data_dir, instance_prompt, class_prompt, class_data_dir)
        shapes = bucket_shapes(size, model.multiple) if buckets else None
        for note in (note for subject in found for note in notes_on(subject, model)):
            print(f"note: {note}", file=sys.stderr)
        keep = None
        if keep_prompt is not None:
            keep = [prompt for one in as_list(keep_prompt) if one for prompt in choices(one)]
        prompts = [choices(one.class_prompt) if one.class_prompt is not None and prior_weight else [] for one in found]
        classes = [Class(one.class_dir, own, num_class_images, keep) for one, own in zip(found, prompts, strict=True)]
        known = known_prompts(model.cond_stage_model.tokenizer)
        generated = (default_class_images, size, class_guidance_scale, sample_batch_size, known)
        self._collect = partial(collect, model, classes, *generated)
        rows = [one._asdict() for one in found]
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        super().__init__(rows, size, channels, crop, flip, seed, min_samples * processes, shapes, mask, reads)

    def class_images(self, subjects: Sequence[Mapping[str, Any]]) -> list[dict[str, str | None] | None]:
        """Generate the class images that are missing, once all that the user has is known to be good."""
        return [images or None for images in self._collect()]


def notes_on(subject: Subject, model: LatentDiffusion) -> list[str]:
    """Return what a user should know of a subject before it is learned."""
    notes, encoder = notes_on_images(subject.instance_dir), model.cond_stage_model
    kinds = [] if subject.class_prompt is None else choices(subject.class_prompt)
    for word in identifiers(subject.instance_prompt, subject.class_prompt or ""):
        tokens = len(encoder.tokenizer.encode(word))
        if tokens > 1:
            notes.append(f"the tokenizer splits {word!r} into {tokens} tokens, which are learned together")
    for prompt in [subject.instance_prompt, *kinds]:
        if count_chunks(encoder, [prompt], True)[0] > 1:
            notes.append(f"the prompt {prompt!r} is too long for the text encoder and is cut")
    return notes


class Class(NamedTuple):
    """The class images that a subject needs."""

    folder: Path
    prompts: Sequence[str]  # of the class; empty: no images either
    count: int | None = None  # None: all of the user's images, or the default number where there are none
    # Other prompts, of which as many images are generated. None: those that the model is known to have learned, unless
    # the folder has images of the user's.
    keep: Sequence[str] | None = None


class Share(NamedTuple):
    """A number of images of one prompt, with seeds from 0 on."""

    folder: Path
    prompt: str
    count: int


def collect(
    model: LatentDiffusion,
    classes: Sequence[Class],
    default_count: int,
    size: int,
    scale: float | None,
    batch_size: int,
    known: Sequence[str] = (),
) -> list[dict[str, str | None]]:
    """Return {name of image: caption} for each class: the user's images first; the missing ones are generated.

    The prompts of a class share the generated images evenly. The user's images have the class's prompt as caption; None
    where there are several prompts, since then they need captions of their own.

    Args:
        default_count: images of a class that gives no count and has no images of the user's.
        known: what is kept where a class does not say, unless its folder has images of the user's.
    """
    found, shares = zip(*(_plan(one, default_count, known) for one in classes), strict=True)
    names = iter(generate_class_images(model, [share for row in shares for share in row], size, scale, batch_size))
    for images, row in zip(found, shares, strict=True):
        for share in row:
            images |= dict.fromkeys(next(names), share.prompt)
    return list(found)


def _plan(one: Class, default_count: int, known: Sequence[str]) -> tuple[dict[str, str | None], list[Share]]:
    """Return the user's images of a class with their captions, and what to generate besides."""
    folder, prompts, count, keep = one
    if not prompts:
        return {}, []
    own = users_images(folder)
    if count is None:
        count = len(own) if own else default_count
    missing = count - len(own)
    if own and missing > 0:
        print(f"class images in {folder}: {len(own)}; the model generates {missing} more")
    if keep is None:
        keep = () if own else known
    shares = []
    for group, number in ((prompts, missing), ([prompt for prompt in keep if prompt not in prompts], count)):
        counts = [len(range(i, number, len(group))) for i in range(len(group))]
        shares += [Share(folder, prompt, part) for prompt, part in zip(group, counts, strict=True) if part]
    return dict.fromkeys(own[:count], prompts[0] if len(prompts) == 1 else None), shares


def generate_class_images(
    model: LatentDiffusion, shares: Sequence[Share], size: int, scale: float | None, batch_size: int
) -> list[list[str]]:
    """Return the names of each share's images; those that its folder lacks are generated, `size` pixels high and wide.

    Each file is written whole or not at all, so that an interrupted run can go on.
    """
    first = default_recipe(model, "" if model.path is None else model.path.stem, scale=scale, height=size, width=size)
    runs = [plan(first, [share.prompt], share.count, batch_size) for share in shares]
    rows = [[(recipe, share.folder / _name(recipe)) for recipe in run] for share, run in zip(shares, runs, strict=True)]
    # A set, because shares may overlap: one subject's class may be kept beside another subject.
    missing = {path for row in rows for recipe, path in row if not _is_there(path, recipe)}
    with progress_bar(leave=True, total=len(missing), desc="class images", unit="image", disable=not missing) as bar:
        for row in rows:
            first_missing = next((recipe for recipe, path in row if path in missing), None)
            if first_missing is None:
                continue
            row[0][1].parent.mkdir(parents=True, exist_ok=True)
            start = first_missing.index - first_missing.batch_position  # whole batches, as the recipes say
            for recipe, image, index in generate_run(model, [recipe for recipe, _ in row[start:]]):
                path = row[start + index][1]
                if path in missing:
                    save_image(image, path, recipe.to_text())
                    missing.remove(path)
                    bar.update()
    return [[path.name for _, path in row] for row in rows]


def _name(recipe: Recipe) -> str:
    key = hashlib.sha256(_without_batch(recipe).to_text().encode()).hexdigest()[:8]
    return f"class-{key}-{recipe.seed:05}.png"


def _without_batch(recipe: Recipe) -> Recipe:
    """Return the recipe without its seed and its place in a batch, which changes only the last bits of an image."""
    return replace(recipe, seed=0, index=0, batch_size=1, batch_position=0, batch_prompts=1, prompt_position=0)


def _is_there(path: Path, recipe: Recipe) -> bool:
    try:
        return _without_batch(recipe_from_text(read_image_text(path))) == _without_batch(recipe)
    except (FileNotFoundError, ValueError):  # missing, or damaged
        return False
