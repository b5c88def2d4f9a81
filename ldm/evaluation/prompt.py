"""Prompt accuracy: shares of right answers, with the interval that their number allows."""

from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest


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
