"""Captions and classes of own images, wherever they are kept: in a folder, in shards, in a Hugging Face data set."""

import random
import re
import sys
from collections.abc import Sequence
from typing import Any

from ldm.checks import few

MOST_CLASSES = 2**20  # each has a name, and in a model a row of weights


def split_captions(text: str) -> list[str]:
    """Return the captions in the text of a file: one in each line, as with sd-scripts' `enable_wildcard`.

    Only line feeds and carriage returns end a line: captions may contain Unicode's separators, such as U+2028.
    """
    return [line.strip() for line in re.split("[\r\n]", text) if line.strip()]


def choose_caption(
    captions: Sequence[str], seed: int, epoch: int, index: int, shuffle_tags_after: int | None = None
) -> str:
    """Return one of an image's captions, as a function of (seed, epoch, index).

    shuffle_tags_after: also shuffle its comma-separated tags, all but the first so many; None leaves them in order.
    """
    if len(captions) == 1 and shuffle_tags_after is None:
        return captions[0]
    uniform = random.Random(f"{seed} {epoch} {index} caption").random  # not the numbers that crop and mirror the image
    chosen = captions[int(uniform() * len(captions))]
    if shuffle_tags_after is None:
        return chosen
    tags = [tag for part in chosen.split(",") if (tag := part.strip())]
    shuffled = sorted(tags[shuffle_tags_after:], key=lambda tag: uniform())
    return ", ".join(tags[:shuffle_tags_after] + shuffled)


def number_classes(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the classes, sorted by name, and the number of each image's, whose name is given for each image."""
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] for name in names]


def check_class(number: Any, count: int, what: str) -> int:
    """Return the number of a class of `count`; raise ValueError for any other value, which `what` names."""
    if not isinstance(number, int) or not 0 <= number < count:
        raise ValueError(f"{what} is not the number of a class, from 0 to {count - 1:,}")
    return number


def uncaptioned(data: Any) -> dict[int, str]:
    """Return the images of a data set with `own_captions` and `name` that have no caption, each with a sentence."""
    lacking = [index for index in range(len(data)) if not data.own_captions(index)]
    return {index: f"{data.name(index)} has no caption, or an empty one" for index in lacking}


class Captions(Sequence[Sequence[str]]):
    """The captions of each image, which are read when they are asked for.

    Args:
        data: a data set with `own_captions`, [] where there are none, and `name`.
        otherwise: for images that have none, or an empty one; None where there are no such.
    """

    def __init__(self, data: Any, otherwise: str | None) -> None:
        self.data, self.otherwise = data, otherwise
        if otherwise is None:
            return
        lacking = uncaptioned(data)
        some = f"{few(map(data.name, lacking), 3)} ({len(lacking)} of {len(data)} images)"
        if 0 < len(lacking) < len(data):
            print(f"note: the caption for all is used for {some}, without one or with an empty one", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data.own_captions(index) or [self.otherwise]
