"""What the name of an emoji says, and captions of it: `woman-astronaut-medium-dark-skin-tone` and many wordings.

A caption is a pure function of (seed, epoch, index) and of what it describes, like those of the digits. A frame is a
template; a part in [brackets] is removed unless its slot is filled. Skin tone and background are always stated, so
that a caption without a tone means the yellow default, and one without a background means white; the style is stated
in three of four captions.
"""

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from ldm.data.captions import NUMBER_WORDS

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
STYLES = {"fluent-emoji-flat": "flat", "noto": "detailed"}  # by the name of the set
COLOURS = {
    "red": (214, 69, 65), "orange": (243, 156, 60), "yellow": (247, 220, 111), "green": (88, 176, 100),
    "blue": (84, 150, 222), "purple": (149, 108, 190), "pink": (244, 167, 196), "brown": (140, 102, 76),
    "grey": (160, 164, 168), "black": (32, 34, 37),
}  # fmt: skip
CATEGORIES = {
    "Activities": "activity", "Animals & Nature": "nature", "Flags": "flag", "Food & Drink": "food",
    "Objects": "object", "People & Body": "people", "Smileys & Emotion": "smiley", "Symbols": "symbol",
    "Travel & Places": "place",
}  # fmt: skip
EMOJI_FRAMES = (
    "a[ {style}] drawing of {thing}[ with {tone} skin][ on a {background} background]",
    "a[ {style}] emoji of {thing}[ with {tone} skin][ on a {background} background]",
    "an icon of {thing}[ with {tone} skin][ in the {style} style][ on a {background} background]",
    "{thing}[ with {tone} skin][, {style}][, {background} background]",
    "{thing}[, {tone} skin][, {style}][ on a {background} background]",
    "{name}[, {tone} skin tone][, {style}][, {background} background]",
    "[{style} ]{name}[ with {tone} skin][ on a {background} background]",
    "[{style}: ]{name}[, {tone} skin][, {background} background]",
    "{kind}: {name}[, {tone} skin][, {style}][ on {background}]",
)
NUMERALS = (*NUMBER_WORDS, "ten")
STYLED = 0.75  # share of captions that state the style

_TONE = "(medium-light|medium-dark|light|medium|dark)"
# One spelling for what the two sets name differently, and the order of words in English.
_RENAMED = (
    ("blonde", "blond"),
    ("^(man|woman|person)-((?:red|curly|white|blond)-hair|beard)$", r"\1-with-\2"),
    ("^(man|woman|person)-(bald|deaf)$", r"\2-\1"),
    ("^man-merpeople$", "merman"),
    ("^woman-merpeople$", "mermaid"),
    ("^person-merpeople$", "merperson"),
    ("^person-(mage|elf|fairy|superhero|supervillain|vampire)$", r"\1"),
)
_GENDERS = {"man": "man", "men": "man", "woman": "woman", "women": "woman", "person": "person", "people": "person"}
_IN_NOUN = {  # names whose gender is in the noun: (gender, role)
    "boy": ("man", "child"), "girl": ("woman", "child"), "child": ("person", "child"),
    "prince": ("man", "royal"), "princess": ("woman", "royal"), "person-with-crown": ("person", "royal"),
    "merman": ("man", "merperson"), "mermaid": ("woman", "merperson"), "merperson": ("person", "merperson"),
    "santa-claus": ("man", "claus"), "mrs-claus": ("woman", "claus"), "mx-claus": ("person", "claus"),
    "older-person": ("person", "old"),
}  # fmt: skip


class Parts(NamedTuple):
    """What a name says."""

    thing: str  # in words and without tones, the same in both sets: "woman astronaut"
    tones: tuple[str, ...]  # of TONES, two for some couples; empty: the yellow default, or nobody
    gender: str | None  # "man", "woman", "person"; None for mixed couples and where there is no such choice
    role: str | None  # what is left without tone and gender, for whom tones exist: "astronaut", "waving hand"


def read_names(names: Iterable[str], bare: bool) -> dict[str, Parts]:
    """Return the parts of all names of a set.

    bare: tones are written `-dark`, not `-dark-skin-tone`. They are one where a name has other tones as well, so that
    `vertical-traffic-light` has none.
    """
    known, split = set(names), {}
    for name in known:
        match = re.fullmatch(f"(.+?)-{_TONE}", name) if bare else None
        if match and f"{match[1]}-medium-dark" in known:
            split[name] = (match[1], (match[2],))
        elif bare or name.removesuffix("-skin-tone") in TONES:  # the latter show the tones themselves
            split[name] = (name, ())
        else:
            split[name] = (re.sub(f"-{_TONE}-skin-tone", "", name), tuple(re.findall(f"-{_TONE}-skin-tone", name)))
    toned = {base for base, tones in split.values() if tones}
    plain = {base: _rename(base) for base, _ in split.values()}
    gendered = {_gender(plain[base])[1] for base in toned if _gender(plain[base])[0] in ("man", "woman")}
    found = {}
    for name, (base, tones) in split.items():
        gender, role = _gender(plain[base])
        if gender is None and role in gendered:
            gender = "person"
        has_tones = base in toned
        found[name] = Parts(
            plain[base].replace("-", " "), tones, gender if has_tones else None, role if has_tones else None
        )
    return found


def _rename(base: str) -> str:
    for pattern, new in _RENAMED:
        base = re.sub(pattern, new, base)
    return base


def _gender(base: str) -> tuple[str | None, str]:
    if base in _IN_NOUN:
        return _IN_NOUN[base]
    words = base.split("-")
    genders = {_GENDERS[word] for word in words if word in _GENDERS}
    role = " ".join(word for word in words if word not in {*_GENDERS, "and"}) or "adult"
    return (genders.pop() if len(genders) == 1 else None), role


def say(
    frame: str,
    thing: str,
    kind: str = "emoji",
    style: str | None = None,
    tones: tuple[str, ...] = (),
    background: str | None = None,
) -> str:
    """Fill a frame: say(EMOJI_FRAMES[0], "red apple", style="flat") is "a flat drawing of a red apple"."""
    vowel = re.match(r"(?!uni|uk|eu|ewe|one\b)[aeiou]|hour|x\b", thing)  # to the ear: a unicorn, an hourglass
    head = re.split(" (?:with|of|in|and|over|on|from|holding|lifting|showing) ", thing)[0]  # of "man with bunny ears"
    without = re.search("(?<![su])s$|^(the|men|women|people|no|mrs|mx|santa) |^[0-9]|men$", head)  # an article
    article = "" if without else "an " if vowel else "a "
    slots = {"style": style, "tone": " and ".join(tones) or None, "background": background}
    optional = re.compile(r"\[([^]]*\{(style|tone|background)\}[^]]*)\]")
    text = optional.sub(lambda part: "" if slots[part[2]] is None else part[1], frame)
    text = text.format(thing=article + thing, name=thing, kind=kind, **slots)
    return re.sub(r"\ba (?=orange|emoji)", "an ", text)


def choose_wording(
    seed: int, epoch: int, index: int, things: tuple[str, ...], kind: str, style: str, tones: tuple[str, ...],
    background: str | None,
) -> tuple[str, bool]:  # fmt: skip
    """Return the caption of sample `index` in `epoch`, and whether it states the style.

    things: its name in words, which three of four captions use, and other names of it.
    """
    uniform = random.Random(f"{seed} {epoch} {index}").random
    frame = EMOJI_FRAMES[int(uniform() * len(EMOJI_FRAMES))]
    thing = things[0] if uniform() < 0.75 else things[int(uniform() * len(things))]
    if uniform() < 0.5:  # "keycap 4" is also "keycap four"
        thing = re.sub(r"\b(10|[0-9])\b", lambda number: NUMERALS[int(number[1])], thing)
    stated = uniform() < STYLED
    return say(frame, thing, kind, style if stated else None, tones, background), stated


def caption_texts(things: Iterable[str]) -> list[str]:
    """Return texts that hold every word of the captions."""
    frames = [
        say(frame, "red apple", kind, style, TONES, colour)
        for frame in EMOJI_FRAMES
        for kind, style, colour in zip([*CATEGORIES.values(), "emoji"], [*STYLES.values()] * 5, COLOURS, strict=True)
    ]
    return [*frames, *NUMERALS, *sorted(set(things))]
