r"""Weighted prompts in the syntax of AUTOMATIC1111's web UI ("A1111").

    a (red) car          weight 1.1; ((red)) has 1.1 ** 2, and so on
    a (red:1.3) car      weight 1.3; brackets in brackets multiply
    a [red] car          weight 1 / 1.1
    \( \) \[ \] \\       these characters; a backslash before any other character is dropped
    a car BREAK a tree   the word in capitals ends the chunk: what follows begins a new one

Brackets that do not match are read as in A1111: one that is never closed acts to the end of the prompt (by 1.1 or
1 / 1.1), one that was never opened is text, and round and square ones may cross.

Weights multiply the hidden states of their tokens; then the chunk is scaled back to its former mean ("original"
emphasis). The factor is a ratio of two signed means, old over new. Where all tokens' means share a sign, its inverse is
an average of the weights. Where it is not (an encoder whose features average to almost zero: for one prompt the digits
model's factor would be -130; or negative weights), the mean is not restored.

Unlike A1111: the mean is of each chunk alone, never of the batch; BREAK acts inside brackets too; a weight may have
an exponent and is refused beyond 1000; `(a:1.2.3)`, at which A1111 fails, is text; prompt editing `[a:b:0.5]`,
alternation `[a|b]` and AND are not read. compel's syntax and meaning differ (`(red)1.3`, `red++`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from ldm.arrays import Tensor, cast_like, float32_or_wider, library

FACTORS = {"(": 1.1, "[": 1 / 1.1}  # of a bracket without a number
MAX_WEIGHT = 1000.0  # float16 still holds CLIP's largest features, about 30, times this
TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<number>[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|(?i:inf|nan)))\s*\)"
    r"|[()\[\]:]"
    r"|[^\\()\[\]:]+"
)
BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    text: str
    weight: float


def parse_prompt(prompt: str) -> list[list[Piece]]:
    """Parse a prompt into pieces, neighbours of equal weight joined, in a new list after each BREAK."""
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `texts` the content of each open bracket begins

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in TOKENS.finditer(prompt):
        token = match[0]
        if match["escaped"] is not None:
            texts.append(match["escaped"])
        elif token in opened:
            opened[token].append(len(texts))
        elif match["number"] is not None and opened["("]:
            close("(", float(match["number"]))
        elif token == ")" and opened["("]:
            close("(", FACTORS["("])
        elif token == "]" and opened["["]:
            close("[", FACTORS["["])
        else:
            first, *rest = BREAK.split(token)
            texts += [first, *(text for part in rest for text in (None, part))]
        weights += [1.0] * (len(texts) - len(weights))
    for bracket, starts in opened.items():
        while starts:
            close(bracket, FACTORS[bracket])
    return _joined(texts, weights)


def _joined(texts: Sequence[str | None], weights: Sequence[float]) -> list[list[Piece]]:
    sections: list[list[Piece]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif text and not abs(weight) <= MAX_WEIGHT:  # nan too
            raise ValueError(
                f"the weight {weight:g} of {text[:40]!r} must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; round "
                r"brackets in prompts are weights: write \( \) for the characters"
            )
        elif text and section and section[-1].weight == weight:
            section[-1] = Piece(section[-1].text + text, weight)
        elif text:
            section.append(Piece(text, weight))
    return sections


def weigh(states: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Multiply hidden states (b, n, d) by weights (b, n); scale each row to its former mean where that is valid."""
    own, exact = library(states), float32_or_wider(states)
    by = cast_like(weights, exact)
    weighted = exact * by[..., None]
    before, after = exact.mean((1, 2)), weighted.mean((1, 2))  # (b,)
    least, most = own.amin(by, 1), own.amax(by, 1)
    share = after / before  # a mean of the weights, if the tokens' own means share a sign
    sound = (share > 0) & (least <= share) & (share <= most)
    factor = own.where(sound, before / after, 1.0)
    return cast_like(weighted * factor[:, None, None], states)
