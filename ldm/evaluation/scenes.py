"""Are the right digits in a generated scene, in the right colours and places, and each in its own colour?

The judge knows how scenes are made (`ldm/data/scenes.py`) and not which caption an image was made for: what differs
from the background is cut into connected objects; an object's colour is the one whose direction from the background its
strongest pixels have; its digit is read by the MNIST classifier that ships, from its pixels alone, scaled as MNIST is.
What the judge makes of the real images of the same captions stands beside, and is its own accuracy.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from ldm.data.scenes import (
    BACKGROUNDS,
    CANVAS,
    DIGIT_SIZES,
    PALETTE,
    RELATIONS,
    Combinations,
    Scene,
    SceneCaption,
    Scenes,
)
from ldm.evaluation.networks import classify
from ldm.evaluation.prompt import accuracy
from ldm.images import to_pil
from ldm.labels import Row

CONTRAST = 36  # of 255, in the channel that differs most: half of what the faintest colour has on its background
LEAST = 10  # pixels of an object; fewer are a speck
TEST_SEED, SHOWN = 1, 6  # of the scenes whose captions are asked for; how many of each kind a sheet shows
JUDGED = 20  # pixels of the longer side of MNIST's digits, in 28 x 28


class FoundObject(NamedTuple):
    """What the judge found: the digit, indices into PALETTE and DIGIT_SIZES, and the middle in pixels."""

    digit: int
    colour: int
    size: int
    centre: tuple[float, float]


def judge_scenes(images: Tensor, judge: nn.Module) -> list[tuple[int, list[FoundObject]]]:
    """Return the background, an index into BACKGROUNDS, and the objects of each of uint8 images (n, 3, 64, 64)."""
    parts = [_cut(image) for image in images.permute(0, 2, 3, 1).numpy()]
    glyphs = [glyph for _, objects in parts for _, glyph in objects]
    digits = iter(classify(judge, torch.from_numpy(np.stack(glyphs))).tolist() if glyphs else [])
    return [(background, [one._replace(digit=next(digits)) for one, _ in objects]) for background, objects in parts]


def score_scene(
    scene: Scene, caption: SceneCaption, background: int, found: Sequence[FoundObject]
) -> dict[str, list[bool]]:
    """Return what of a caption is right, by what is asked; nothing for what it does not state.

    objects: is a digit there? colours: is its colour there? sizes, places: is the digit of that size, where the caption
    says? binding: is the digit there in its own colour (of scenes of two or three)? scenes: all of it, nothing else.
    """
    by_digit = {one.digit: one for one in found}
    bound = [any((o.digit, o.colour) == (one.digit, one.colour) for o in found) for one in scene.objects]
    right = {
        "objects": [one.digit in by_digit for one in scene.objects],
        "colours": [any(one.colour == other.colour for other in found) for one in scene.objects],
        "binding": bound if len(bound) > 1 else [],
        "sizes": [one.digit in by_digit and by_digit[one.digit].size == one.size for one in scene.objects],
        "places": [],
        "backgrounds": [background == scene.background],
    }
    if caption.places:
        right["places"] = [one.digit in by_digit and _cell(by_digit[one.digit]) == one.place for one in scene.objects]
    elif caption.relation is not None:
        step = RELATIONS[caption.relation[1]]
        first, second = (by_digit.get(scene.objects[i].digit) for i in caption.relation[::2])
        right["places"] = [first is not None and second is not None and _holds(step, first, second)]
    stated = [bound, *(right[name] for name in ("sizes", "places", "backgrounds"))]
    right["scenes"] = [all(map(all, stated)) and len(found) == len(scene.objects)]
    return right


def measure_scenes(
    generate: Callable[[list[str]], Tensor], count: int, root: str | None, judge: nn.Module
) -> tuple[dict[str, Any], list[Row]]:
    """Return the figures of generated scenes beside those of real ones, of each kind of combinations; rows of a sheet.

    The captions are of scenes of MNIST's test images: no model is trained on these.

    Args:
        generate: captions -> uint8 images (n, 3, 64, 64).
        count: scenes of each kind.
        root: of MNIST.
    """
    report, rows = {}, []
    for kind in get_args(Combinations):
        scenes = Scenes(count, kind, root=root, split="test", seed=TEST_SEED)
        captions = [scenes.caption_of(i).text for i in range(count)]
        made = generate(captions)
        real = torch.from_numpy(np.stack([scenes.render(i)[0] for i in range(count)])).permute(0, 3, 1, 2)
        report[kind] = {"generated": report_scenes(made, scenes, judge), "real": report_scenes(real, scenes, judge)}
        shown = [textwrap.fill(caption, 24) for caption in captions[:SHOWN]]
        rows.append(Row(kind if kind == "seen" else f"held out: {kind}", to_pil(made[:SHOWN]), shown))
    return report, rows


def report_scenes(images: Tensor, scenes: Scenes, judge: nn.Module) -> dict[str, dict]:
    """Return the `accuracy` of each question over uint8 images (n, 3, 64, 64) of the first n captions of `Scenes`."""
    answers: dict[str, list[bool]] = {}
    for index, (background, found) in enumerate(judge_scenes(images, judge)):
        scores = score_scene(scenes.scenes[index], scenes.caption_of(index), background, found)
        for name, right in scores.items():
            answers.setdefault(name, []).extend(right)
    return {name: accuracy(right) for name, right in answers.items()}


def _cell(one: FoundObject) -> int:
    column, row = (min(int(middle * 3 / CANVAS), 2) for middle in one.centre)
    return 3 * row + column


def _holds(step: tuple[int, int], first: FoundObject, second: FoundObject) -> bool:
    """Return whether the step from the second to the first is mostly in that direction, in columns and rows."""
    x, y = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    return x * step[0] + y * step[1] > abs(x * step[1] + y * step[0])


def _cut(pixels: np.ndarray) -> tuple[int, list[tuple[FoundObject, np.ndarray]]]:
    """Return the background of an image (h, w, 3), and each object, its digit unknown, with its glyph (28, 28)."""
    middle = np.median(pixels.reshape(-1, 3), axis=0)
    background = int(np.abs(np.array([*BACKGROUNDS.values()]) - middle).sum(1).argmin())
    difference = pixels.astype(np.float32) - middle
    strength = np.abs(difference).max(2)  # (h, w)
    # Strokes that a pixel separates are one digit; between two digits there are three.
    labels, _ = ndimage.label(ndimage.binary_dilation(strength > CONTRAST, np.ones((2, 2))), np.ones((3, 3)))
    objects = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        own = np.where((labels[rows, columns] == number)[..., None], difference[rows, columns], 0)  # (h, w, 3)
        ink = np.where(labels[rows, columns] == number, strength[rows, columns], 0)
        y, x = np.nonzero(ink > CONTRAST)
        if len(y) < LEAST:
            continue
        colour, share = colour_of(own, ink, middle)
        left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
        size = int(np.abs(np.array([*DIGIT_SIZES.values()]) - max(right - left, bottom - top)).argmin())
        centre = columns.start + (left + right) / 2, rows.start + (top + bottom) / 2
        objects.append((FoundObject(-1, colour, size, centre), glyph(share[top:bottom, left:right])))
    return background, objects


def colour_of(own: np.ndarray, ink: np.ndarray, background: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the colour of an object, and how much of it each pixel has, uint8 (h, w).

    own: difference from the background (h, w, 3), 0 outside the object. ink: the largest channel's (h, w).
    """
    directions = np.array([*PALETTE.values()]) - background  # (colours, 3)
    strongest = own[ink > 0.6 * ink.max()].mean(0)
    cosines = directions @ strongest / np.linalg.norm(directions, axis=1)
    colour = int(cosines.argmax())
    share = own @ directions[colour] / (directions[colour] @ directions[colour])
    return colour, (255 * np.clip(share, 0, 1)).astype(np.uint8)


def glyph(share: np.ndarray) -> np.ndarray:
    """Return ink as MNIST has digits, uint8 (28, 28): JUDGED pixels long, its centre of mass in the middle.

    share: how much ink each pixel has, uint8 (h, w).
    """
    height, width = share.shape
    factor = JUDGED / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BICUBIC))
    canvas = np.zeros((28, 28), np.uint8)
    mass = small.astype(float) + 1e-6
    corner = [
        int(np.clip(round(14 - (mass.sum(1 - axis) @ np.arange(mass.shape[axis])) / mass.sum() - 0.5), 0, 28 - length))
        for axis, length in enumerate(small.shape)
    ]
    canvas[corner[0] : corner[0] + size[1], corner[1] : corner[1] + size[0]] = small
    return canvas
