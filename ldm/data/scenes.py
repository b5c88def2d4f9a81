"""Scenes: one to three MNIST digits in stated colours, sizes and places on a plain 64 x 64 background, with captions.

Scene i is a function of (seed, i) and of the MNIST images, its caption of (seed, epoch, i). Of a scene's captions each
states something true of it: places, a relation of two digits, or (1 in 10) neither, and the background: a caption
without one is of a dark scene, and half of these say so. What captions leave open is noise to who learns them. The
digits of a scene differ, and so do their colours; so "which colour has the five?" has one answer.

Some combinations are held out of what models are trained on (`combinations: seen`), which has each of their parts:
    colours    a digit in one of the colours (no zero is red, no one yellow ...)
    pairs      two digits in one scene (zero and three, one and two ...)
    relations  a colour left of, or above, the next colour (in a row, no red digit is left of a yellow one)
"""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.checks import Positive, Range
from ldm.data.captioned import subset
from ldm.data.captions import NUMBER_WORDS
from ldm.data.mnist import read_mnist

CANVAS = 64  # pixels
MOST_OBJECTS = 3
PALETTE = {  # red, green, blue in 0..255
    "red": (225, 45, 45), "yellow": (225, 205, 40), "green": (40, 175, 60), "cyan": (40, 190, 205),
    "blue": (60, 80, 230), "purple": (185, 65, 215),
}  # fmt: skip
BACKGROUNDS = {"dark": (24, 24, 28), "grey": (118, 118, 122), "light": (232, 232, 228)}
DEFAULT_BACKGROUND = 0  # of captions that state none
DIGIT_SIZES = {"small": 14, "medium": 19, "large": 25}  # pixels of a digit's longer side; captions leave "medium" out
PLACES = (  # of a grid of 3 x 3, row by row
    "in the top left", "at the top", "in the top right", "on the left", "in the middle", "on the right",
    "in the bottom left", "at the bottom", "in the bottom right",
)  # fmt: skip
RELATIONS = {  # from the second of two digits to the first: the step in columns and rows
    "to the left of": (-1, 0), "left of": (-1, 0), "to the right of": (1, 0), "right of": (1, 0),
    "above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1),
}  # fmt: skip
Combinations = Literal["seen", "colours", "pairs", "relations"]
_NAMES = {"colour": tuple(PALETTE), "size": tuple(DIGIT_SIZES), "background": tuple(BACKGROUNDS)}
_GAP, _JITTER, _INK = 3, 2, 60  # pixels between digits; pixels that a place moves by; grey of a digit's edge
Uniform = Callable[[], float]


class SceneObject(NamedTuple):
    """A digit of a scene; colour, size and place are indices into PALETTE, DIGIT_SIZES and PLACES."""

    digit: int
    colour: int
    size: int
    place: int
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are outside
    source: int  # the image of MNIST

    @property
    def number(self) -> int:
        """Return the class of the object, of 60."""
        return 10 * self.colour + self.digit

    @property
    def name(self) -> str:
        """Return what captions call it: "a small red five"."""
        size, colour = _NAMES["size"][self.size], _NAMES["colour"][self.colour]
        return f"a {size + ' ' if size != 'medium' else ''}{colour} {NUMBER_WORDS[self.digit]}"


class Scene(NamedTuple):
    objects: tuple[SceneObject, ...]
    background: int  # index into BACKGROUNDS


class SceneCaption(NamedTuple):
    """A caption and what it states besides the digits, their colours and sizes."""

    text: str
    places: bool  # whether it states the place of each digit
    relation: tuple[int, str, int] | None  # which object is "left of", say, which other one


class Scenes(Dataset):
    """Scenes with their captions.

    A sample is a dict:
        image    float32 (3, 64, 64) in [-1, 1]
        caption  str
        boxes    int64 (3, 5): left, top, right, bottom in pixels, and the class, of each object; rows of -1 for none
        map      int64 (64, 64): 0 for the background, else 1 + the class

    The class of an object is 10 * colour + digit.

    `scenes` are all of them, `caption_of(index)` is a `SceneCaption`.

    Args:
        count: number of scenes.
        combinations: "seen" has no held-out combination; "colours", "pairs" and "relations" have one or more in each
            scene, of that kind only.
        seed: of scenes and captions.
        root, split, first, last, download: of the digits, as in `mnist.MNIST`.
        reads: what a sample has.
        most: digits in a scene at most.
    """

    augments = False  # pixels do not change between epochs; captions do

    def __init__(
        self,
        count: Positive = 20_000,
        combinations: Combinations = "seen",
        seed: int = 0,
        root: str | None = None,
        split: str = "train",
        first: int | None = None,
        last: int | None = None,
        download: bool = False,
        reads: Sequence[str] = ("image", "caption"),
        most: Annotated[int, Range(1, MOST_OBJECTS)] = MOST_OBJECTS,
    ) -> None:
        if combinations not in get_args(Combinations):
            raise ValueError(f"combinations {combinations!r} is not one of {', '.join(get_args(Combinations))}")
        if most == 1 and combinations in ("pairs", "relations"):
            raise ValueError(f"combinations {combinations!r} are of two digits: give most 2 or 3, not 1")
        pixels, labels = read_mnist(root, split, download)
        chosen = subset(len(pixels), first, last)
        self.digits, labels = pixels[chosen], labels[chosen]
        self.seed, self.reads, self.epoch, self.most = seed, tuple(reads), 0, most
        sources = [np.flatnonzero(labels == digit).tolist() for digit in range(10)]
        if absent := [NUMBER_WORDS[digit] for digit in range(10) if not sources[digit]]:
            raise ValueError(f"scenes need all ten digits: of the {len(labels)} images of MNIST none is {absent[0]}")
        self.crops = _crops(self.digits)
        wanted = set() if combinations == "seen" else {combinations}
        self.scenes = [self._compose(f"{seed} {index}", sources, wanted) for index in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption_of(self, index: int) -> SceneCaption:
        """Return the caption of a scene in this epoch."""
        return describe_scene(self.scenes[index], random.Random(f"{self.seed} {self.epoch} {index} caption").random)

    def texts(self) -> list[str]:
        """Return texts that contain every word of its captions, to make a vocabulary from."""
        words = [*PALETTE, *(size for size in DIGIT_SIZES if size != "medium"), *NUMBER_WORDS, *PLACES, *RELATIONS]
        return [*words, "a a and a, a", *(f"on a {background} background" for background in BACKGROUNDS)]

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a scene's image, uint8 (64, 64, 3), and its map, int64 (64, 64)."""
        scene = self.scenes[index]
        canvas = np.empty((CANVAS, CANVAS, 3), np.float32)
        canvas[:] = BACKGROUNDS[_NAMES["background"][scene.background]]
        classes = np.zeros((CANVAS, CANVAS), np.int64)
        for one in scene.objects:
            (left, top, right, bottom), (x0, y0, x1, y1) = one.box, self.crops[one.source]
            glyph = Image.fromarray(self.digits[one.source][y0:y1, x0:x1])
            glyph = glyph.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            share = np.asarray(glyph, np.float32)[..., None] / 255  # (h, w, 1)
            part = canvas[top:bottom, left:right]
            part += share * (np.array(PALETTE[_NAMES["colour"][one.colour]], np.float32) - part)
            classes[top:bottom, left:right][share[..., 0] > 0.5] = 1 + one.number
        return canvas.round().astype(np.uint8), classes

    def without_image(self, index: int) -> dict[str, Any]:
        """Return a sample without its image."""
        return self._sample(index, self.render(index)[1] if "map" in self.reads else None)

    def _sample(self, index: int, classes: np.ndarray | None) -> dict[str, Any]:
        sample: dict[str, Any] = {"caption": self.caption_of(index).text} if "caption" in self.reads else {}
        if "boxes" in self.reads:
            objects = self.scenes[index].objects
            rows = [[*one.box, one.number] for one in objects] + [[-1] * 5] * (MOST_OBJECTS - len(objects))
            sample["boxes"] = torch.tensor(rows)
        if classes is not None and "map" in self.reads:
            sample["map"] = torch.from_numpy(classes)
        return sample

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        index %= len(self)
        pixels, classes = self.render(index)
        image = torch.from_numpy(pixels).permute(2, 0, 1)  # h w c -> c h w
        return {"image": image.float().div_(127.5).sub_(1).contiguous(), **self._sample(index, classes)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]

    def _compose(self, key: str, sources: Sequence[Sequence[int]], wanted: set[str]) -> Scene:
        """Return the first random scene whose held-out combinations are those wanted, and whose digits lie apart."""
        uniform = random.Random(key).random  # only random() is the same in every version of Python
        count = 1 + (uniform() >= 0.25) + (uniform() >= 0.65)
        count = max(count, 2) if wanted & {"pairs", "relations"} else min(count, self.most)
        background = int(uniform() * len(BACKGROUNDS))
        while True:
            draft = _draft(uniform, count)
            if held_out(draft) != wanted:
                continue
            objects = []
            for one in draft:
                source = sources[one.digit][int(uniform() * len(sources[one.digit]))]
                objects.append(one._replace(source=source, box=_box(uniform, one, self.crops[source])))
            if all(_apart(a.box, b.box) for a, b in itertools.combinations(objects, 2)):
                return Scene(tuple(objects), background)


def held_out(objects: Sequence[SceneObject]) -> set[str]:
    """Return the kinds of held-out combinations that objects have."""
    found = {"colours"} if any(one.colour == one.digit % len(PALETTE) for one in objects) else set()
    if any((a.digit + b.digit) % 10 == 3 for a, b in itertools.combinations(objects, 2)):
        found.add("pairs")
    for a, b in itertools.permutations(objects, 2):
        if step_between(a, b) in ((-1, 0), (0, -1)) and b.colour == (a.colour + 1) % len(PALETTE):
            found.add("relations")
    return found


def step_between(a: SceneObject, b: SceneObject) -> tuple[int, int]:
    """Return the direction from b to a in columns and rows, -1, 0 or 1 each: (-1, 0) if a is left of b in its row."""
    (row, column), (other_row, other_column) = divmod(a.place, 3), divmod(b.place, 3)
    return int(np.sign(column - other_column)), int(np.sign(row - other_row))


def describe_scene(scene: Scene, uniform: Uniform) -> SceneCaption:
    """Return a caption of a scene. uniform: random numbers in [0, 1)."""
    objects, names = scene.objects, [one.name for one in scene.objects]
    places, relation = uniform() < 0.9, None
    if len(objects) == 2 and uniform() < 0.5:
        first = int(uniform() * 2)
        step = step_between(objects[first], objects[1 - first])
        words = [word for word, direction in RELATIONS.items() if direction == step]
        if words:  # they lie in one row or column
            relation, places = (first, words[int(uniform() * len(words))], 1 - first), False
    if relation is not None:
        text = f"{names[relation[0]]} {relation[1]} {names[relation[2]]}"
    else:
        stated = [f"{name} {PLACES[one.place]}" if places else name for name, one in zip(names, objects, strict=True)]
        stated = [name for _, name in sorted((uniform(), name) for name in stated)]
        text = " and ".join([part for part in (", ".join(stated[:-1]), stated[-1]) if part])
    if uniform() < 0.5 or scene.background != DEFAULT_BACKGROUND:
        text += f" on a {_NAMES['background'][scene.background]} background"
    return SceneCaption(text, places, relation)


def _draft(uniform: Uniform, count: int) -> list[SceneObject]:
    """Return random objects without box and source: their digits, colours and places differ."""
    digits, colours, places = ([*_shuffled(uniform, n)] for n in (10, len(PALETTE), len(PLACES)))
    if count == 2 and uniform() < 0.6:  # in one row or column, as relations need
        line, start, other = int(uniform() * 3), *_shuffled(uniform, 3)[:2]
        places = [3 * line + start, 3 * line + other] if uniform() < 0.5 else [3 * start + line, 3 * other + line]
    return [
        SceneObject(digits[i], colours[i], int(uniform() * len(DIGIT_SIZES)), places[i], (0, 0, 0, 0), 0)
        for i in range(count)
    ]


def _shuffled(uniform: Uniform, count: int) -> list[int]:
    return [i for _, i in sorted((uniform(), i) for i in range(count))]


def _box(uniform: Uniform, one: SceneObject, crop: Sequence[int]) -> tuple[int, int, int, int]:
    """Return where a digit lies: about its place, with the proportions of its image."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    side = DIGIT_SIZES[_NAMES["size"][one.size]]
    size = [max(3, round(side * part / max(width, height))) for part in (width, height)]
    corner = []
    for cell, extent in zip((one.place % 3, one.place // 3), size, strict=True):
        centre = (cell + 0.5) * CANVAS / 3 + (2 * uniform() - 1) * _JITTER
        corner.append(min(max(round(centre - extent / 2), 1), CANVAS - 1 - extent))
    return corner[0], corner[1], corner[0] + size[0], corner[1] + size[1]


def _apart(a: Sequence[int], b: Sequence[int]) -> bool:
    return any(one[end] + _GAP <= other[end - 2] for one, other in ((a, b), (b, a)) for end in (2, 3))


def _crops(digits: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of the ink in uint8 images (n, 28, 28)."""
    edges = []
    for axis in (1, 2):  # columns, rows
        ink: np.ndarray = np.any(digits > _INK, axis=axis)  # (n, 28)
        edges.append((ink.argmax(1), ink.shape[1] - ink[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = edges
    return [*zip(left.tolist(), top.tolist(), right.tolist(), bottom.tolist(), strict=True)]
