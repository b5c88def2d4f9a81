"""A recipe: everything that decides an image, and its form as text inside the PNG.

The text is that of AUTOMATIC1111's web UI in the PNG chunk `parameters`, so that its users' tools read it:

    a handwritten digit five
    Negative prompt: blurry
    Steps: 20, Sampler: ddim, CFG scale: 1.5, Seed: 3, Size: 32x32, Model hash: 0123456789, Model: digits, Index: 3, ...
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm import __version__
from ldm.batching import batches

NEGATIVE = "Negative prompt: "
EVERYWHERE = (0.0, float("inf"))
SETTING = re.compile(r'\s*([^:,"]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Recipe:
    """What makes one image. Raises ValueError for a text that the PNG could not give back.

    `index` is the image's place in its run, whose first seed was `seed - index`. The last of an image's bits depend
    on the shapes that it was computed in, so these are part of it: the size of its batch, its place there, how many
    different prompts the batch had, and which of those was its own.

    `strength`, `init_hash` and `mask_hash` are of an image drawn over another one (`original.Original`), and otherwise
    None and "".
    """

    prompt: str
    negative: str
    steps: int
    sampler: str
    scale: float
    seed: int
    width: int
    height: int
    spacing: str | None = None
    eta: float | None = None
    interval: Sequence[float] = EVERYWHERE  # (low, high) of sigma between which guidance is on
    rescale: float = 0.0
    fixed_code: bool = False
    clip_skip: int = 1
    plain: bool = False
    precision: str = "full"
    strength: float | None = None
    init_hash: str = ""
    mask_hash: str = ""
    index: int = 0
    batch_size: int = 1
    batch_position: int = 0
    batch_prompts: int = 1
    prompt_position: int = 0
    model_hash: str = ""
    changes: str = ""  # what is not the model file's own: parts, settings, LoRAs, learned words
    model_name: str = ""

    def __post_init__(self) -> None:
        if f"\n{NEGATIVE}" in f"\n{self.prompt}":
            raise ValueError(f"the prompt has a line that starts with {NEGATIVE!r}: give that by --negative-prompt")
        for text in (self.prompt, self.negative):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"the prompt {text!r} is not valid UTF-8 text")

    def to_text(self) -> str:
        """The chunk `parameters`; `from_text` gives the recipe back exactly."""
        settings: dict[str, object] = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": self.scale,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Denoising strength": self.strength,
            "Init image hash": self.init_hash,
            "Mask hash": self.mask_hash,
            "Model hash": self.model_hash,
            "Changes": self.changes,
            "Model": self.model_name,
            "Index": self.index,
            "Spacing": self.spacing,
            "Eta": self.eta,
            "Guidance interval": None if self.interval == EVERYWHERE else f"{self.interval[0]} to {self.interval[1]}",
            "Guidance rescale": self.rescale if self.rescale != 0 else None,
            "Fixed code": True if self.fixed_code else None,
            "Clip skip": self.clip_skip if self.clip_skip != 1 else None,
            "Plain prompt": True if self.plain else None,
            "Precision": self.precision,
            "Batch size": self.batch_size,
            "Batch pos": self.batch_position,
            "Batch prompts": self.batch_prompts if self.batch_prompts > 1 else None,
            "Prompt pos": self.prompt_position if self.batch_prompts > 1 else None,
            "Version": f"ldm {__version__}",
        }
        line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value not in (None, ""))
        return self.prompt + (f"\n{NEGATIVE}{self.negative}" if self.negative else "") + f"\n{line}"

    @classmethod
    def from_text(cls, text: str) -> "Recipe":
        """The recipe in a chunk `parameters`, ours or another program's; ValueError if it is none."""
        body, _, line = text.rpartition("\n")
        prompt, _, negative = f"\n{body}".partition(f"\n{NEGATIVE}")
        settings = {key.strip(): _unquote(value) for key, value in SETTING.findall(line)}
        if "Grid" in settings:
            raise ValueError(f"it is a grid of {settings['Grid']} images: give one of the images in samples/")
        try:
            width, height = settings["Size"].split("x")
            low, high = settings.get("Guidance interval", "0 to inf").split(" to ")
            return cls(
                prompt=prompt[1:],
                negative=negative,
                steps=int(settings["Steps"]),
                sampler=settings["Sampler"],
                scale=float(settings["CFG scale"]),
                seed=int(settings["Seed"]),
                width=int(width),
                height=int(height),
                spacing=settings.get("Spacing"),
                eta=float(settings["Eta"]) if "Eta" in settings else None,
                interval=(float(low), float(high)),
                rescale=float(settings.get("Guidance rescale", 0.0)),
                fixed_code=settings.get("Fixed code") == "True",
                clip_skip=int(settings.get("Clip skip", 1)),
                plain=settings.get("Plain prompt") == "True",
                precision=settings.get("Precision", "full"),
                strength=float(settings["Denoising strength"]) if "Denoising strength" in settings else None,
                init_hash=settings.get("Init image hash", ""),
                mask_hash=settings.get("Mask hash", ""),
                index=int(settings.get("Index", 0)),
                batch_size=int(settings.get("Batch size", 1)),
                batch_position=int(settings.get("Batch pos", 0)),
                batch_prompts=int(settings.get("Batch prompts", 1)),
                prompt_position=int(settings.get("Prompt pos", 0)),
                model_hash=settings.get("Model hash", ""),
                changes=settings.get("Changes", ""),
                model_name=settings.get("Model", ""),
            )
        except KeyError as missing:
            raise ValueError(f"it names no {missing.args[0]!r}, so the image cannot be made again") from None
        except ValueError as error:
            raise ValueError(f"its settings do not read ({error})") from None

    def changed(self, **settings: object) -> "Recipe":
        """This recipe with every setting that is not None put in its place; an unknown name is a TypeError."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


def _quote(value: str) -> str:
    plain = value == value.strip() and not any(mark in value for mark in ',:"\n')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def plan(
    first: Recipe, prompts: Sequence[str], per_prompt: int, batch_size: int, lengths: Sequence[int] | None = None
) -> list[Recipe]:
    """The recipes of a run: all images of the first prompt, then of the next; image k has seed `first.seed + k`.

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
    """Prompts for a batch of the recipe's shape: its own at its place, and as many different ones as the batch had.

    count: how many chunks a prompt makes; the different ones make as many as the recipe's own.
    Raises ValueError for places that do not exist.
    """
    ranks: list[int] = []  # of each place's prompt among the different ones, in the order of their first appearance
    for place in range(recipe.batch_size):
        unseen = min(len(set(ranks)), recipe.batch_prompts - 1)
        ranks.append(recipe.prompt_position if place == recipe.batch_position else unseen)
    if list(dict.fromkeys(ranks)) != list(range(recipe.batch_prompts)) or recipe.batch_position not in range(
        len(ranks)
    ):
        raise ValueError(
            f"a batch of {recipe.batch_size} with {recipe.batch_prompts} prompts has no place {recipe.batch_position} "
            f"for prompt {recipe.prompt_position}"
        )
    others = {rank: _another(recipe.prompt, rank, count) for rank in set(ranks) - {recipe.prompt_position}}
    return [others.get(rank, recipe.prompt) for rank in ranks]


def _another(prompt: str, number: int, count: Callable[[str], int]) -> str:
    """Another prompt of as many chunks: with that number at its end, in place of as few words as must be."""
    words = prompt.split(" ")
    shorter = (" ".join([*words[: len(words) - dropped], str(number)]) for dropped in range(len(words)))
    same = (other for other in shorter if other != prompt and count(other) == count(prompt))
    return next(same, f"{prompt} {number}")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped. ValueError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: a prompt file holds one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line (blank lines are skipped)")
    return prompts
