"""Which values fit a type hint, what a message says otherwise, and how much of a value it echoes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from torch import nn

from ldm.checks import Levels, Range, shorten, shorten_values, unfit

FITS = [
    (3, int), (np.int64(3), int), (3, float), (0.5, float), (np.float64(0.5), float), (True, bool), ("a", str),
    (Path("a"), str), ("a", Path),
    (None, int | None), ([1, 2], Sequence[int]), ((1, 2), list[int]), ([], Sequence[int]),
    ([1, "a"], tuple[int, str]), ([1, 2, 3], tuple[int, ...]), ({"a": 1}, dict[str, int]), ({}, Mapping[str, Any]),
    (-1, Literal[-1] | Annotated[int, Range(1)]), (math.inf, Annotated[float, Range(0, infinite=True)]),
    ([1, 2], Levels), (object(), Any), (object(), nn.Module), ("a", str | Sequence[str]), (["a"], str | Sequence[str]),
]  # fmt: skip
UNFIT = [
    (True, int, "an integer"), ("3", int, "an integer"), (1.5, int, "an integer"), (2**63, int, "an integer"),
    (None, int, "an integer"), ({}, int, "an integer"), ([3], int, "an integer"),
    (True, float, "a number"), ("1e-4", float, "a number"),
    (math.nan, float, "a number"), (-math.inf, float, "a number"),
    (10**400, float, "a number"), (1, bool, "true or false"), (3, str, "a text"), (5, str | None, "a text or null"),
    (0, Annotated[int, Range(1)], "an integer of at least 1"),
    (math.nan, Annotated[float, Range(0, 1)], "a number from 0 to 1"),
    (math.inf, Annotated[float, Range(0)], "a number of at least 0"), (2, Literal["a", "b"], "'a' or 'b'"),
    ("ab", Sequence[str], "a list, each a text"), (3, Sequence[int], "a list, each an integer"),
    ([1, "a"], Sequence[int], "a list, each an integer"), ([1], tuple[int, int], "a list of 2 entries"),
    ([], Mapping[str, Any], "a mapping"), ({"a": "b"}, dict[str, int], "a mapping"),
    ([], Levels, "a list of at least one entry"), ([0], Levels, "a list, each an integer from 1"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint"), FITS)
def test_what_fits(value, hint):
    assert unfit(value, hint) == ""


@pytest.mark.parametrize(("value", "hint", "wanted"), UNFIT)
def test_what_does_not(value, hint, wanted):
    assert unfit(value, hint).startswith(wanted)


def test_a_message_echoes_at_most_200_characters():
    assert shorten("a" * 200) == "a" * 200
    assert len(shorten("a" * 10**6)) < 200


def test_a_report_echoes_at_most_200_characters_of_each_value():
    long, words = "a" * 10**6, "a " * 10**6
    message = f"the model's prompt '{words}' and \"{words}\" of {long} is not 'one' of 200"
    short = shorten_values(message)
    assert len(short) < 700 and short.startswith("the model's prompt 'a a") and short.endswith(" is not 'one' of 200")
    prose = "a plain sentence, " * 40
    assert shorten_values(prose) == prose
