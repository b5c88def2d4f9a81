"""What changes a model records it (LoRAs, learned words, other parts, settings), as text and back, in any order."""

import copy

import pytest
import torch
from conftest import refused
from lora_models import learned
from script_runs import load_script, pixels, recipe, runner, samples

import ldm
from ldm.changes import Change, changes_from_text, changes_of, changes_to_text, same_changes
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.finetune.embeddings import add_word, apply_embedding
from ldm.finetune.lora import attach, detach, merge, restore
from ldm.finetune.lora_files import apply_lora, merge_lora, save_lora


@pytest.fixture
def model(tiny_checkpoint):
    return ldm.load(tiny_checkpoint, device="cpu")


@pytest.fixture
def loras(model, tmp_path):
    """Two files of LoRAs."""
    for name, seed in (("a", 0), ("b", 1)):
        adapters = learned(model, targets=("attention",), seed=seed)
        detach(adapters)
        save_lora(tmp_path / f"{name}.safetensors", adapters, model)
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def listed(model) -> list[tuple]:
    return [(change.kind, change.name, change.strength) for change in changes_of(model)]


def test_a_lora_is_there_while_it_is(model, loras):
    """Merged and merged back in any order, or hooked on at a strength that is set later."""
    assert listed(model) == []
    first, second = merge_lora(model, loras[0], 0.5), merge_lora(model, loras[1])
    assert listed(model) == [("lora", "a", 0.5), ("lora", "b", 1.0)]
    restore(model, second)
    assert listed(model) == [("lora", "a", 0.5)]
    second = merge_lora(model, loras[1], 2.0)
    restore(model, second | first)
    assert listed(model) == []
    adapters = apply_lora(model, loras[0], 0.25)
    for adapter in adapters.values():
        adapter.strength = 0.75
    assert listed(model) == [("lora", "a", 0.75)] == listed(copy.deepcopy(model))
    merge(model, adapters)
    assert listed(model) == [("lora", "a", 0.75)]
    adapters = apply_lora(model, loras[1])
    detach(adapters)
    assert listed(model) == [("lora", "a", 0.75)]


def test_adapters_attached_in_python(model):
    adapters = attach(model, rank=2, targets=["attention"])
    assert listed(model) == []  # they change nothing yet
    for adapter in adapters.values():
        adapter.up.data.fill_(0.1)  # trained
    (before,) = changes_of(model)
    assert before[:2] == ("lora", "attached") and changes_from_text(changes_to_text([before])) == (before,)
    next(iter(adapters.values())).strength = 0.5
    (after,) = changes_of(model)
    assert after.hash != before.hash
    replaced = merge(model, adapters)
    assert changes_of(model) == (after,)
    restore(model, replaced)
    assert listed(model) == []


def test_a_word_added_in_python(model):
    vectors = torch.randn(1, 32)
    add_word(model, "<it>", vectors)
    (before,) = changes_of(model)
    assert before[:2] == ("words", "<it>") and len(before.hash) == 10
    vectors += 1  # trained
    assert changes_of(model)[0].hash != before.hash


def test_words_parts_and_settings(model, tiny_checkpoint, tmp_path):
    write_words(tmp_path / "word.safetensors", LearnedWord("<it>", torch.randn(1, 32)), "diffusers")
    apply_embedding(model, tmp_path / "word.safetensors")
    assert listed(model) == [("words", "<it>", None)]
    model.prediction, model.schedule_params = "eps", {"name": "linear", "T": 500}
    assert listed(model)[1:] == [("schedule", "name=linear T=500", None), ("prediction", "eps", None)]
    model.prediction = "v"
    assert listed(model)[1:] == [("schedule", "name=linear T=500", None)]
    loaded = ldm.load(tiny_checkpoint, device="cpu", vae=tiny_checkpoint, prediction="eps")
    assert listed(loaded) == [("vae", "", None), ("prediction", "eps", None)]
    assert changes_of(loaded)[0].hash == loaded.hash


def test_the_library_and_the_script_say_the_same_and_order_does_not_matter(model, loras, tiny_checkpoint, tmp_path):
    generate = runner(load_script("txt2img"), tiny_checkpoint, tmp_path)
    options = ["--lora", f"{loras[0]}:0.5", "--lora", loras[1]]
    (first,) = samples(generate(*options, out="first"))
    for path, strength in zip(loras, (0.5, 1.0), strict=True):
        merge_lora(model, path, strength)
    assert recipe(first).changes == changes_of(model)
    (again,) = samples(generate("--from-png", first, *options[2:], *options[:2], out="again", steps=None))
    assert abs(pixels(again).astype(int) - pixels(first)).max() <= 1  # sums in another order
    for other in (options[:2], [], ["--lora", loras[0], "--lora", loras[1]]):
        with pytest.raises(ValueError, match="made with lora a .* at 0.5; lora b .* in the model, which now has"):
            generate("--from-png", first, *other)


CHANGES = (
    Change("lora", "a b", "0123456789", 0.123456789),
    Change("lora", "c", "abcdefabcd", -1.0),
    Change("words", "<a> <b>", "0123456789"),
    Change("vae", hash="0123456789"),
    Change("prediction", "v"),
    Change("schedule", "name=linear T=500"),
)


def test_text_and_back():
    assert changes_from_text(changes_to_text(CHANGES)) == CHANGES
    assert changes_to_text(CHANGES[1:4]) == "lora c abcdefabcd at -1; words <a> <b> 0123456789; vae 0123456789"
    refused("is not a change of a model", changes_from_text, "; ")


def test_what_is_the_same():
    assert same_changes(CHANGES, reversed(CHANGES))
    assert same_changes(CHANGES, [CHANGES[0]._replace(name="z", strength=0.1234568), *CHANGES[1:]])
    for i, other in ((0, {"strength": 0.2}), (1, {"hash": "0" * 10}), (2, {"name": "<c>"}), (4, {"name": "eps"})):
        assert not same_changes(CHANGES, [*CHANGES[:i], CHANGES[i]._replace(**other), *CHANGES[i + 1 :]])
    assert not same_changes(CHANGES, [*CHANGES, CHANGES[0]])
