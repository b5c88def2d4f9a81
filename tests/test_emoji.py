"""The emoji: names, captions, what is held out, drawings and their copies, on a dozen hand-written SVGs."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused

import ldm
from ldm.commands.train import main as train
from ldm.data import emoji, emoji_captions
from ldm.data.emoji import Emoji, read_package, render_icons, split_icons
from ldm.data.emoji_captions import EMOJI_FRAMES, STYLES, TONES, choose_wording, read_names, say
from ldm.training.clip import CLIPStage

CONFIGS = Path(__file__).parents[1] / "configs" / "emoji"
TONED = {"light": "#f7dece", "medium-dark": "#9c643d", "dark": "#613d30"}


def disc(colour: str, x: int = 16) -> str:
    return f'<circle cx="{x}" cy="16" r="8" fill="{colour}"/>'


NOTO = {
    "red-apple": disc("red"),
    "keycap-4": disc("blue"),
    "cook": disc("#fc0", 10),
    **{f"cook-{tone}-skin-tone": disc(colour, 10) for tone, colour in TONED.items()},
    **{f"woman-cook-{tone}-skin-tone": disc(colour, 12) for tone, colour in TONED.items()},
    "chef-dark-skin-tone": disc(TONED["dark"], 10),  # the body of cook-dark-skin-tone
    "elf-tone2": disc("green", 9),  # an old drawing
}
NOTO_ALIASES = {
    "apple": {"parent": "red-apple"},
    "woman-chef-dark-skin-tone": {"parent": "woman-cook-dark-skin-tone"},
    "flipped-cook-light-skin-tone": {"parent": "cook-light-skin-tone", "hFlip": True},
}
FLUENT = {
    "red-apple": disc("darkred"),
    "vertical-traffic-light": disc("black"),
    "woman-cook": disc("#fd0", 20),
    **{f"woman-cook-{tone}": disc(colour, 20) for tone, colour in TONED.items()},
}
METADATA = {"categories": {"Food & Drink": ["red-apple"], "People & Body": ["cook", "woman-cook"]}}


def files_of(icons: dict, aliases: dict) -> dict[str, str]:
    drawn = {name: {"body": body} for name, body in icons.items()}
    content = {"icons": drawn, "aliases": aliases, "width": 32, "height": 32}
    return {"icons.json": json.dumps(content), "metadata.json": json.dumps(METADATA)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Noto as npm installs it, Fluent as npm packs it."""
    folder = tmp_path / "@iconify-json" / "noto"
    folder.mkdir(parents=True)
    for name, text in files_of(NOTO, NOTO_ALIASES).items():
        (folder / name).write_text(text)
    with tarfile.open(tmp_path / "iconify-json-fluent-emoji-flat-1.2.6.tgz", "w:gz") as archive:
        for name, text in files_of(FLUENT, {}).items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return tmp_path


@pytest.fixture
def held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that writes another list of what is held out."""

    def write(*names: str) -> None:
        path = tmp_path / "held.txt"
        path.write_text("\n".join(names))
        monkeypatch.setattr(emoji, "HELD_OUT_NAMES", path)

    return write


def names_of(data: Emoji) -> set[str]:
    return {f"{icon.style}:{icon.name}" for icon in data.icons}


@pytest.mark.parametrize(
    ("held", "gone", "measured"),
    [
        ("noto:red-apple", {"detailed:red-apple"}, {"detailed:red-apple"}),
        # by alias: the drawing that the name leads to, also where the other is its mirror image
        ("noto:apple", {"detailed:red-apple"}, {"detailed:red-apple"}),
        ("noto:flipped-cook-light-skin-tone", {"detailed:cook-light-skin-tone"}, {"detailed:cook-light-skin-tone"}),
        # by an equal body: both go, and neither is measured on
        ("noto:cook-dark-skin-tone", {"detailed:cook-dark-skin-tone", "detailed:chef-dark-skin-tone"}, set()),
    ],
)
def test_held_out_drawings_are_never_trained_on(root, held_out, held, gone, measured):
    held_out("fluent-emoji-flat:woman-cook-dark", held)
    assert names_of(Emoji(str(root), size=16)) == ALL - gone - {"flat:woman-cook-dark"}
    assert names_of(Emoji(str(root), split="held_out", size=16)) == {"flat:woman-cook-dark"} | measured


ALL = {f"detailed:{name}" for name in NOTO if name != "elf-tone2"} | {f"flat:{name}" for name in FLUENT}


def test_a_list_that_names_no_drawing_is_refused(root, held_out):
    held_out("noto:red-appel")
    refused("held.txt names 'red-appel', which", Emoji, str(root))


def test_what_names_say():
    noto = read_names(
        ["woman-cook-dark-skin-tone", "cook", "man-medium-light-skin-tone-red-hair", "man-red-hair"], False
    )
    assert noto["woman-cook-dark-skin-tone"] == ("woman cook", ("dark",), "woman", "cook")
    assert noto["man-medium-light-skin-tone-red-hair"] == (
        "man with red hair",
        ("medium-light",),
        "man",
        "with red hair",
    )
    assert noto["man-red-hair"].tones == () and noto["cook"] == ("cook", (), None, None)  # no cook of a tone is there
    couple = read_names(["kiss-woman-man-dark-skin-tone-light-skin-tone"], False)
    assert [*couple.values()] == [("kiss woman man", ("dark", "light"), None, "kiss")]
    names = [f"{name}-{tone}" for name in ("astronaut", "man-astronaut") for tone in TONES]
    bare = read_names([*names, "astronaut", "vertical-traffic-light", "police-car-light", "police-car"], True)
    assert bare["astronaut-medium-dark"] == ("astronaut", ("medium-dark",), "person", "astronaut")
    assert bare["man-astronaut-light"] == ("man astronaut", ("light",), "man", "astronaut")
    assert bare["astronaut"] == ("astronaut", (), "person", "astronaut")
    for name in ("vertical-traffic-light", "police-car-light"):
        assert bare[name] == (name.replace("-", " "), (), None, None)
    assert read_names(["medium-light-skin-tone"], False)["medium-light-skin-tone"].tones == ()


def test_captions_say_what_is_asked_for():
    full = {"style": "flat", "tones": ("dark", "light"), "background": "orange"}
    assert say(EMOJI_FRAMES[0], "red apple", style="flat") == "a flat drawing of a red apple"
    expected = "a flat drawing of an elf with dark and light skin on an orange background"
    assert say(EMOJI_FRAMES[0], "elf", **full) == expected
    assert say(EMOJI_FRAMES[6], "mage", tones=("light",)) == "mage with light skin"
    for article in (
        "an umbrella",
        "an unamused face",
        "a unicorn",
        "a ukulele",
        "a euro banknote",
        "a ewe",
        "a one oclock",
    ):
        assert say("{thing}", article.split(" ", 1)[1]) == article
    nouns = "grapes", "8", "men holding hands", "a woman lifting weights", "a princess", "a bus", "santa claus"
    for article in "an hourglass done", "a house", "an x ray", "an eight oclock", *nouns:
        assert say("{thing}", article.removeprefix("an ").removeprefix("a ")) == article
    for frame in EMOJI_FRAMES:
        text = say(frame, "mage", "people", **full)
        assert all(word in text for word in ("mage", "flat", "dark and light skin", "orange"))
        bare = say(frame, "mage", "people")
        assert not set("[]{}") & set(bare + text) and "skin" not in bare and "background" not in bare
    made = [choose_wording(0, 0, i, ("keycap 4",), "symbol", "flat", (), None) for i in range(400)]
    assert abs(np.mean([states for _, states in made]) - 0.75) < 0.07
    assert all(("flat" in text) == states for text, states in made)
    assert abs(np.mean(["four" in text for text, _ in made]) - 0.5) < 0.08
    assert made[3] == choose_wording(0, 0, 3, ("keycap 4",), "symbol", "flat", (), None)
    assert made[3] != choose_wording(0, 1, 3, ("keycap 4",), "symbol", "flat", (), None)


def test_the_vocabulary_has_every_word_of_the_captions(root, held_out):
    held_out("noto:red-apple")
    data = Emoji(str(root), size=16, copies=4, toned_copies=2)
    words = {word for text in data.texts() for word in text.replace(",", " ").replace(":", " ").split()}
    for epoch in range(20):
        data.set_epoch(epoch)
        for i in range(len(data)):
            assert set(data.caption_of(i).text.replace(",", " ").replace(":", " ").split()) <= words


def test_samples_are_drawings_with_their_captions(root, held_out):
    held_out("noto:keycap-4")
    data = Emoji(str(root), size=16)
    assert len(data) == len(data.icons) == len(ALL) - 1 and data.images.dtype == torch.uint8
    sample = data[names(data).index(("flat", "red-apple"))]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    assert torch.equal(sample["image"][:, 0, 0], torch.ones(3))  # white around
    assert torch.allclose(sample["image"][:, 8, 8], torch.tensor([139, 0, 0]) / 127.5 - 1)  # darkred inside
    assert "red apple" in sample["caption"] or "apple" in sample["caption"]
    icon = data.icons[names(data).index(("flat", "woman-cook-medium-dark"))]
    assert (icon.tone, icon.parts.gender, icon.parts.role, icon.category) == (
        "medium-dark",
        "woman",
        "cook",
        "People & Body",
    )
    assert icon.caption() == "a flat drawing of a woman cook with medium-dark skin"
    assert icon.caption("blue") == "a flat drawing of a woman cook with medium-dark skin on a blue background"
    with pytest.raises(IndexError):
        data[len(data)]


def names(data: Emoji) -> list[tuple[str, str]]:
    return [(icon.style, icon.name) for icon in data.icons]


def test_copies_vary_and_captions_name_their_background(root, held_out):
    held_out("noto:keycap-4")
    data = Emoji(str(root), size=32, copies=20, toned_copies=1, coloured=1.0)
    apples = [k for k, (i, _) in enumerate(data.entries) if data.icons[i].name == "red-apple"]
    cooks = [k for k, (i, _) in enumerate(data.entries) if data.icons[i].name == "woman-cook-dark"]
    assert len(apples) == 40 and len(cooks) == 1
    for place, k in enumerate(apples):
        background = data.entries[k][1]
        corner = data.images[k, :, 0, 0].tolist()
        if place % 2 == 0:  # every second one is plain
            assert background is None and corner == [255] * 3 and "background" not in data.caption_of(k).text
        else:
            assert np.abs(np.subtract(corner, emoji_captions.COLOURS[background])).max() <= 12
            assert background in data.caption_of(k).text
    varied = data.images[apples[1::2]]
    assert len({tuple(image.flatten().tolist()) for image in varied}) == 20
    again = Emoji(str(root), size=32, copies=20, toned_copies=1, coloured=1.0)
    assert torch.equal(again.images, data.images)
    plain = Emoji(str(root), size=32, copies=20, toned_copies=1, coloured=0.0)
    assert all(background is None for _, background in plain.entries)


def test_a_shuffled_order_keeps_some_of_a_thing_together(root, held_out):
    held_out("noto:keycap-4")
    data = Emoji(str(root), size=16, copies=4, toned_copies=2, together=4)
    generator = torch.Generator().manual_seed(1)
    order = list(data.shuffled(generator))
    assert sorted(order) == list(range(len(data)))
    labels = [data[i]["label"] for i in order]
    same = np.mean([a == b for a, b in zip(labels, labels[1:], strict=False)])
    assert same > 0.5 and order != list(data.shuffled(generator))
    loose = Emoji(str(root), size=16, copies=4, toned_copies=2)
    labels = [loose[i]["label"] for i in loose.shuffled(generator)]
    assert np.mean([a == b for a, b in zip(labels, labels[1:], strict=False)]) < same


def test_clip_knows_which_captions_are_true(root, held_out):
    held_out("noto:keycap-4")
    data = Emoji(str(root), size=16)
    chosen = [
        names(data).index(pair)
        for pair in (("flat", "woman-cook-dark"), ("flat", "woman-cook-light"), ("flat", "red-apple"))
    ]
    samples = [data.without_image(i) for i in chosen]
    batch = torch.utils.data.default_collate([{k: v for k, v in s.items() if k != "caption"} for s in samples])
    positives = CLIPStage.positives(type("Stage", (), {"agreement": 9.0})(), batch)
    assert positives.tolist() == [[9, 1, 0], [1, 9, 0], [0, 0, 9]]


def test_rendered_drawings_are_kept(root, held_out, tmp_path, monkeypatch):
    held_out("noto:keycap-4")
    cache = str(tmp_path / "cache")
    first = Emoji(str(root), size=16, copies=2, cache_dir=cache)
    files = sorted(Path(cache).iterdir())
    assert len(files) == 2  # one for each scale
    import resvg_py

    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **given: pytest.fail("rendered again"))
    assert torch.equal(Emoji(str(root), size=16, copies=2, cache_dir=cache).images, first.images)


def test_mistakes_are_named(root, held_out, tmp_path):
    held_out("noto:keycap-4")
    refused("split is 'train' or 'held_out', not 'test'", Emoji, str(root), split="test")
    with pytest.raises(FileNotFoundError, match="npm pack @iconify-json/fluent-emoji-flat"):
        Emoji(str(tmp_path / "nowhere"))
    icon = read_package(root, "noto", "detailed")[0]
    refused("resvg cannot render detailed 'red-apple'", render_icons, [icon._replace(body="<g")], 16, 1.0, None)


def with_folders(content: bytes) -> bytes:
    """An archive whose members are folders."""
    changed = io.BytesIO()
    with tarfile.open(fileobj=changed, mode="w:gz") as archive:
        for name in ("icons.json", "metadata.json"):
            member = tarfile.TarInfo(f"package/{name}")
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
    return changed.getvalue()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda content: content[:200], "Compressed file ended"),
    "no gzip": (gzip.decompress, "Not a gzipped file"),
    "no tar": (lambda content: gzip.compress(content), "truncated header"),
    "compressed data": (lambda content: content[:80] + b"\xff" * 9 + content[89:], "while decompressing"),
    "checksum": (lambda content: content[:-8] + bytes(4) + content[-4:], "CRC check failed"),
    "no member": (lambda content: gzip.compress(bytes(10240)), "'package/icons.json' not found"),
    "folders": (with_folders, "icons.json is not a file"),
    "no JSON": (lambda content: gzip.compress(gzip.decompress(content).replace(b"{", b"[", 1)), "delimiter"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_package_is_named(root, kind):
    damaged, found = DAMAGE[kind]
    packed = root / "iconify-json-fluent-emoji-flat-1.2.6.tgz"
    packed.write_bytes(damaged(packed.read_bytes()))
    refused(rf"the package 'fluent-emoji-flat' in '.*' is damaged: .*{found}", Emoji, str(root))


def test_both_splits_number_things_and_tones_alike(root, held_out):
    held_out("noto:red-apple", "fluent-emoji-flat:woman-cook-dark")
    numbers: dict[object, set[object]] = {}
    for split in ("train", "held_out"):
        data = Emoji(str(root), split, size=16)
        for icon, label, tone in zip(data.icons, data.label, data.tones, strict=True):
            numbers.setdefault(icon.parts.thing, set()).add(label)
            numbers.setdefault(icon.parts.tones, set()).add((tone, "tone"))
    assert all(len(found) == 1 for found in numbers.values())
    assert len({*map(tuple, numbers.values())}) == len(numbers)


@pytest.mark.full
def test_the_stages_train_on_a_dozen_icons(root, held_out, tmp_path):
    """The configurations of the model that ships, as they are but for their length."""
    held_out("noto:keycap-4", "fluent-emoji-flat:red-apple")
    configs = [str(CONFIGS / f"{stage}.yaml") for stage in ("autoencoder", "decoder", "clip", "diffusion")]
    short = ["loop.steps=1", "loop.batch_size=4", "loop.lr_schedule.warmup=0", f"data.params.root={root}"]
    train([*configs, f"outdir={tmp_path / 'run'}", *short, "--device", "cpu"])
    model = ldm.load(tmp_path / "run" / "diffusion", device="cpu")
    assert model.generate(["a flat emoji of a red apple"], steps=2)[0].size == (64, 64)


@pytest.mark.skipif("LDM_EMOJI" not in os.environ, reason="needs the two packages: set LDM_EMOJI to their folder")
def test_the_published_packages_leak_nothing():
    icons = [
        icon for name, style in STYLES.items() for icon in read_package(Path(os.environ["LDM_EMOJI"]), name, style)
    ]
    held = emoji.HELD_OUT_NAMES.read_text().split()
    train, measured = split_icons(icons, held)
    assert len(held) == 368 and len(train) > 6500 and len(measured) > 350
    assert not {icon.body for icon in train} & {icon.body for icon in measured}
    assert not {f"{icon.style}:{icon.name}" for icon in train} & {
        f"{STYLES[h.split(':')[0]]}:{h.split(':')[1]}" for h in held
    }
    trained = {(icon.parts.thing, icon.style, icon.parts.tones) for icon in train}
    assert not trained & {(icon.parts.thing, icon.style, icon.parts.tones) for icon in measured}
    # every part of a held-out combination is seen
    assert {icon.parts.thing for icon in measured} <= {icon.parts.thing for icon in train}
