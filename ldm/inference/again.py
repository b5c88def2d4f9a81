"""Making an image again: read its recipe from its file, check its init image, refill its batch. Imports no torch."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags

from ldm.changes import Change
from ldm.data.image_formats import check_image_file, open_pillow
from ldm.inference.recipe import CHUNK, COMMENT, FORMATS, KEYED, NEGATIVE, UTF16, Recipe

if TYPE_CHECKING:
    from ldm.inference.init_image import InitImage

OF_IMAGE = "a small image or a map, to give with img2img --upscale --init-img FILE or sample --map FILE"
_ENTRY = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_REQUIRED = ("Size", "Steps", "Sampler", "CFG scale", "Seed")
# The web UI's "Schedule type" -> our spacing, and what its "Automatic" is for a sampler (else Uniform).
_SCHEDULES = {"Uniform": "linspace", "SGM Uniform": "trailing", "Karras": "karras", "Exponential": "exponential"}
_AUTOMATIC = {"DDIM": "leading", "PLMS": "leading", "UniPC": "leading", "DPM2": "karras", "DPM2 a": "karras"}
_AUTOMATIC |= {"DPM++ 2M": "karras", "DPM++ SDE": "karras"}
_AUTOMATIC |= {"DPM++ 2M SDE": "exponential", "DPM++ 3M SDE": "exponential"}


def recipe_from_text(text: str) -> Recipe:
    """Read a chunk `parameters`, ours or another program's. Raises ValueError for anything else."""
    body, _, line = text.rpartition("\n")
    prompt, _, negative = f"\n{body}".partition(f"\n{NEGATIVE}")
    entries = {key.strip(): _unquote(value) for key, value in _ENTRY.findall(line)}
    if "Interpolation" in entries:
        raise ValueError("it was interpolated, which the command interpolate does: its options are in the image's text")
    if "Grid" in entries:
        raise ValueError(f"it is a grid of {entries['Grid']} images: give one of the images in samples/")
    if "Edit of" in entries:
        raise ValueError("it was edited, which the command edit does: its options are in the image's text")
    if "Schedule type" in entries and "Spacing" not in entries:
        schedule, automatic = entries["Schedule type"], _AUTOMATIC.get(entries.get("Sampler", ""), "linspace")
        entries["Spacing"] = automatic if schedule == "Automatic" else _SCHEDULES.get(schedule, schedule)
    if (missing := next((key for key in _REQUIRED if key not in entries), None)) is not None:
        raise ValueError(f"it names no {missing!r}, so the image cannot be made again")
    entries["Width"], _, entries["Height"] = entries["Size"].partition("x")
    try:
        values = {name: row.checked(row.key, entries[row.key]) for name, row in KEYED.items() if row.key in entries}
    except ValueError as error:
        raise ValueError(f"its settings cannot be read ({error})") from None
    values |= _guidance_among(values.get("changes", ()))
    return Recipe(prompt=prompt[1:], negative=negative, **values)


def _guidance_among(changes: Sequence[Change]) -> dict[str, Any]:
    """Return the settings of guidance that version 0.1.0 at first kept among the changes, and the other changes."""
    found: dict[str, Any] = {}
    for change in changes:
        if change.kind == "pag":
            scale, *layers = change.name.split()
            found |= {"pag": float(scale), "pag_layers": tuple(layers)}
        elif change.kind == "threshold":
            found["threshold"] = float(change.name)
        elif change.kind in ("autoguide", "classifier"):
            found |= {f"{change.kind}_hash": change.hash, f"{change.kind}_scale": change.strength}
        else:
            found["changes"] = (*found.get("changes", ()), change)
    return {"changes": (), **found}


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def read_image_text(path: Path) -> str:
    """Read the text that `save_image` writes. ValueError for a file of another format, or one without it; OSError."""
    check_image_file(path)
    with open(path, "rb") as file:
        try:
            image = open_pillow(file, [name for name, _ in FORMATS.values()])
            text = image.info.get(CHUNK)
            comment = None if text is not None else image.getexif().get_ifd(ExifTags.IFD.Exif).get(COMMENT)
            if isinstance(comment, bytes) and comment.startswith(UTF16):
                text = comment.removeprefix(UTF16).decode("utf-16-be")
            if isinstance(comment := image.info.get("comment"), bytes) and image.format == "GIF":
                text = comment.decode(errors="replace")
        except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises for files that are no whole images
            raise ValueError(f"{path} is not a PNG, JPEG, WebP or GIF image, or is damaged") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no text chunk {CHUNK!r}, so nothing says how it was made")
    return str(text)


def read_recipe(path: Path) -> Recipe:
    """Read the recipe that a PNG carries. ValueError naming the file if it carries none."""
    text = read_image_text(path)
    try:
        return recipe_from_text(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be made again: {error}") from None


def check_init_image(recipe: Recipe, given: "InitImage | None", path: Path) -> None:
    """Raise ValueError unless `recipe`, which the PNG at `path` carries, was made with this init image and mask.

    Recipes of other programs have no hashes, and are not checked.
    """
    command = "inpaint" if recipe.mask_hash else "img2img"
    if given is None:
        if recipe.strength is not None:
            raise ValueError(f"{path} was made from an init image, to give with --init-img: use the command {command}")
        if recipe.init_hash:
            raise ValueError(f"{path} was made from {OF_IMAGE}")
        return
    if recipe.strength is None and recipe.init_hash == "":
        raise ValueError(f"{path} was made from text alone: use the command txt2img")
    if given.conditions != (recipe.strength is None):
        raise ValueError(f"{path} was made from {'an init image' if given.conditions else OF_IMAGE}")
    if recipe.init_hash == "":
        return
    if (recipe.mask_hash == "") != (given.mask is None):
        raise ValueError(
            f"{path} was made {'with' if recipe.mask_hash else 'without'} a mask: use the command {command}"
        )
    for what, made, now, options in (
        ("an init image", recipe.init_hash, given.init_hash, "--init-img"),
        ("a mask", recipe.mask_hash, given.mask_hash, "--mask, with --invert-mask if it was given then"),
    ):
        if made != now:
            raise ValueError(
                f"{path} was made from {what} with hash {made}, but the one given has {now}: "
                f"give the same one again by {options}"
            )


def refill(recipe: Recipe, count: Callable[[str], int] = lambda prompt: 1) -> list[str]:
    """Return prompts for a batch of the recipe's shape: its own at its place, and as many different ones as it had.

    count: how many chunks a prompt makes; the different ones make as many as the recipe's own.
    Raises ValueError for places that do not exist.
    """
    ranks: list[int] = []  # of each place's prompt among the different ones, in the order of their first appearance
    seen: set[int] = set()
    for place in range(recipe.batch_size):
        unseen = min(len(seen), recipe.batch_prompts - 1)
        ranks.append(recipe.prompt_position if place == recipe.batch_position else unseen)
        seen.add(ranks[-1])
    if list(dict.fromkeys(ranks)) != list(range(recipe.batch_prompts)) or not 0 <= recipe.batch_position < len(ranks):
        raise ValueError(
            f"a batch of {recipe.batch_size} with {recipe.batch_prompts} prompts has no position "
            f"{recipe.batch_position} for prompt {recipe.prompt_position}"
        )
    others = {rank: _another(recipe.prompt, rank, count) for rank in set(ranks) - {recipe.prompt_position}}
    return [others.get(rank, recipe.prompt) for rank in ranks]


def _another(prompt: str, number: int, count: Callable[[str], int]) -> str:
    """Return another prompt of as many chunks: with that number at its end, in place of as few words as possible."""
    words = prompt.split(" ")
    shorter = (" ".join([*words[: len(words) - dropped], str(number)]) for dropped in range(len(words)))
    same = (other for other in shorter if other != prompt and count(other) == count(prompt))
    return next(same, f"{prompt} {number}")
