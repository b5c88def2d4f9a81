"""A recipe: everything that decides an image, and its form as text inside the PNG. Imports no torch.

The text is that of AUTOMATIC1111's web UI in the PNG chunk `parameters`, so that its users' tools read it:

    a handwritten digit five
    Negative prompt: blurry
    Steps: 20, Sampler: ddim, CFG scale: 1.5, Seed: 3, Size: 32x32, Model hash: 0123456789, Model: digits, Index: 3, ...
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, PngImagePlugin

from ldm import __version__
from ldm.batching import batches
from ldm.changes import Change
from ldm.checkpoint.atomic import atomic
from ldm.settings import ALL_SIGMAS, BATCH_SIZE, CHANGES, INT, SEED, STR, Guidance, Settings, setting, setting_rows

CHUNK = "parameters"  # the text chunk that AUTOMATIC1111's web UI writes and that its users' tools read
NEGATIVE = "Negative prompt: "
# Suffix -> Pillow's name of the format, and how to save in it.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
    ".gif": ("GIF", {"save_all": True, "loop": 0}),
}
COMMENT, UTF16 = 0x9286, b"UNICODE\0"  # EXIF's UserComment, and the mark of its encoding
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

    if TYPE_CHECKING:  # a model's own settings are in their place
        steps: int
        sampler: str
        width: int
        height: int
    interval: tuple[float, float] = field(default=ALL_SIGMAS, metadata={"setting": setting_rows(Settings)["interval"]})
    final_sigma: str = field(default="zero", metadata={"setting": setting_rows(Settings)["final_sigma"]})
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
            raise ValueError(f"the prompt has a line that starts with {NEGATIVE!r}: give that as the negative prompt")
        for text in (self.prompt, self.negative):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"the prompt {text!r} is not valid UTF-8 text")

    def is_default(self, name: str) -> bool:
        """Return whether a setting has its default value."""
        return getattr(self, name) == _DEFAULTS[name]

    def to_text(self) -> str:
        """Return the chunk `parameters`; `recipe_from_text` gives the recipe back exactly."""
        entries = {"Size": f"{self.width}x{self.height}"}
        for name, row in KEYED.items():
            shown = row.always or not self.is_default(row.needs or name)
            if shown and row.key not in ("Width", "Height") and getattr(self, name) is not None:
                entries[row.key] = row.type.write(getattr(self, name))
        ordered = {key: entries.pop(key) for key in _FIRST if key in entries} | entries
        ordered["Version"] = f"ldm {__version__}"
        line = ", ".join(f"{key}: {_quote(value)}" for key, value in ordered.items() if value != "")
        return self.prompt + (f"\n{NEGATIVE}{self.negative}" if self.negative else "") + f"\n{line}"

    def changed(self, **settings: object) -> "Recipe":
        """Return a copy with every setting that is not None put in its place. TypeError for an unknown name."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


# The settings that the text has, by name; the prompts stand above its last line.
KEYED = {name: row for name, row in setting_rows(Recipe).items() if row.key}
_DEFAULTS = {f.name: f.default for f in fields(Recipe)}


def _quote(value: str) -> str:
    plain = value == value.strip() and not any(mark in value for mark in ',:"\n')
    return value if plain else json.dumps(value, ensure_ascii=False)


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


def save_image(image: Image.Image, path: Path, text: str, new: bool = False, **more: object) -> None:
    """Write the image and the text, atomically, in the format of the path's suffix (`FORMATS`).

    new: as in `atomic`. more: options of Pillow's format.
    """
    name, options = FORMATS[path.suffix][0], FORMATS[path.suffix][1] | more
    if name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(CHUNK, text)
        options = options | {"pnginfo": info}
    elif name == "GIF":
        options = options | {"comment": text.encode()}
    else:  # where the web UI puts it
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] = UTF16 + text.encode("utf-16-be")
        options = options | {"exif": exif}
    with atomic(path, new=new) as temporary:
        image.save(temporary, format=name, **options)
