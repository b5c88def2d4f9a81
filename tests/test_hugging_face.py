"""Data sets of Hugging Face's library: read from disk in each of its forms, with captions and classes, or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from tiny_stages import config_of

from ldm.data.folder import Folder
from ldm.data.hugging_face import HuggingFace
from ldm.training.loop import train

datasets = pytest.importorskip("datasets")
KEYS = {"size": 16, "channels": 1}
EVERYTHING = {**KEYS, "reads": ("image", "caption", "label")}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """The library's own folder, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "images" / ("cats", "dogs")[i // 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (16, 18), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"caption {i}")
    return tmp_path / "images"


def made(folder: Path, **columns):
    """The same images as a data set of the library."""
    paths = sorted(folder.rglob("*.png"))
    data = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "text": [path.with_suffix(".txt").read_text() for path in paths],
        "label": [path.parent.name for path in paths],
    }
    found = datasets.Dataset.from_dict(data | columns)
    return found.cast_column("image", datasets.Image()) if "image" not in columns else found


def save(data, path: Path, form: str) -> str:
    if form == "save_to_disk":
        data.save_to_disk(path)
    elif form == "splits":
        datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(path)
    elif form == "file":
        data.to_parquet(path := path.with_suffix(".parquet"))
    else:  # as the hub has it
        path.mkdir()
        data.to_parquet(path / "train-00000-of-00001.parquet")
        data.select([0]).to_parquet(path / "test-00000-of-00001.parquet")
        (path / f"{path.name}.py").write_text("raise SystemExit('code of a data set ran')")
    return str(path)


@pytest.mark.parametrize("form", ["save_to_disk", "splits", "file", "folder"])
def test_each_form_gives_what_the_folder_of_images_gives(folder: Path, tmp_path: Path, form: str, capsys) -> None:
    root = save(made(folder).class_encode_column("label"), tmp_path / "data", form)
    options = {**EVERYTHING, "crop": "random", "flip": True}
    ours, theirs = Folder(folder, **options), HuggingFace(root, **options)
    assert theirs.classes == ours.classes == ["cats", "dogs"] and theirs.texts() == ours.texts()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert (one["caption"], one["label"]) == (other["caption"], other["label"])
    if form in ("splits", "folder"):
        assert "note: '" in (said := capsys.readouterr().err) and "of which 'train' is used: data.params.split" in said
        assert len(HuggingFace(root, split="test", **KEYS)) == 1


def test_other_columns_and_kinds_of_them(folder: Path, tmp_path: Path) -> None:
    """Images as bytes or paths, lists of captions, classes as texts or numbers, and rows left out."""
    paths = sorted(map(str, folder.rglob("*.png")))
    own = {"image": paths, "pixels": [Path(p).read_bytes() for p in paths[:5]] + [b"no"]}
    own |= {"said": [["a", " b "], [], ["c"], ["d"], ["e"], ["f"]], "number": [0, 3, 1, 1, 1, 1]}
    root = save(made(folder, **own), tmp_path / "data", "save_to_disk")
    data = HuggingFace(root, image="pixels", text="said", label="number", caption="", on_error="skip", **EVERYTHING)
    assert list(data.captions) == [["a", "b"], [""], ["c"], ["d"], ["e"]] and data.labels == [0, 3, 1, 1, 1]
    assert data.classes == ["0", "1", "2", "3"]
    by_path = HuggingFace(root, **EVERYTHING)
    assert by_path.classes == ["cats", "dogs"] and torch.equal(data[4]["image"], by_path[4]["image"])
    refused("row 5 is not an image", HuggingFace, root, image="pixels", **KEYS)
    without = save(made(folder, image=[None, *paths[1:]]), tmp_path / "without", "save_to_disk")
    assert len(HuggingFace(without, **KEYS, on_error="skip")) == 5
    refused("1 of 6 images cannot be used: .*row 0: the image None", HuggingFace, without, **KEYS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text": "caption"},
            "no column 'caption' of the captions, only image, text, label, empty, minus: .*data.params.text",
        ),
        ({"image": "img"}, "no column 'img' of the images, .*data.params.image"),
        ({"reads": ("image", "label"), "label": "class"}, "no column 'class' of the labels"),
        ({"text": "empty"}, "1 of 6 images cannot be used: data: row 1 has no caption, or an empty one"),
        ({"text": "minus"}, "row 0: the caption -1 is not a text"),
        ({"reads": ("image", "label"), "label": "minus"}, "row 0: -1 is not the number of a class, from 0 to 1,048"),
        ({"image": "minus"}, "row 0: the image -1 is neither bytes nor a path"),
        ({"split": "test"}, "no split 'test', it is one data set"),
        ({"subset": "a"}, "subset is for names on the hub"),
        ({"download": True}, "download is for names on the hub"),
        ({"root": "elsewhere"}, "data.params.download=true fetches it"),
        ({"root": "some/name"}, "data.params.download=true fetches it"),
        ({"root": "some/name", "download": True}, "the data set 'some/name' cannot be read: .*Hub"),
        ({"root": "images"}, "has neither Parquet nor Arrow files"),
        ({"root": None}, "no data set is given"),
    ],
)
def test_faults_are_named(folder: Path, tmp_path: Path, monkeypatch, options: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    save(made(folder, empty=["a", " ", "b", "c", "d", "e"], minus=[-1] * 6), tmp_path / "data", "save_to_disk")
    refused(message, HuggingFace, **{"root": "data", **KEYS, **options}, error=(ValueError, OSError))


def test_it_trains_as_the_folder_to_the_bit(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(made(folder), tmp_path / "data", "folder")
    results = []
    for target, root in (("folder.Folder", "images"), ("hugging_face.HuggingFace", "data")):
        config = config_of("classifier") | {"outdir": target}
        config["data"] = {"target": f"ldm.data.{target}", "params": {"root": root, "size": 32, "channels": 1}}
        config["loop"]["workers"] = 1
        results.append(train(config, device="cpu").read_bytes())
    assert results[0] == results[1]
