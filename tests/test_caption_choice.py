"""Captions of own images: one of several, tags shuffled, all by (seed, epoch, index); and the numbers of classes."""

from collections import Counter

from ldm.data.caption_choice import choose_caption, number_classes, split_captions


def test_each_line_is_a_caption():
    assert split_captions("a kite\r\n\n  red, round \n") == ["a kite", "red, round"] and split_captions(" \n\n") == []
    assert split_captions("a\u2028red\x85kite\rhigh") == ["a\u2028red\x85kite", "high"]


def test_one_of_several_is_chosen_by_seed_epoch_and_index():
    captions = ["a", "b", "c"]
    chosen = [choose_caption(captions, 0, epoch, index) for epoch in range(30) for index in range(30)]
    assert chosen == [choose_caption(captions, 0, epoch, index) for epoch in range(30) for index in range(30)]
    counts = Counter(chosen)
    assert all(abs(counts[one] - 300) < 60 for one in captions)  # 4 standard deviations of 14.1
    assert chosen != [choose_caption(captions, 1, epoch, index) for epoch in range(30) for index in range(30)]
    assert choose_caption([" as, it  is "], 0, 3, 4) == " as, it  is "


def test_tags_are_shuffled_after_the_first():
    tags = "sks, red,  round ,, high"
    shuffled = [choose_caption([tags], 0, epoch, 7, shuffle_tags_after=1) for epoch in range(200)]
    assert {text.split(", ")[0] for text in shuffled} == {"sks"}
    orders = Counter(text.removeprefix("sks, ") for text in shuffled)
    assert len(orders) == 6 and min(orders.values()) > 10 and "red, round, high" in orders  # every order: 33 of each
    assert choose_caption([tags], 0, 0, 7, shuffle_tags_after=9) == "sks, red, round, high"
    assert {choose_caption([tags], 0, epoch, 7, 0).split(", ")[0] for epoch in range(40)} == set(
        tags.split(", ")[:1]
    ) | {"red", "round", "high"}


def test_classes_are_numbered_by_name():
    assert number_classes(["cat", "ant", "cat", "10", "9"]) == (["10", "9", "ant", "cat"], [3, 2, 3, 0, 1])
