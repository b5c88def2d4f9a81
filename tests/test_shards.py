"""Tar shards: every image once by any number of processes, exact resumption, the same training as of a folder."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file
from tiny_stages import config_of, write_inputs

from ldm.commands.shards import main
from ldm.data.folder import Folder
from ldm.data.mnist import MNIST
from ldm.data.shards import Shards, find_shards
from ldm.training.latents import LatentDataset
from ldm.training.loader import training_batches
from ldm.training.loop import train
from ldm.training.order import EpochBatches


def write_folder(folder: Path, count: int = 24, size: int = 32, captions: bool = True) -> Path:
    """Write images of noise in two sub-folders, the classes; names and captions that differ in length."""
    noise = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("ab"[i % 2] * 9) / f"{7 * i % count:02}.v{i}.x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (size, size + i % 3), dtype=np.uint8)).save(path)
        if captions:
            path.with_suffix(".txt").write_text(f"caption {i}\nthe other one of {i}" if i % 5 else f" caption {i}\n")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 images in 5 shards, the last one smaller."""
    pytest.importorskip("webdataset")
    main([str(write_folder(tmp_path / "images")), str(tmp_path / "shards"), "--classes", "--images", "5"])
    return tmp_path / "shards"


def tar(path: Path, members: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w" + options.pop("mode", "")) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_and_its_shards_give_the_same_samples(shards: Path) -> None:
    """In the order of sorted names, with the choice of a caption, crops and mirroring; and again the same bytes."""
    first = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert list(first) and set(first) == {f"{i:06}.tar" for i in range(5)} | {"classes.txt"}
    folder = shards.with_name("images")
    options = {"size": 24, "channels": 1, "crop": "random", "flip": True, "reads": ("image", "caption", "label")}
    a, b = Folder(folder, **options), Shards(str(shards / "{000000..000004}.tar"), **options)
    a.set_epoch(3)
    b.set_epoch(3)
    assert len(a) == len(b) == 24 and a.classes == b.classes and list(a.texts()) == list(b.texts())
    for one, other in zip(a, b, strict=True):
        assert one["caption"] == other["caption"] and one["label"] == other["label"]
        assert torch.equal(one["image"], other["image"])
    for path in folder.rglob("*"):
        path.touch()
    main([str(folder), str(shards), "--classes", "--images", "5"])
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == first
    refused("holds other shards .*000002.tar", main, [str(folder), str(shards), "--images", "12"])


def batches(data: Shards, first: int, count: int, processes: int, workers: int = 0) -> list[list[tuple]]:
    """Return caption and image of each global batch of 4, as `processes` processes read them."""
    of = (processes, None, data.shuffled)
    streams = [
        training_batches(data, EpochBatches(len(data), 4 // processes, 1, rank, *of).seek(first), workers)
        for rank in range(processes)
    ]
    found = []
    for _ in range(count):
        parts = [next(stream)[1] for stream in streams]
        found.append(
            [(text, image.tolist()) for one in parts for text, image in zip(one["caption"], one["image"], strict=True)]
        )
    return found


def test_every_image_once_in_each_epoch_and_exact_resumption(shards: Path) -> None:
    data = Shards(str(shards), 16, 1, crop="random", flip=True, mixed=2)
    whole = batches(data, 0, 12, processes=1)
    epochs = [[text.split()[-1] for batch in part for text, _ in batch] for part in (whole[:6], whole[6:])]
    assert all(sorted(map(int, epoch)) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]
    assert batches(data, 0, 6, processes=2, workers=2) == whole[:6]
    for first in (3, 8):
        assert batches(data, first, 2, processes=1) == batches(data, first, 2, processes=2) == whole[first : first + 2]


def test_shards_are_shuffled_a_few_at_a_time(shards: Path) -> None:
    """With two of five mixed, the first images come from two shards; with 16, it is any permutation."""
    few, all_ = (Shards(str(shards), 16, 1, mixed=mixed, reads=("image",)) for mixed in (2, 16))
    order = list(few.shuffled(torch.Generator().manual_seed(0)))
    assert sorted(order) == list(range(24)) and len({index // 5 for index in order[:9]}) == 2
    assert order[:9] != sorted(order[:9])
    expected = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    assert list(all_.shuffled(torch.Generator().manual_seed(0))) == expected
    assert LatentDataset(few, [], []).shuffled == few.shuffled  # what is cached comes in the same order


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion", "classifier", "classes"])
def test_shards_train_as_their_folder_to_the_bit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights = []
    for target, where in (
        ("folder.Folder", {"root": "images"}),
        ("shards.Shards", {"root": ["shards/00000[0-2].tar", "shards/{000003..000004}.tar"]}),
    ):
        config = config_of(name, preview_every=2, save_every=2) | {"outdir": target}
        config["data"] = {"target": f"ldm.data.{target}", "params": {**where, "size": 32, "channels": 1, "flip": True}}
        if name in ("diffusion", "classes"):
            config["stage"]["params"]["cache_latents"] = False
        weights.append(load_file(train(config, device="cpu")))
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_mnist_trains_as_its_images_in_a_folder_and_in_shards_to_the_bit(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within the first epoch, since MNIST's captions change then; and its classes are those of sub-folders."""
    pytest.importorskip("webdataset")
    digits = MNIST(str(mnist))
    for i, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
        for folder in (tmp_path / "images", tmp_path / "classes" / str(label)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{i:05}.png")
        (tmp_path / "images" / f"{i:05}.txt").write_text(digits.caption_of(i).text)
    main([str(tmp_path / "images"), str(tmp_path / "shards"), "--images", "5"])
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    size, weights = {"size": 32, "channels": 1}, []
    for target, params in (
        ("mnist.MNIST", {"root": str(mnist)}),
        ("folder.Folder", {"root": "images", **size}),
        ("shards.Shards", {"root": "shards", **size}),
    ):
        config = config_of(name, preview_every=2, save_every=2) | {
            "outdir": target,
            "data": {"target": f"ldm.data.{target}", "params": params},
        }
        weights.append(load_file(train(config, device="cpu")))
    for other in weights[1:]:
        assert weights[0].keys() == other.keys() and all(torch.equal(weights[0][k], other[k]) for k in other)
    classes = Folder("classes", **size, reads=("image", "label"))
    for path, sample in zip(classes.paths, classes, strict=True):
        image, label = digits[int(Path(path).stem)]["image"], int(digits.labels[int(Path(path).stem)])
        assert torch.equal(sample["image"], image) and classes.classes[sample["label"]] == str(label)


def test_names_are_only_names_and_only_images_and_texts_are_read(tmp_path: Path) -> None:
    """Nothing is written outside or unpickled, links are not followed, and other members are left alone."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(9))
    path = tar(
        tmp_path / "a.tar",
        {
            **{"__meta__": b"x", "._0.png": b"mac", "0.png": png(255), "0.pyd": b"cos\nsystem\n(S'false'\ntR."},
            **{
                "../../up.JPG": png(0),
                "../../up.json": b'{"caption": ["one ", ""], "url": "x"}',
                "only.txt": b"no image",
            },
        },
    )
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        file.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    data = Shards(str(path), 8, 1, caption="else")
    assert [(s["caption"], s["image"].mean().item()) for s in data] == [("else", 1.0), ("one", -1.0)]
    assert sorted(tmp_path.rglob("*")) == before


def header(name: str, kind: bytes, size: int, content: bytes = b"") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + content


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda whole: whole[:700], "a.tar.*unexpected end of data"),
        (lambda whole: whole[:2048] + b"x" * 512 + whole[2560:], "a.tar.*no member begins at byte"),
        (lambda whole: whole[:2048] + b"half a header", "a.tar.*(no member begins|truncated header)"),
        (lambda whole: whole[:560], "a.tar.*0.png is cut off"),
        (lambda whole: b"", "a.tar.*empty file"),
        (lambda whole: header("x", tarfile.GNUTYPE_LONGNAME, 512, b"a" * 512) * 2000 + whole, "a.tar.*damaged one"),
        (lambda whole: header("x", tarfile.XHDTYPE, 1 << 60) + whole, "a.tar.*damaged one"),
        (lambda whole: header("0.txt", tarfile.GNUTYPE_SPARSE, 512, b"a" * 512) + whole, "a.tar.*'0.txt' is sparse"),
        (lambda whole: b"not a tar file" * 99, "a.tar.*is not a tar file, or a compressed or damaged one"),
    ],
)
def test_damaged_shards(tmp_path: Path, spoil, message: str) -> None:
    path = tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"zero", "1.png": png(), "1.txt": b"one"})
    Shards(str(path), 8, 1)
    path.write_bytes(spoil(path.read_bytes()))
    refused(message, Shards, str(path), 8, 1)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({"0.png": b"no", "0.txt": b"a"}, {}, "a.tar: 0.png is not an image"),
        (
            {"0.png": png(), "0.txt": b" \n"},
            {},
            "1 of 1 images cannot be used: .*a.tar: 0.png has no caption, or an empty",
        ),
        ({"0.png": png(), "0.txt": b"\xff"}, {}, "a.tar: 0.txt is not UTF-8"),
        ({"0.png": png(), "0.json": b"[1"}, {}, "a.tar: 0.json is not of the form"),
        ({"0.png": png(), "0.json": b'{"caption": 1}'}, {}, "a.tar: 0.json is not of the form"),
        ({"0.png": png()}, {"reads": ("image", "label")}, "a.tar: 0.png is of no class"),
        ({"0.png": png(), "0.cls": b"cat"}, {"reads": ("image", "label")}, "0.cls: 'cat' is not the number of a class"),
        ({"0.png": png(), "0.cls": b"9999999"}, {"reads": ("image", "label")}, "a class, from 0 to 1,048,575"),
        ({"0.png": png(), "0.jpg": png()}, {}, "a.tar: the sample '/?0' has 2 images"),
        ({"0.png": png(), "0.PNG": png()}, {}, "two members 0.PNG"),
        ({"0.txt": b"a"}, {}, "these shards hold no images"),
        ({"0.png": png(), "0.txt": b"a"}, {"mode": ":gz"}, "a compressed or damaged one"),
    ],
)
def test_faults_are_named(tmp_path: Path, members: dict, options: dict, message: str) -> None:
    path = tar(tmp_path / "a.tar", members, mode=options.pop("mode", ""))
    refused(message, Shards, str(path), 8, 1, **options)


def test_damaged_images_are_left_out_as_of_a_folder(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) if i not in (1, 4) else b"no" for i in range(6)} | {"6.jpg": b"no"}
    paths = [tar(tmp_path / f"{k}.tar", dict([*members.items()][2 * k : 2 * k + 2])) for k in range(4)]
    data = Shards([*map(str, paths)], 8, 1, caption="", on_error="skip", mixed=1)
    assert [round((s["image"].mean().item() + 1) * 127.5) for s in data] == [0, 2, 3, 5]
    assert [data.source(index)[1][-10:] for index in range(4)] == [f"{i // 2}.tar: {i}.png"[-10:] for i in (0, 2, 3, 5)]
    assert sorted(data.shuffled(torch.Generator())) == [0, 1, 2, 3]
    refused("3 of 7 images cannot be used.*0.tar: 1.png is not an image", Shards, [*map(str, paths)], 8, 1, caption="")


def test_the_command_lists_what_its_last_call_left_out(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    images, out = write_folder(tmp_path / "images", 4), tmp_path / "shards"
    damaged = images / "damaged.png"
    damaged.write_bytes(b"no")
    damaged.with_suffix(".txt").write_text("a caption")
    main([str(images), str(out), "--on-error", "skip"])
    assert "damaged.png" in (out / "left_out.txt").read_text()
    damaged.write_bytes(png())
    main([str(images), str(out)])
    assert not (out / "left_out.txt").exists()


def test_which_shards_a_text_names(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    paths = [tar(tmp_path / name, {}) for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b[1]{x}.tar")]
    for text, expected in (
        ("a-{00..02}.tar", paths[:3]),
        ("a-0{2,0}.tar", [paths[2], paths[0]]),
        ("a-*.tar", paths[:3]),
        ("", paths),
        ("b[1]{x}.tar", paths[3:]),
    ):
        assert find_shards(str(tmp_path / text)) == expected
    assert find_shards([str(path) for path in paths[1:]]) == paths[1:]
    for text, message in (("a-{00..99}.tar", "no shards .*a-03.tar"), ("c*.tar", "no shards .*c..tar")):
        refused(message, find_shards, str(tmp_path / text), error=FileNotFoundError)
    for text in ("{0..9999999999}.tar", "{0..999}{-9999..999}.tar", f"{{0..{'9' * 5000}}}"):
        refused(r"names [\d,]+ shards or more: at most 1,048,576 are possible", find_shards, str(tmp_path / text))
    assert find_shards(str(tmp_path / "a-{00..02..2}.tar")) == [paths[0], paths[2]]
    refused("a-{0.tar.*braces", find_shards, str(tmp_path / "a-{0.tar"))
    refused("named twice", find_shards, [str(tmp_path), str(paths[0])])
    refused("no shards are given", find_shards, None)
    for text in ("https://host/{0..9}.tar", "pipe:cat a.tar"):
        refused("files on a local disk", find_shards, text)
