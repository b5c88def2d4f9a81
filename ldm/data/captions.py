"""Captions of digits: many wordings, number words and numerals, and in half of them the measured style.

A caption is a pure function of (seed, epoch, index) and of the digit and style it describes, so a resumed training run
gets the same captions. A frame is a template with {n} for the number; a part in [brackets] is removed unless the
caption states its style. Models train on TRAIN_FRAMES. UNSEEN_FRAMES were fixed before any training, share no frame
with them, and are for evaluation only: other sentences, other nouns, a bare numeral, another word order. Style words
are the same in both, because a model that learnt English from these captions cannot know a new synonym.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# In the order of measure.STROKE_WEIGHTS and measure.SLANTS.
WEIGHT_WORDS = (("thin", "light"), ("medium",), ("bold", "thick"))
SLANT_WORDS = (("leaning left", "slanting left"), ("upright", "standing upright"), ("leaning right", "slanting right"))

TRAIN_FRAMES = (
    "a[ {weight}] handwritten digit {n}[ {slant}]",
    "the[ {weight}] handwritten digit {n}[ {slant}]",
    "a[ {weight}] handwritten {n}[ {slant}]",
    "[{weight} ]handwritten {n}[ {slant}]",
    "a photo of a[ {weight}] handwritten {n}[ {slant}]",
    "a photo of the[ {weight}] digit {n}[ {slant}]",
    "an image of the[ {weight}] number {n}[ {slant}]",
    "a drawing of the[ {weight}] digit {n}[ {slant}]",
    "a sketch of the[ {weight}] number {n}[ {slant}]",
    "a scan of a[ {weight}] handwritten {n}[ {slant}]",
    "the number {n}[ in {weight} strokes][ {slant}]",
    "the digit {n}[, {weight}][, {slant}]",
    "number {n}[, {slant}][, {weight}]",
    "digit {n}[ {slant}][, {weight}]",
    "the[ {weight}] figure {n}[ {slant}]",
    "a[ {weight}] {n} written by hand[, {slant}]",
    "{n} in[ {weight}] handwriting[, {slant}]",
    "handwriting: the[ {weight}] number {n}[ {slant}]",
    "white on black, the[ {weight}] digit {n}[ {slant}]",
    "the[ {weight}] number {n} on paper[, {slant}]",
    "it is a[ {weight}] {n}[ {slant}]",
    "here is the[ {weight}] digit {n}[ {slant}]",
    "this shows a[ {weight}] {n}[ {slant}]",
    "an example of the digit {n}[ with {weight} strokes][, {slant}]",
    "a digit[ {slant}][ in {weight} strokes]: {n}",
    "[{slant}, ]the[ {weight}] digit {n}",
)


# Common English words that do not describe a digit: no number (nor "to", "too", "for", which sound like one), and no
# word for weight or direction. Chosen without looking at UNSEEN_FRAMES.
FILLER_WORDS = tuple(
    """
    the of and a in is it that was he on as with his they be at have this from or had by not but what all were when
    your can said there use each which she do how their will other about out many then them these so some her would
    make like him into time has look more go see no way could people my than been call who water its now find day did
    get come made may part new take only little work know place year live me give most very after thing our just name
    good sentence man think say great where help through much before any same tell boy follow came want show also
    around form small set put end does another well must big even such because turn here why ask went men read need
    land different home us move try kind picture again change off play spell air away animal house point page letter
    mother answer found study still learn should world please really maybe always never often today yesterday
    """.split()
)

_SLOT = re.compile(r"\[([^]]*\{(weight|slant)\}[^]]*)\]")
_ARTICLE = re.compile(r"\ba (?=eight\b|8\b)")


class Caption(NamedTuple):
    """A caption and what it states; None for what it does not."""

    text: str
    digit: int | None = None
    weight: int | None = None  # an index into measure.STROKE_WEIGHTS
    slant: int | None = None  # an index into measure.SLANTS
    frame: int | None = None  # None for words among filler and for a user's own text


def render(frame: str, number: str, weight: str | None = None, slant: str | None = None) -> str:
    """Fill a frame: render("a[ {weight}] {n}", "five", weight="bold") is "a bold five"."""
    words = {"weight": weight, "slant": slant}
    text = _SLOT.sub(lambda slot: "" if words[slot[2]] is None else slot[1], frame)
    return _ARTICLE.sub("an ", text.format(n=number, **words))


def frames_named(name: str) -> tuple[str, ...]:
    """Return TRAIN_FRAMES ("train") or UNSEEN_FRAMES ("unseen")."""
    if name not in ("train", "unseen"):
        raise ValueError(f"caption frames are 'train' or 'unseen', not {name!r}")
    if name == "train":
        return TRAIN_FRAMES
    from ldm.data.unseen_frames import UNSEEN_FRAMES  # only evaluation needs them

    return UNSEEN_FRAMES


class Captioner:
    """Generates captions. All randomness comes from (seed, epoch, index).

    Args:
        frames: "train" or "unseen".
        styled: The share of captions that state stroke weight, slant or both (a third each).
        filler: The share of captions with filler words, from which a text encoder learns what to ignore. Half of these
            get one to four filler words between their own; the others are number and style among two to eight.
    """

    def __init__(self, seed: int = 0, frames: str = "train", styled: float = 0.5, filler: float = 0.0):
        for name, share in (("styled", styled), ("filler", filler)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share of the captions, from 0 to 1, not {share}")
        self.seed, self.frames, self.styled, self.filler = seed, frames_named(frames), styled, filler

    def caption(self, epoch: int, index: int, digit: int, weight: int, slant: int) -> Caption:
        """Return the caption of image `index` in `epoch`: a `digit` of these style classes, -1 for one to leave out."""
        # Only random() is guaranteed to be the same in every version of Python; a string seeds it by SHA-512.
        uniform = random.Random(f"{self.seed} {epoch} {index}").random
        number = _pick(uniform, (NUMBER_WORDS[digit], str(digit)))
        which = _pick(uniform, ("weight", "slant", "both")) if uniform() < self.styled else "neither"
        stated_weight = weight if which in ("weight", "both") and weight >= 0 else None
        stated_slant = slant if which in ("slant", "both") and slant >= 0 else None
        weight_word = None if stated_weight is None else _pick(uniform, WEIGHT_WORDS[stated_weight])
        slant_word = None if stated_slant is None else _pick(uniform, SLANT_WORDS[stated_slant])
        frame: int | None = int(uniform() * len(self.frames))
        text = render(self.frames[frame], number, weight_word, slant_word)
        if uniform() < self.filler:
            if uniform() < 0.5:
                text = _insert(uniform, text.split(), 1 + int(uniform() * 4))
            else:
                parts = [word for word in (weight_word, number, slant_word) if word is not None]
                text, frame = _insert(uniform, _shuffled(uniform, parts), 2 + int(uniform() * 7)), None
        return Caption(text, digit, stated_weight, stated_slant, frame)

    def texts(self) -> list[str]:
        """Return texts that contain every word of its captions, to make a reduced vocabulary from."""
        words = [*NUMBER_WORDS, *"0123456789", *FILLER_WORDS]
        styles = [(weight, slant) for weight in sum(WEIGHT_WORDS, ()) for slant in sum(SLANT_WORDS, ())]
        return words + [render(frame, "five", *style) for frame in self.frames for style in styles]


def _pick(uniform: Callable[[], float], options: tuple[str, ...]) -> str:
    return options[int(uniform() * len(options))]


def _shuffled(uniform: Callable[[], float], words: list[str]) -> list[str]:
    return [word for _, word in sorted((uniform(), word) for word in words)]


def _insert(uniform: Callable[[], float], words: list[str], count: int) -> str:
    """Insert `count` filler words at random places."""
    for _ in range(count):
        words.insert(int(uniform() * (len(words) + 1)), _pick(uniform, FILLER_WORDS))
    return " ".join(words)
