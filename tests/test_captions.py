"""Captions: what they say is what they report, they repeat exactly, and unseen wordings are unseen."""

import re
from collections import Counter

import pytest
from conftest import refused

from ldm.data.captions import (
    FILLER_WORDS,
    NUMBER_WORDS,
    SLANT_WORDS,
    TRAIN_FRAMES,
    WEIGHT_WORDS,
    Caption,
    Captioner,
    render,
)
from ldm.data.unseen_frames import UNSEEN_FRAMES

STYLE_PHRASES = [phrase for group in WEIGHT_WORDS + SLANT_WORDS for phrase in group]
NUMBERS = set(NUMBER_WORDS) | set("0123456789")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def sampled(captioner: Captioner, count: int, epoch: int = 0) -> list[tuple[tuple[int, int, int], Caption]]:
    facts = [(n % 10, n // 10 % 3, n // 30 % 3) for n in range(count)]
    return [(fact, captioner.caption(epoch, n, *fact)) for n, fact in enumerate(facts)]


@pytest.mark.parametrize("frames", ["train", "unseen"])
@pytest.mark.parametrize("filler", [0.0, 0.7])
def test_text_and_assertions_agree(frames: str, filler: float) -> None:
    """Read back from its words, every caption names its digit once and states a style if and only if it reports it."""
    for (digit, weight, slant), caption in sampled(Captioner(3, frames, 0.6, filler), 3000):
        said = words(caption.text)
        assert [word for word in said if word in NUMBERS] in ([str(digit)], [NUMBER_WORDS[digit]]), caption
        assert caption.digit == digit
        assert caption.weight in (None, weight) and caption.slant in (None, slant)
        # Each class has a word of its own: thin light medium bold thick; left upright right.
        weights = {n for n, group in enumerate(WEIGHT_WORDS) if set(group) & set(said)}
        slants = {n for n, name in enumerate(("left", "upright", "right")) if name in said}
        assert weights == ({weight} if caption.weight is not None else set()), caption
        assert slants == ({slant} if caption.slant is not None else set()), caption


def test_shares() -> None:
    captions = [caption for _, caption in sampled(Captioner(0), 6000)]
    kinds = Counter((c.weight is not None, c.slant is not None) for c in captions)
    # Half without style, a sixth each with weight, slant, both. Standard error of a share of 6,000: 0.0065 at most.
    assert kinds[False, False] / 6000 == pytest.approx(1 / 2, abs=0.03)
    for kind in ((True, False), (False, True), (True, True)):
        assert kinds[kind] / 6000 == pytest.approx(1 / 6, abs=0.025)
    numerals = sum(any(ch.isdigit() for ch in c.text) for c in captions)
    assert numerals / 6000 == pytest.approx(1 / 2, abs=0.03)
    assert {c.frame for c in captions} == set(range(len(TRAIN_FRAMES)))
    assert all(c.weight is None and c.slant is None for _, c in sampled(Captioner(0, styled=0.0), 300))
    assert all(c.weight is not None or c.slant is not None for _, c in sampled(Captioner(0, styled=1.0), 300))


def test_pure_function_of_seed_epoch_index() -> None:
    first = sampled(Captioner(5, filler=0.3), 200, epoch=2)
    assert first == sampled(Captioner(5, filler=0.3), 200, epoch=2)
    backwards = [Captioner(5, filler=0.3).caption(2, n, *first[n][0]) for n in reversed(range(200))]
    assert backwards == [caption for _, caption in reversed(first)]
    for other in (sampled(Captioner(6, filler=0.3), 200, epoch=2), sampled(Captioner(5, filler=0.3), 200, epoch=3)):
        same = sum(a == b for a, b in zip(first, other, strict=True))
        assert same < 20  # chance repeats only
    # Fixed for ever, in every version of Python: a resumed run must go on with the same captions.
    assert Captioner(0).caption(0, 0, 5, 2, 2).text == "this shows a five"
    assert (
        Captioner(7, "unseen", filler=1.0).caption(3, 11, 8, 0, 1).text
        == "into such 8 house so try letter give thin make"
    )


def test_unseen_frames_are_unseen() -> None:
    assert 20 <= len(TRAIN_FRAMES) <= 30 and len(UNSEEN_FRAMES) >= 20
    for frames in (TRAIN_FRAMES, UNSEEN_FRAMES):
        assert len(set(frames)) == len(frames)

    def skeletons(frames: tuple[str, ...]) -> set[tuple[str, ...]]:
        """Word sequences that a frame can give, numbers and styles replaced by their kind."""
        styles = [(w, s) for w in (None, "bold") for s in (None, "upright")]
        return {tuple(words(render(frame, "5", *style))) for frame in frames for style in styles}

    assert not skeletons(TRAIN_FRAMES) & skeletons(UNSEEN_FRAMES)
    assert "[{weight} ]{n}[ {slant}]" in UNSEEN_FRAMES  # the bare numeral, never a training caption
    assert ("5",) not in skeletons(TRAIN_FRAMES)
    for frame in TRAIN_FRAMES + UNSEEN_FRAMES:
        assert frame.count("{n}") == frame.count("{weight}") == frame.count("{slant}") == 1
    # Noise must not turn a training caption into a bare number either.
    assert all(len(words(c.text)) > 2 for _, c in sampled(Captioner(1, styled=0.0, filler=1.0), 2000))


def test_every_frame_reads_well() -> None:
    for frame in TRAIN_FRAMES + UNSEEN_FRAMES:
        for number in ("eight", "5"):
            for weight in (None, "bold"):
                for slant in (None, "upright"):
                    text = render(frame, number, weight, slant)
                    assert text == text.strip(" ,:") and "  " not in text and " ," not in text, text
                    assert not re.search(r"[{}\[\]]|\ba eight", text), text
    assert render("a[ {weight}] {n}[ {slant}]", "8") == "an 8"
    assert render("a[ {weight}] {n}[ {slant}]", "eight", "bold", "leaning left") == "a bold eight leaning left"


def test_filler_words_say_nothing() -> None:
    assert 140 <= len(FILLER_WORDS) and len(set(FILLER_WORDS)) == len(FILLER_WORDS)
    sound_alike = {"to", "too", "for", "won", "ate", "once", "first", "second", "single", "double", "both", "number"}
    style = {word for phrase in STYLE_PHRASES for word in phrase.split()} | {"straight", "dark", "heavy", "fat"}
    assert not set(FILLER_WORDS) & (NUMBERS | sound_alike | style)


def test_filler() -> None:
    plain, noisy = sampled(Captioner(2), 2000), sampled(Captioner(2, filler=0.4), 2000)
    changed = [(a, b) for (_, a), (_, b) in zip(plain, noisy, strict=True) if a.text != b.text]
    assert len(changed) / 2000 == pytest.approx(0.4, abs=0.05)
    for before, after in changed:
        assert after[1:4] == before[1:4]  # filler asserts nothing
        if after.frame is not None:  # the caption's own words are still there, in their order
            rest = iter(after.text.split())
            assert all(word in rest for word in before.text.split())
    assert sum(after.frame is None for _, after in changed) / len(changed) == pytest.approx(0.5, abs=0.1)


def test_unmeasured_style_is_not_stated() -> None:
    assert Captioner(0, styled=1.0).caption(0, 0, 3, -1, -1)[2:4] == (None, None)


@pytest.mark.parametrize("arguments", [{"frames": "test"}, {"styled": 1.5}, {"filler": -0.1}])
def test_bad_settings(arguments: dict) -> None:
    refused(str(next(iter(arguments.values()))), Captioner, **arguments)
