"""Captions of a folder's images, from all of their places, and classes from its sub-folders."""

import json
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image

from ldm.data.dreambooth import unread
from ldm.data.finding import find_images
from ldm.data.folder import Folder
from ldm.data.folder_captions import has_captions


@pytest.fixture
def root(tmp_path):
    """Two images in sub-folders and one beside them, without captions."""
    for name in ("cat/a.png", "dog/sub/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "captions.csv",
            '\ufefffile_name,text\r\ncat/a.png,"red, round"\r\nc.png,high\r\ncat/a.png,small\r\n',
            "several",
        ),
        ("captions.csv", '\ufefffile_name;text\r\ncat/a.png;"red, round"\r\nc.png;high\r\n', "one"),
        ("captions.csv", "file_name\tcaption\ncat/a.png\tred, round\nc.png\thigh\n", "one"),
        ("metadata.csv", 'more,text,file_name\n1,"red, round",cat/a.png\n2, high ,c.png\n', "one"),
        (
            "metadata.jsonl",
            '{"file_name": "cat/a.png", "text": ["red, round", "", "small"]}\n{"file_name": "c.png", "text": "high"}',
            "several",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "cat/a.png", "text": "red, round"}\n{"file_name": "cat/a.png", "text": "small"}\n'
            '{"file_name": "c.png", "text": "high"}',
            "several",
        ),
    ],
)
def test_tables(root: Path, name: str, text: str, expected: str) -> None:
    (root / name).write_text(text, encoding="utf-8")
    (root / "dog/sub/b.caption").write_text("a dog\n\na hound\n")
    assert has_captions(root, []) and not has_captions(root / "cat", [root / "cat/a.png"])
    data = Folder(root, 8)
    cat = {"several": ["red, round", "small"], "one": ["red, round"]}[expected]
    assert data.captions == [["high"], cat, ["a dog", "a hound"]] and data.texts() == ["high", *cat, "a dog", "a hound"]
    chosen = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        chosen.add(data[2]["caption"])
        assert data[2]["caption"] == data.caption_of(2).text == data.without_image(2)["caption"]
    assert chosen == {"a dog", "a hound"}
    tags = Folder(root, 8, shuffle_tags_after=0)
    assert {tags.set_epoch(epoch) or tags[0]["caption"] for epoch in range(3)} == {"high"}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name,text\nc.png,x\n", r"captions.csv needs a first line that names its columns, file_name,text"),
        ("", "captions.csv needs a first line"),
        (",".join(map(str, range(10**5))), "captions.csv needs a first line.{,400}$"),
        ("file_name,text\nc.png,red, round\n", "line 2, has not the 2 fields of the first line: put a caption"),
        ("file_name,text\nc.png\n", "line 2, has not the 2 fields"),
        (
            "file_name,text,text\nc.png,a,b\n",
            "captions.csv needs a first line .* file_name,text, once each, not .*'text', 't",
        ),
        ("file_name,caption,file_name\nc.png,a,c.png\n", "captions.csv needs a first line .* once each"),
        ("file_name,text\n\nd.png,x\n", r"line 3: there is no image 'd.png' below"),
        ('file_name,text\nc.png,"x\n', "line 1, is not a line of a csv file: unexpected end of data"),
    ],
)
def test_bad_csv(root: Path, text: str, match: str) -> None:
    (root / "captions.csv").write_text(text)
    refused(match, Folder, root, 8)


def test_missing_and_empty_captions_are_refused_or_left_out(root: Path, capsys) -> None:
    refused("none of the 3 images in .* has a caption: write c.txt beside c.png", Folder, root, 8)
    (root / "captions.csv").write_text("file_name,text\nc.png,x\n")
    (root / "dog/sub/b.txt").write_text("\n")
    both = "2 of 3 images cannot be used: .*a.png has no caption; the caption of .*b.txt is empty .on_error=skip"
    refused(both, Folder, root, 8)
    data = Folder(root, 8, on_error="skip")
    assert len(data) == 1 and data.captions == [["x"]] and data[0]["caption"] == "x"
    assert data.paths == [str(root / "c.png")]
    said = capsys.readouterr().err
    assert said.startswith("note: 2 of 3 images are left out: ") and "b.txt is empty" in said
    (root / "captions.csv").unlink()
    refused("none of 3 images can be used: ", Folder, root, 8, on_error="skip")
    others = {"cat/a.png": "", "c.png": "x", "dog/sub/b.png": "a dog"}
    assert Folder(root, 8, caption=others).texts() == ["x", "", "a dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "c.png", "text": "a\u2028red\x85kite"}\n'),
        ("captions.csv", "file_name,text\nc.png,a\u2028red\x85kite\n"),
    ],
)
def test_separators_of_unicode_end_no_line(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text, encoding="utf-8")
    assert Folder(root, 8, on_error="skip").texts() == ["a\u2028red\x85kite"]


def test_captions_that_are_not_utf8_are_named_or_left_out(root: Path, capsys) -> None:
    for image in ("cat/a", "dog/sub/b"):
        (root / f"{image}.txt").write_bytes("grün".encode("latin-1"))
    (root / "c.txt").write_text("x")
    refused("2 of 3 .*a.txt is not UTF-8 text .byte 2.: save it as UTF-8; .*b.txt is not UTF-8", Folder, root, 8)
    assert Folder(root, 8, on_error="skip").texts() == ["x"] and "2 of 3 images are left out" in capsys.readouterr().err


def test_folders_without_images_are_no_class(root: Path, capsys) -> None:
    (root / "c.png").unlink()
    for name in ("bird", ".hidden"):
        (root / name).mkdir()
    assert Folder(root, 8, reads=("image", "label")).classes == ["cat", "dog"]
    assert capsys.readouterr().err == "note: folders without images are left out: bird\n"


def test_classes_are_sub_folders(root: Path) -> None:
    refused(
        "c.png is of no class .1 of 3 images.: each class is a sub-folder of", Folder, root, 8, reads=("image", "label")
    )
    (root / "c.png").unlink()
    data = Folder(root, 8, reads=("image", "label"))
    assert (
        data.classes == ["cat", "dog"] and [data[i]["label"] for i in range(2)] == [0, 1] and "caption" not in data[0]
    )
    assert Folder(root, 8, paths=[root / "dog/sub/b.png"], reads=["label"]).labels == [1]


def test_images_alone_need_nothing(root: Path) -> None:
    (root / "metadata.jsonl").write_text("not json")
    assert list(Folder(root, 8, reads=("image",))[0]) == ["image"]


def test_names_of_other_systems_and_programs(root: Path, capsys) -> None:
    """Backslashes, `./`, accents composed or not, other cases and places of the suffix; what belongs to no image."""
    Image.new("RGB", (8, 8)).save(root / "cafe\u0301.png")  # as macOS writes it
    names = [".\\cat\\a.png", "./dog/sub/../sub/b.png", "caf\u00e9.png"]
    rows = [{"file_name": name, "caption": f"caption {i}"} for i, name in enumerate(names)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "c.png.TXT").write_text("high")
    for name in ("readme.txt", "cat/b.CAPTION"):
        (root / name).write_text("x")
    data = Folder(root, 8)
    assert data.texts() == ["high", "caption 2", "caption 0", "caption 1"]
    assert (
        capsys.readouterr().err
        == f"note: 2 caption files belong to no image: {root}/cat/b.CAPTION, {root}/readme.txt\n"
    )
    assert data.left_out == [f"{root}/cat/b.CAPTION has no image", f"{root}/readme.txt has no image"]
    (root / "c.txt").write_text("c")  # the image's own name goes first
    (root / "caf\u00e9.txt").write_text("e")
    assert Folder(root, 8).texts()[:2] == ["c", "e"] and has_captions(root, [root / "cafe\u0301.png"])
    assert unread(root, find_images(root)) == []
