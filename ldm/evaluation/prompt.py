"""Prompt accuracy: shares of right answers, with the interval that their number allows; of stated styles, too."""

from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest
from torch import Tensor

from ldm.data.captions import Caption
from ldm.data.measure import SLANTS, STROKE_WEIGHTS, Thresholds, classify_styles


def accuracy(right: Sequence[bool]) -> dict:
    """Return `{"accuracy", "interval", "n"}` of right answers; the first two are None without any answers.

    The interval is the 95 % score interval (Wilson 1927), which is right near 0 and 1, too.
    """
    n, successes = len(right), sum(map(bool, right))
    if not n:
        return {"accuracy": None, "interval": None, "n": 0}
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return {"accuracy": successes / n, "interval": [float(interval.low), float(interval.high)], "n": n}


def accuracy_by(keys: Sequence[Any], right: Sequence[bool]) -> dict[str, dict]:
    """Return the `accuracy` of each group of answers with the same key, in the order of the keys."""
    groups: dict[Any, list[bool]] = {}
    for key, answer in zip(keys, right, strict=True):
        groups.setdefault(key, []).append(bool(answer))
    return {str(key): accuracy(groups[key]) for key in sorted(groups)}


def style_accuracy(images: Tensor, captions: Sequence[Caption], thresholds: Thresholds) -> dict:
    """Return the share of stated classes found on uint8 images (n, 28, 28), measured as for the training captions.

    `stated` counts each statement, `captions` each caption that states any (all of them must be found); `weight` and
    `slant` are the statements of each kind, with their classes. Captions that state nothing do not count.
    """
    found = classify_styles(images, thresholds)
    report: dict = {}
    answers: dict[int, list[bool]] = {}  # caption -> whether each of its statements is right
    for kind, names in (("weight", STROKE_WEIGHTS), ("slant", SLANTS)):
        stated = {i: value for i, caption in enumerate(captions) if (value := getattr(caption, kind)) is not None}
        classes = getattr(found, kind).tolist()
        right = [classes[i] == value for i, value in stated.items()]
        per_class = accuracy_by(list(stated.values()), right)
        report[kind] = {**accuracy(right), "per_class": {names[int(key)]: value for key, value in per_class.items()}}
        for i, answer in zip(stated, right, strict=True):
            answers.setdefault(i, []).append(answer)
    statements = [answer for several in answers.values() for answer in several]
    return {"stated": accuracy(statements), "captions": accuracy([all(a) for a in answers.values()]), **report}
