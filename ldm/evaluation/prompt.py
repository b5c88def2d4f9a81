"""Prompt accuracy: shares of right answers, with the interval that their number allows."""

import math
from collections.abc import Hashable, Sequence

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the score interval of a binomial share (Wilson 1927), which is right near 0 and 1, too.

    Raises:
        ValueError: not 0 <= successes <= n, or n is 0.
    """
    if not (0 <= successes <= n and n > 0):
        raise ValueError(f"{successes} successes of {n}: give 0 <= successes <= n and n above 0")
    share, denominator = successes / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy(right: Sequence[bool]) -> dict:
    """Return `{"accuracy", "interval", "n"}` of right answers; the first two are None without any answers."""
    n, successes = len(right), sum(map(bool, right))
    if not n:
        return {"accuracy": None, "interval": None, "n": 0}
    return {"accuracy": successes / n, "interval": list(wilson_interval(successes, n)), "n": n}


def accuracy_by(keys: Sequence[Hashable], right: Sequence[bool]) -> dict[str, dict]:
    """Return the `accuracy` of each group of answers with the same key, in the order of the keys."""
    groups: dict[Hashable, list[bool]] = {}
    for key, answer in zip(keys, right, strict=True):
        groups.setdefault(key, []).append(bool(answer))
    return {str(key): accuracy(groups[key]) for key in sorted(groups)}
