"""A recipe: everything that decides an image, and its form as text inside the PNG. Imports no torch.

The text is that of AUTOMATIC1111's web UI in the PNG chunk `parameters`, so that its users' tools read it:

    a handwritten digit five
    Negative prompt: blurry
    Steps: 20, Sampler: ddim, CFG scale: 1.5, Seed: 3, Size: 32x32, Model hash: 0123456789, Model: digits, Index: 3, ...
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, PngImagePlugin

from ldm import __version__
from ldm.batching import batches
from ldm.changes import Change
from ldm.checkpoint.atomic import atomic
from ldm.images import open_pillow
from ldm.settings import ALL_SIGMAS, BATCH_SIZE, CHANGES, INT, SEED, STR, Guidance, Settings, setting, setting_rows

if TYPE_CHECKING:
    from ldm.inference.init_image import InitImage

CHUNK = "parameters"  # the text chunk that AUTOMATIC1111's web UI writes and that its users' tools read
NEGATIVE = "Negative prompt: "
# Suffix -> Pillow's name of the format, and how to save in it.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}
_COMMENT, _UTF16 = 0x9286, b"UNICODE\0"  # EXIF's UserComment, and the mark of its encoding
_ENTRY = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_REQUIRED = ("Width", "Height", "Steps", "Sampler", "CFG scale", "Seed")
# The web UI's "Schedule type" -> our spacing, and what its "Automatic" is for a sampler (else Uniform).
_SCHEDULES = {"Uniform": "linspace", "SGM Uniform": "trailing", "Karras": "karras", "Exponential": "exponential"}
_AUTOMATIC = {"DDIM": "leading", "PLMS": "leading", "UniPC": "leading", "DPM2": "karras", "DPM2 a": "karras"}
_AUTOMATIC |= {"DPM++ 2M": "karras", "DPM++ SDE": "karras"}
_AUTOMATIC |= {"DPM++ 2M SDE": "exponential", "DPM++ 3M SDE": "exponential"}
# Keys that come first in the text, in the web UI's order; the others follow in the order of the fields.
_FIRST = (
    *("Steps", "Sampler", "CFG scale", "Seed", "Size", "Denoising strength", "Init image hash", "Mask hash"),
    *("Model hash", "Changes", "Model", "Index"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe(Guidance, Settings):
    """What makes one image: its settings, prompt, seed, model, and the shape of its batch.

    `index` is the image's place in its run, whose first seed was `seed - index`. The last of an image's bits depend
    on the shapes that it was computed in, so these are part of it: the size of its batch, its place there, how many
    different prompts the batch had, and which of those was its own.
    """

    interval: tuple[float, float] = field(default=ALL_SIGMAS, metadata={"setting": setting_rows(Settings)["interval"]})
    prompt: str = ""
    negative: str = setting("", STR, "", "negative prompt: what guidance leads away from", "--negative-prompt")
    seed: int = field(default=0, metadata={"setting": SEED})
    init_hash: str = setting("", STR, "Init image hash")
    mask_hash: str = setting("", STR, "Mask hash")
    model_hash: str = setting("", STR, "Model hash")
    changes: tuple[Change, ...] = setting((), CHANGES, "Changes")  # of the model, since its file
    model_name: str = setting("", STR, "Model")
    index: int = setting(0, INT, "Index", always=True)
    autoguide_hash: str = setting("", STR, "Autoguidance hash")
    classifier_hash: str = setting("", STR, "Classifier hash")
    precision: str = setting("full", STR, "Precision", always=True)
    batch_size: int = field(default=1, metadata={"setting": BATCH_SIZE})
    batch_position: int = setting(0, INT, "Batch pos", always=True)
    batch_prompts: int = setting(1, INT, "Batch prompts")
    prompt_position: int = setting(0, INT, "Prompt pos", needs="batch_prompts")

    def __post_init__(self) -> None:
        if f"\n{NEGATIVE}" in f"\n{self.prompt}":
            raise ValueError(f"the prompt has a line that starts with {NEGATIVE!r}: give that by --negative-prompt")
        for text in (self.prompt, self.negative):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"the prompt {text!r} is not valid UTF-8 text")

    def is_default(self, name: str) -> bool:
        """Return whether a setting has its default value."""
        return getattr(self, name) == _DEFAULTS[name]

    def to_text(self) -> str:
        """Return the chunk `parameters`; `from_text` gives the recipe back exactly."""
        entries = {"Size": f"{self.width}x{self.height}"}
        for name, row in _KEYS.items():
            shown = row.always or not self.is_default(row.needs or name)
            if shown and row.key not in ("Width", "Height") and getattr(self, name) is not None:
                entries[row.key] = row.type.write(getattr(self, name))
        ordered = {key: entries.pop(key) for key in _FIRST if key in entries} | entries
        ordered["Version"] = f"ldm {__version__}"
        line = ", ".join(f"{key}: {_quote(value)}" for key, value in ordered.items() if value != "")
        return self.prompt + (f"\n{NEGATIVE}{self.negative}" if self.negative else "") + f"\n{line}"

    @classmethod
    def from_text(cls, text: str) -> "Recipe":
        """Read a chunk `parameters`, ours or another program's. Raises ValueError for anything else."""
        body, _, line = text.rpartition("\n")
        prompt, _, negative = f"\n{body}".partition(f"\n{NEGATIVE}")
        entries = {key.strip(): _unquote(value) for key, value in _ENTRY.findall(line)}
        if "Grid" in entries:
            raise ValueError(f"it is a grid of {entries['Grid']} images: give one of the images in samples/")
        if "Schedule type" in entries and "Spacing" not in entries:
            schedule, automatic = entries["Schedule type"], _AUTOMATIC.get(entries.get("Sampler", ""), "linspace")
            entries["Spacing"] = automatic if schedule == "Automatic" else _SCHEDULES.get(schedule, schedule)
        if "Size" in entries:
            entries["Width"], _, entries["Height"] = entries["Size"].partition("x")
        for key in _REQUIRED:
            if key not in entries:
                missing = "Size" if key in ("Width", "Height") else key
                raise ValueError(f"it names no {missing!r}, so the image cannot be made again")
        try:
            values = {name: row.checked(row.key, entries[row.key]) for name, row in _KEYS.items() if row.key in entries}
        except ValueError as error:
            raise ValueError(f"its settings cannot be read ({error})") from None
        values |= _guidance_among(values.get("changes", ()))
        return cls(prompt=prompt[1:], negative=negative, **values)

    def changed(self, **settings: object) -> "Recipe":
        """Return a copy with every setting that is not None put in its place. TypeError for an unknown name."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


_KEYS = {name: row for name, row in setting_rows(Recipe).items() if row.key}
_DEFAULTS = {f.name: f.default for f in fields(Recipe)}


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


def _quote(value: str) -> str:
    plain = value == value.strip() and not any(mark in value for mark in ',:"\n')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def plan(
    first: Recipe, prompts: Sequence[str], per_prompt: int, batch_size: int, lengths: Sequence[int] | None = None
) -> list[Recipe]:
    """Return the recipes of a run: the images of the first prompt, then of the next; image k has seed `first.seed + k`.

    lengths: how many chunks each prompt makes, since a batch has prompts of one length (`ldm.batching`).
    """
    run = [prompt for prompt in prompts for _ in range(per_prompt)]
    lengths = [length for length in lengths or [1] * len(prompts) for _ in range(per_prompt)]
    recipes = []
    for place in batches(lengths, batch_size):
        batch = run[place]
        distinct = list(dict.fromkeys(batch))
        recipes += [
            replace(
                first,
                prompt=prompt,
                seed=first.seed + place.start + position,
                index=place.start + position,
                batch_size=len(batch),
                batch_position=position,
                batch_prompts=len(distinct),
                prompt_position=distinct.index(prompt),
            )
            for position, prompt in enumerate(batch)
        ]
    return recipes


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
    if list(dict.fromkeys(ranks)) != list(range(recipe.batch_prompts)) or recipe.batch_position not in range(
        len(ranks)
    ):
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


def save_image(image: Image.Image, path: Path, text: str, new: bool = False) -> None:
    """Write the image and the text, atomically, in the format of the path's suffix (`FORMATS`); new: as in `atomic`."""
    name, options = FORMATS[path.suffix]
    if name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(CHUNK, text)
        options = {"pnginfo": info}
    else:  # where the web UI puts it
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[_COMMENT] = _UTF16 + text.encode("utf-16-be")
        options = options | {"exif": exif}
    with atomic(path, new=new) as temporary:
        image.save(temporary, format=name, **options)


def read_image_text(path: Path) -> str:
    """Read the text that `save_image` writes. ValueError for a file of another format, or one without it; OSError."""
    with open(path, "rb") as file:
        try:
            image = open_pillow(file, [name for name, _ in FORMATS.values()])
            text = image.info.get(CHUNK)
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(_COMMENT)
            if text is None and isinstance(comment, bytes) and comment.startswith(_UTF16):
                text = comment.removeprefix(_UTF16).decode("utf-16-be")
        except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises for files that are no whole images
            raise ValueError(f"{path} is not a PNG, JPEG or WebP image, or is damaged") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no text chunk {CHUNK!r}, so nothing says how it was made")
    return str(text)


def read_recipe(path: Path) -> Recipe:
    """Read the recipe that a PNG carries. ValueError naming the file if it carries none."""
    text = read_image_text(path)
    try:
        return Recipe.from_text(text)
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
        return
    if recipe.strength is None:
        raise ValueError(f"{path} was made from text alone: use the command txt2img")
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
