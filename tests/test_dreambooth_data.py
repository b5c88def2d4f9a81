"""DreamBooth's data: pairs, captions of each image, several subjects, and images of every kind."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.data.dreambooth import DreamBooth, choices, identifiers, subjects, unread


def write(folder, count, level=0, size=(12, 12)):
    """Grey images; the level of number i is level + i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("L", size, level + i).save(folder / f"{i}.png")
    return folder


def subject(tmp_path, name, images, classes=0, level=0):
    row = {"instance_dir": str(write(tmp_path / name, images, level)), "instance_prompt": f"a sks {name}"}
    if classes:
        write(tmp_path / f"{name}s", classes, level + 100)
        files = {f"{i}.png": f"a {name}" for i in range(classes)}
        row |= {"class_dir": str(tmp_path / f"{name}s"), "class_images": files}
    return row


def levels(samples, key):
    return [round((sample[key].mean().item() + 1) * 127.5) for sample in samples]


def test_pairs_run_through_all_images(tmp_path):
    data = DreamBooth([subject(tmp_path, "dog", 3, 7)], 8, channels=1)
    samples = [data[i] for i in range(len(data))]
    assert len(data) == 7
    assert levels(samples, "image") == [0, 1, 2, 0, 1, 2, 0]
    assert levels(samples, "class_image") == [100 + i for i in range(7)]
    assert {s["caption"] for s in samples} == {"a sks dog"} and {s["class_caption"] for s in samples} == {"a dog"}
    assert samples[0]["image"].shape == (1, 8, 8)
    with pytest.raises(IndexError):
        data[7]


def test_without_a_class_there_are_no_pairs(tmp_path):
    data = DreamBooth([subject(tmp_path, "dog", 3)], 8, min_samples=8)
    assert len(data) == 8 and data[0].keys() == {"image", "caption"} and data[0]["image"].shape == (3, 8, 8)


def test_several_subjects_weigh_the_same(tmp_path):
    rows = [subject(tmp_path, "dog", 1, 4), subject(tmp_path, "cat", 5, 2, level=50)]
    data = DreamBooth(rows, 8, channels=1)
    samples = [data[i] for i in range(len(data))]
    assert levels(samples, "image") == [0, 50, 0, 51, 0, 52, 0, 53, 0, 54]
    assert levels(samples, "class_image") == [100, 150, 101, 151, 102, 150, 103, 151, 100, 150]
    assert [s["class_caption"] for s in samples[:2]] == ["a dog", "a cat"]
    assert data.captions() == ["a sks dog", "a sks cat", "a dog", "a cat"]
    refused("only 1 of 2 subjects have class images", DreamBooth, [rows[0], subject(tmp_path, "cow", 2)], 8)


def test_captions_of_single_images(tmp_path, capsys):
    row = subject(tmp_path, "dog", 4)
    folder = tmp_path / "dog"
    (folder / "0.txt").write_text("a sks dog asleep\n")
    (folder / "1.caption").write_text("a sks dog in snow")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "2.png", "text": "a sks dog on a beach"}))
    data = DreamBooth([row], 8)
    captions = ["a sks dog asleep", "a sks dog in snow", "a sks dog on a beach", "a sks dog"]
    assert [data[i]["caption"] for i in range(4)] == captions and data.captions() == captions
    assert capsys.readouterr().err == ""
    (folder / "0.txt").write_text(" \n")  # what failed captioning leaves: not the empty prompt
    (folder / "2.txt").write_text("")  # the list has one for it
    captions[0] = "a sks dog"
    assert DreamBooth([row], 8).captions() == list(dict.fromkeys(captions))
    assert (
        f"note: 1 captions are empty, and the caption for all is used instead: {folder / '0.txt'}"
        in capsys.readouterr().err
    )
    (folder / "0.txt").unlink()
    (folder / "2.txt").unlink()
    (folder / "notes.pdf").write_text("x")
    (folder / ".DS_Store").write_text("x")
    assert unread(folder, [*map(Path, data.instances[0].paths)]) == [".DS_Store", "notes.pdf"]


def test_subject_and_class_have_different_images(tmp_path):
    folder, others = write(tmp_path / "dog", 2), write(tmp_path / "dogs", 3, level=50)
    (tmp_path / "link").symlink_to(folder)
    rows = [(folder, others), (others, folder)]
    assert len(subjects([str(a) for a, _ in rows[:1]], "a sks dog", "a dog", str(others))) == 1
    for same in (folder, tmp_path / "link"):
        refused("dog|link would hold", subjects, str(folder), "a sks dog", "a dog", str(same))
    refused("would hold", subjects, *zip(*[(str(a), "a sks dog", "a dog", str(b)) for a, b in rows], strict=True))
    subjects(str(folder), "a sks dog", None, str(folder))  # without a class there is nothing to confuse
    (others / "9.png").hardlink_to(folder / "1.png")
    refused("1.png is an image of the subject, and .*9.png", subjects, str(folder), "a sks dog", "a dog", str(others))
    refused("has a choice, as only class", subjects, str(folder), "a sks {dog|cat}", None, str(others))
    refused("' ' is empty", subjects, str(folder), " ", None, str(others))
    refused("'a dog' names the subject and its class", subjects, str(folder), "a dog", "a {dog|cat}", str(others))


def test_images_of_every_kind(tmp_path):
    """Left half white, right half black, however it is stored: read as that."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    half = np.zeros((10, 10), np.uint8)
    half[:, :5] = 255
    grey = Image.fromarray(half)
    grey.save(folder / "a.png")
    Image.merge("RGBA", [Image.new("L", (10, 10), 0)] * 3 + [Image.fromarray(255 - half)]).save(folder / "b.png")
    Image.fromarray(half.astype(np.uint16) * 257).save(folder / "c.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned by 90 degrees clockwise
    grey.convert("RGB").rotate(90).save(folder / "d.png", exif=exif)
    data = DreamBooth([{"instance_dir": str(folder), "instance_prompt": "x"}], 10)
    expected = torch.from_numpy(half).float().expand(3, -1, -1) / 127.5 - 1
    for i in range(4):
        torch.testing.assert_close(data[i]["image"], expected, rtol=0, atol=0, msg=str(i))


def test_crops_and_mirrorings_only_when_asked_for(tmp_path):
    row = {"instance_dir": str(write(tmp_path / "wide", 2, size=(30, 10))), "instance_prompt": "x"}
    gradient = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (10, 1)))
    gradient.save(tmp_path / "wide" / "0.png")
    plain, augmented = DreamBooth([row], 10, channels=1), DreamBooth([row], 10, channels=1, crop="random", flip=True)
    assert not plain.augments and augmented.augments
    seen = set()
    for epoch in range(6):
        plain.set_epoch(epoch)
        augmented.set_epoch(epoch)
        assert levels([plain[0]], "image") == [round(np.arange(10, 20).mean() * 8)]
        seen.add(augmented[0]["image"].numpy().tobytes())
    assert len(seen) == 6


def test_bad_images_are_named(tmp_path):
    row = subject(tmp_path, "dog", 3)
    whole = (tmp_path / "dog" / "1.png").read_bytes()
    (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    refused(r"1\.png (cannot be read as an image|is not an image)", DreamBooth, [row], 8)
    (tmp_path / "dog" / "1.png").write_text("hello")
    refused(r"1\.png is not an image", DreamBooth, [row], 8)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        DreamBooth([{"instance_dir": str(empty(tmp_path)), "instance_prompt": "x"}], 8)
    refused("DreamBooth needs a subject", DreamBooth, [], 8)


def empty(tmp_path):
    (tmp_path / "empty").mkdir(exist_ok=True)
    (tmp_path / "empty" / "readme.md").write_text("nothing")
    return tmp_path / "empty"


def test_the_words_that_name_a_subject():
    assert identifiers("A photo of sks dog.", "a photo of a dog") == ["sks"]
    assert identifiers("zwx star, zwx", "a handwritten digit") == ["zwx", "star"]
    assert identifiers("a sks dog", None) == []
    assert identifiers("a sks dog in snow", "a {dog|cat} {|in snow}") == ["sks"]


def test_a_class_of_several_prompts(tmp_path):
    """Each choice is a prompt; an empty one leaves no second space; each class image has its own caption."""
    assert choices("a {dog|cat} {|in snow}") == ["a dog", "a dog in snow", "a cat", "a cat in snow"]
    assert choices("a {dog}  {") == ["a {dog}  {"] and choices("{a|a} b") == ["a b"]
    for half in ("a {dog|cat", "a dog|cat}", "a {dog|{cat|cow}}"):
        refused("has a choice with a brace too few or too many", choices, half)
    row = subject(tmp_path, "dog", 1, 3) | {"class_images": {"2.png": "a cat", "0.png": "a dog"}}
    samples = [DreamBooth([row], 8, channels=1)[i] for i in range(2)]
    assert levels(samples, "class_image") == [102, 100] and [s["class_caption"] for s in samples] == ["a cat", "a dog"]
    refused(
        "none of the 1 images in .* has a caption: write 0.txt",
        DreamBooth,
        [row | {"class_images": {"0.png": None}}],
        8,
    )
