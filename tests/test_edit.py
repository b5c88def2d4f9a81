"""The command `ldm edit`: its files, the recipes in them, what it refuses, and that its options have an effect."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from script_runs import load_script, pixels, runner

from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.inference.again import read_image_text, read_recipe

EDIT = ["--prompt", "five ab", "--to", "five xy"]


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    return runner(load_script("edit"), tiny_checkpoint, tmp_path)


@pytest.fixture
def txt2img(tiny_checkpoint, tmp_path):
    return runner(load_script("txt2img"), tiny_checkpoint, tmp_path)


def files(folder):
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]


@pytest.mark.smoke
def test_pairs_their_grid_their_maps_and_their_recipes(run, txt2img):
    out = run(*EDIT, "--n_samples", 2, "--seed", 5, "--show-attention")
    samples = [f"samples/0000{i}.png" for i in range(4)]
    assert files(out) == ["attention-0000.png", "grid-0000.png", *samples]
    assert [read_recipe(out / name).seed for name in samples[::2]] == [5, 6]
    again = txt2img("--from-png", out / samples[2], out="again", steps=None)  # a first image is txt2img's own
    assert (pixels(again / "samples/00000.png") == pixels(out / samples[2])).all()
    refused("it was edited, which the command edit does", read_recipe, out / samples[1])
    text = read_image_text(out / samples[1])
    (how,) = re.findall(r'Edit of: (".*")$', text)
    assert text.startswith("five xy\n") and json.loads(how).startswith("'five ab' '--cross-steps=0.0 to 0.8'")
    with Image.open(out / "attention-0000.png") as sheet:
        assert sheet.width > 3 * 96 and sheet.height > 4 * 96  # an image and two words, four times


def test_what_has_no_effect_is_said(run, tmp_path, capsys):
    """Settings of guidance at scale 1, and a learned word in no prompt; and what the prompt is without one."""
    write_words(tmp_path / "it.safetensors", LearnedWord("<it>", torch.ones(1, 32)), "diffusers")
    word = ["--embedding", tmp_path / "it.safetensors"]
    run(*EDIT, *word, "--scale", 1, "--rescale", 0.5, "--negative-prompt", "<it>", out="one")
    notes = capsys.readouterr().err
    assert re.findall(r"--(\S+) has no effect at guidance scale 1", notes) == ["negative-prompt", "rescale"]
    assert notes.count("no prompt contains the learned word '<it>'") == 1
    run("--to", "a thin digit seven <it>", *word, out="two")
    notes = capsys.readouterr().err
    assert "no --prompt is given: the prompt is 'a thin digit seven'\n" in notes and "no prompt contains" not in notes


def test_attention_alone_is_of_the_prompts_images(run):
    out = run("--prompt", "five ab", "--show-attention")
    assert files(out) == ["attention-0000.png", "grid-0000.png", "samples/00000.png"]


def test_what_is_refused_before_anything_is_made(run, tmp_path):
    refused("nothing to edit: give --to, --reweight or --silence, or --show-attention", run)
    refused("--to is --prompt, 'five ab', so nothing is edited", run, *EDIT, "--to", "five ab", "--show-attention")
    refused("--reweight takes WORD=X, with a number X, got 'ab'", run, "--reweight", "ab")
    refused("--reweight takes WORD=X, with a number X, got '=2'", run, "--reweight", "=2")
    refused("needs one --reweight or --silence", run, "--reweight", "ab=2", "--reweight", "ab=3")
    refused("needs one --reweight or --silence", run, "--reweight", "ab=2", "--silence", "ab")
    refused("cross_steps would have no effect: give --to", run, "--show-attention", "--cross-steps", 0, 1)
    refused("self_steps ends before it begins", run, *EDIT, "--self-steps", 0.5, 0.2)
    refused("has no effect without --blend", run, *EDIT, "--blend-threshold", 0.5)
    refused("--compile would have no effect", run, *EDIT, "--compile")
    refused("the prompt 'five xy' has no word 'six'; it has five, xy", run, *EDIT, "--silence", "six")
    refused("at a time, take at least", run, *EDIT, "--n_samples", 10**9)
    for same in ("five ab ", "FIVE AB"):
        refused(f"reads {same!r} as it reads 'five ab': give --to other words", run, *EDIT, "--to", same)
    refused("'five xy' is weighted twice", run, *EDIT, "--reweight", "xy=2", "--reweight", "five xy=2")
    refused("there are none with words in them", run, "--prompt", "", "--show-attention")
    refused("blend had no effect", run, *EDIT, "--blend", "xy", steps=1)
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return path


@pytest.mark.smoke
def test_an_image_of_ones_own(run, image, capsys):
    """The grid has it above; what is printed is the distance of what is made again; the texts say how."""
    out = run(*EDIT, "--init-img", image, "--scale", 4, "--steps", 6)
    out = run(*EDIT, "--init-img", image, "--scale", 4, "--steps", 6, "--null-text", "--null-steps", 30)
    report = r"the image made again differs by (0\.\d+) of 1, by its first stage alone by (0\.\d+)"
    (plain, least), (optimised, same) = re.findall(report, capsys.readouterr().err)
    for i, found in ((0, plain), (2, optimised)):
        change = np.abs(pixels(out / f"samples/0000{i}.png").astype(int) - pixels(image)).mean() / 255
        assert float(found) == pytest.approx(change, abs=1e-4)
    assert least == same and plain != optimised
    assert files(out) == ["grid-0000.png", "grid-0001.png", *(f"samples/0000{i}.png" for i in range(4))]
    with Image.open(out / "grid-0001.png") as grid, Image.open(image) as own:
        factor = grid.width // own.width
        shown = grid.crop((0, 0, grid.width, grid.width)).resize(own.size, Image.Resampling.NEAREST)
        assert factor > 1 and (np.asarray(shown) == np.asarray(own)).all()
        assert grid.height == 3 * grid.width + 4
    texts = [read_image_text(out / f"samples/0000{i}.png") for i in range(2, 4)]
    assert all("Init image hash: " in text for text in texts)
    how = [json.loads(found) for text in texts for found in re.findall(r'Edit of: (".*")$', text)]
    assert how[0] == "'five ab' --corrections=1 --null-text --null-steps=30" and how[1].startswith(how[0])
    for i in range(4):
        refused("it was edited, which the command edit does", read_recipe, out / f"samples/0000{i}.png")


def test_an_image_of_another_size(run, image):
    Image.open(image).crop((0, 0, 30, 25)).save(image)
    out = run(*EDIT, "--init-img", image, "--show-attention", out="own")
    assert [Image.open(out / f"samples/0000{i}.png").size for i in range(2)] == [(30, 25)] * 2
    out = run(*EDIT, "--init-img", image, "--resize", out="resized")
    assert Image.open(out / "samples/00001.png").size == (38, 32)


def test_what_is_refused_of_an_image_of_ones_own(run, image, tmp_path):
    own = [*EDIT, "--init-img", image]
    refused(
        "null_text, corrections would have no effect: give --init-img", run, *EDIT, "--null-text", "--corrections", 0
    )
    refused("resize would have no effect: give --init-img", run, *EDIT, "--resize")
    refused("--init-img needs --prompt TEXT", run, *own[2:])
    refused("n_samples, seed would have no effect", run, *own, "--n_samples", 2, "--seed", 0)
    refused("--null-steps has no effect without --null-text", run, *own, "--null-steps", 3)
    refused("--null-text would have no effect: at guidance scale 1", run, *own, "--null-text", "--scale", 1)
    refused("inversion is of the sampler ddim with eta 0", run, *own, "--sampler", "heun")
    refused("does not exist", run, *EDIT, "--init-img", tmp_path / "none.png", error=FileNotFoundError)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_each_way_to_edit_changes_the_edited_image_only(run):
    def pair(*options):
        out = run("--prompt", "five ab", "--scale", 3, *options, out="".join(map(str, options)).replace(" ", ""))
        return [pixels(out / f"samples/0000{i}.png").tobytes() for i in range(2)]

    other = ["--to", "five xy"]
    blended = [*other, "--blend", "xy", "--blend-threshold", 1]  # one place at most changes, and its neighbours
    unchanged, *made = [
        pair("--reweight", "ab=1"),
        pair("--reweight", "ab=4"),
        pair("--silence", "ab"),
        pair(*other),
        *(pair(*other, *part) for part in (("--cross-steps", 0, 0), ("--self-steps", 0, 1), ("--pooled-steps", 0, 1))),
    ]
    assert unchanged[0] == unchanged[1] and pair(*blended)[0] == pair(*blended)[1]
    assert len({edited for _, edited in made}) == len(made) and all(first != edited for first, edited in made)
