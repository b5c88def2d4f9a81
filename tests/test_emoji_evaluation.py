"""Measuring a model of emoji: the judge on small hand-written SVGs, each figure, and the command."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from PIL import Image

from ldm.commands import evaluate
from ldm.data.emoji import Emoji
from ldm.evaluation import commands, emoji_judge
from ldm.evaluation.emoji import (
    Judged,
    full_captions,
    judged,
    make_groups,
    process_seconds,
    report_attributes,
    report_copies,
    report_first_stage,
    report_frechet,
    report_retrieval,
    sharpness,
)
from ldm.evaluation.emoji_judge import attributes, caption_words, classes_of, facts_of, load_judge
from ldm.images import to_pil
from ldm.models.identity import IdentityFirstStage

pytest.importorskip("resvg_py", reason="the extra [emoji] renders SVG")
TONES = {"": "#fc0", "light": "#fde0c8", "medium-light": "#e0bb95", "medium": "#bf8f68", "medium-dark": "#9b643d",
         "dark": "#5c3826"}  # fmt: skip
HATS = {"cook": "#ccc", "pilot": "#224", "farmer": "#2a2"}
HAIR = {"man": "", "woman": '<rect x="4" y="8" width="24" height="22" fill="#711"/>'}
EPOCHS = 16
COLOURS = "red green blue olive teal navy purple orange".split()
HELD_OUT = (
    *("noto:man-cook-light-skin-tone", "noto:woman-cook-light-skin-tone"),
    *("noto:man-pilot-medium-light-skin-tone", "noto:woman-pilot-medium-light-skin-tone"),
    *("fluent-emoji-flat:man-pilot-medium", "fluent-emoji-flat:woman-pilot-medium"),
    *("fluent-emoji-flat:man-farmer-light", "fluent-emoji-flat:woman-farmer-light"),
)


def write_packages(root: Path) -> None:
    """36 people, and 8 things of a colour each, in both sets, of which one has outlines."""
    for package, ending, line in (
        ("noto", "-skin-tone", 'stroke="black" stroke-width="2"'),
        ("fluent-emoji-flat", "", ""),
    ):
        icons = {}
        for gender, hair in HAIR.items():
            for role, hat in HATS.items():
                for tone, colour in TONES.items():
                    face = f'<circle cx="16" cy="18" r="9" fill="{colour}" {line}/>'
                    body = f'{hair}{face}<rect x="7" y="3" width="18" height="8" fill="{hat}"/>'
                    icons[f"{gender}-{role}" + (f"-{tone}{ending}" if tone else "")] = {"body": body}
        for i, colour in enumerate(COLOURS):
            icons[f"{colour}-car"] = {"body": f'<rect x="{i}" y="9" width="22" height="12" fill="{colour}" {line}/>'}
        names = {"People & Body": [n for n in icons if "car" not in n], "Objects": [n for n in icons if "car" in n]}
        folder = root / "@iconify-json" / package
        folder.mkdir(parents=True)
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
        (folder / "metadata.json").write_text(json.dumps({"categories": names}))
    (root / "held_out.txt").write_text("\n".join(HELD_OUT))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    write_packages(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.data.emoji.HELD_OUT_NAMES", folder / "held_out.txt")
        yield folder


def read(root, split="train", copies=1):
    cache = str(root / "cache")
    return Emoji(str(root), split, size=32, copies=copies, toned_copies=copies, cache_dir=cache)


@pytest.fixture(scope="module")
def judge(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_judge, "JUDGE_BATCH", 16)
        patch.setattr(emoji_judge, "WIDTH", 8)
        yield load_judge(read(root, copies=2), root / "cache", EPOCHS)


@pytest.fixture(scope="module")
def groups(root):
    return make_groups(read(root), read(root, "held_out"), 40)


def test_what_an_icon_states(root):
    icons = {icon.name: icon for icon in read(root).icons if icon.style == "detailed"}
    woman = attributes(icons["woman-cook-medium-dark-skin-tone"])
    assert woman == {"style": "detailed", "tone": "medium-dark", "gender": "woman", "role": "cook",
                     "category": "People & Body"}  # fmt: skip
    assert attributes(icons["man-pilot"])["tone"] == "yellow"
    car = attributes(icons["red-car"])
    assert [car[name] for name in ("tone", "gender", "role")] == [None] * 3 and car["category"] == "Objects"
    couple = icons["man-pilot"]._replace(parts=icons["man-pilot"].parts._replace(tones=("light", "dark")))
    assert attributes(couple)["tone"] is None
    classes = classes_of([*icons.values()])
    assert classes["role"] == ["cook", "farmer", "pilot"] and classes["gender"] == ["man", "woman"]
    facts = facts_of([icons["woman-farmer-light-skin-tone"], icons["red-car"]], classes)
    assert {name: values.tolist() for name, values in facts.items() if name != "category"} == {
        **{"style": [1, 1], "tone": [1, -1]},
        **{"gender": [1, -1], "role": [1, -1]},
    }


def test_the_judge_learns_and_is_kept(root, judge, groups, monkeypatch):
    for name in ("seen", "held_out"):  # held-out: never seen together
        real = judged(judge, groups[name].real)
        report = report_attributes(judge, real, real, groups[name].icons)
        least = {"style": 0.8, "gender": 0.8, "role": 0.8, "category": 0.9}  # after 160 steps
        if name == "seen":  # a held-out tone, of eight icons, takes more
            least["tone"] = 0.8
        assert all(report[attribute]["accuracy"] >= share for attribute, share in least.items()), report
        assert report["role"]["share_of_real"] == 1 and report["role"]["real"]["accuracy"] == report["role"]["accuracy"]
    assert report["tone"]["n"] == report["category"]["n"] == len(HELD_OUT)
    rare = judged(judge, groups["rare"].real)
    assert report_attributes(judge, rare, rare, groups["rare"].icons)["tone"]["n"] == 0
    monkeypatch.setattr(emoji_judge, "train_judge", None)  # not called again
    monkeypatch.setattr(emoji_judge, "JUDGE_BATCH", 16)
    monkeypatch.setattr(emoji_judge, "WIDTH", 8)
    kept = load_judge(read(root, copies=2), root / "cache", EPOCHS).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in judge.state_dict().items())
    with pytest.raises(TypeError):  # other images: it would train anew
        load_judge(read(root), root / "cache", EPOCHS)


def test_groups_are_seen_held_out_and_rare(root, groups):
    assert {name: len(group.icons) for name, group in groups.items()} == {"seen": 40, "held_out": 8, "rare": 16}
    assert {icon.parts.thing for icon in groups["rare"].icons} == {f"{colour} car" for colour in COLOURS}
    assert {f"{i.name}" for i in groups["held_out"].icons} == {name.partition(":")[2] for name in HELD_OUT}
    training = read(root)
    for icon, caption, real in zip(*groups["seen"], strict=True):
        place = [(other.style, other.name) for other in training.icons].index((icon.style, icon.name))
        assert torch.equal(real, training.images[place])
        assert icon.parts.thing in caption and icon.style in caption and (icon.tone or "") in caption
    wordings = Counter(caption.partition(" ")[0] for caption in groups["seen"].captions)
    assert len(wordings) > 2


def test_retrieval_counts_the_captions_that_are_nearer(root):
    pool = full_captions(read(root).icons)
    places = {text: i for i, text in enumerate(sorted(set(pool)))}
    texts = SimpleNamespace(texts=lambda captions: torch.eye(len(places))[[places[text] for text in captions]])
    real = Judged(torch.zeros(0), 3 * texts.texts(pool))  # of any length
    report = report_retrieval(texts, real, real, pool, pool)
    assert report["top_1"] == {"share": 1, "real": 1, "share_of_real": 1}
    assert report["candidates"] == len(places) > 70
    wrong = Judged(
        real.answers, real.vectors.roll(1, 0)
    )  # each is nearest to another, and as far from its own as from all
    report = report_retrieval(texts, wrong, real, pool, pool)
    assert report["top_1"]["share"] == 0 and report["top_1"]["real"] == 1
    second = Judged(real.answers, 0.9 * real.vectors + wrong.vectors)
    report = report_retrieval(texts, second, real, pool, pool)
    assert report["top_1"]["share"] == 0 and report["top_5"]["share"] == 1


def test_words_are_compared_whatever_their_order(judge):
    one, other, unknown = judge.texts(["a flat red car", "car, red: a FLAT", "a flat red car zzz"])
    assert torch.equal(one, unknown) and torch.allclose(one, other, atol=1e-6)
    assert caption_words("Flag: medium-dark skin, 3rd") == ["flag", "medium-dark", "skin", "3rd"]


def test_distance_of_real_images_of_noise_and_of_copies(root, judge, groups):
    training = read(root)
    noise = {name: torch.randint(0, 256, group.real.shape, dtype=torch.uint8) for name, group in groups.items()}
    real = {name: judged(judge, group.real) for name, group in groups.items()}
    beside = real["held_out"], judged(judge, training.images), training.icons
    as_real = report_frechet(real, *beside)
    as_noise = report_frechet({name: judged(judge, images) for name, images in noise.items()}, *beside)
    assert as_real["held_out"]["distance"] == pytest.approx(0, abs=1e-3) and as_real["seen"]["ratio"] < 1.5
    assert as_noise["seen"]["ratio"] > 3 and as_noise["held_out"]["ratio"] > 1
    held_out = groups["held_out"].real
    found = report_copies(held_out, held_out, training.images)
    assert found["ratio"] == pytest.approx(1) and found["nearer_to_training_than_to_own"] == 0
    found = report_copies(training.images[: len(held_out)], held_out, training.images)
    assert found["median"] == 0 and found["nearer_to_training_than_to_own"] == 1


def test_sharpness_and_noise_of_a_first_stage(groups):
    real = groups["seen"].real
    stage = IdentityFirstStage(3)
    stage.weight = torch.nn.Parameter(torch.ones(1))
    exact = report_first_stage(stage, real, 16)
    assert exact["edge_sharpness"] == 1 and exact["noise_where_flat"] == 0
    stage.decoder = torch.nn.AvgPool2d(3, 1, 1)
    soft = report_first_stage(stage, real, 16)
    assert 0.2 < soft["edge_sharpness"] < 0.8 and 10 < soft["psnr"]["mean"] < 30
    step = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    step[..., 10:] = 255
    assert sharpness(step) == 1  # 20 of 400 differences are 1, each of one direction
    stage.decoder = torch.nn.Identity()
    stage.encode = lambda x: (x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    noisy = report_first_stage(stage, real, 16)
    assert noisy["noise_where_flat"] == pytest.approx(0.01 * 2 * 0.58, rel=0.5)  # white clips half of it


class Model:
    """Gives the real image of each caption, so that every figure is what real images reach."""

    image_channels, first_stage_model = 3, IdentityFirstStage(3)
    cond_stage_model = SimpleNamespace(tokenizer=None)

    def __init__(self, root, side=32):
        self.defaults = {"height": side, "width": side, "steps": 5}
        self.images = {}
        for split in ("train", "held_out"):
            data = read(root, split)
            self.images |= dict(zip(full_captions(data.icons), data.images, strict=True))

    def generate(self, prompts, seed, batch_size, **settings):
        return to_pil(torch.stack([self.images[prompt] for prompt in prompts]))


def test_the_command(root, judge, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"model")
    monkeypatch.setattr(commands, "load_model", lambda args: Model(root))
    monkeypatch.setattr(commands, "process_seconds", lambda path, prompt: {"seconds": {"ratio": 1.0}})
    argv = ["emoji", f"--ckpt={tmp_path / 'model.safetensors'}", f"--data={root}", f"--cache={root / 'cache'}"]
    monkeypatch.setattr(emoji_judge, "JUDGE_BATCH", 16)
    monkeypatch.setattr(emoji_judge, "WIDTH", 8)
    argv += [f"--epochs={EPOCHS}", "--n=40", f"--out={tmp_path / 'report.json'}"]
    evaluate.main(argv)
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("seen", "held_out", "rare"):
        assert report[name]["edge_sharpness"] == 1
        top = report[name]["retrieval"]["top_5"]
        assert top["share"] == top["real"] and top["share"] >= 0.5
    assert report["held_out"]["attributes"]["tone"]["share_of_real"] == 1 and report["process"]["seconds"]["ratio"] == 1
    assert report["frechet"]["held_out"]["ratio"] == pytest.approx(0, abs=1e-3) and "autoencoder" not in report
    with Image.open(tmp_path / "report.png") as sheet:
        assert sheet.mode == "RGB"
    monkeypatch.setattr(commands, "load_model", lambda args: Model(root, side=28))
    refused("not one of emoji", evaluate.main, argv)


@pytest.mark.full
def test_seconds_of_a_process():
    from ldm.loading import SHIPPED

    found = process_seconds(SHIPPED, "five")["seconds"]  # the digits: 20 steps are a fraction of the import
    assert 0.5 < found["ratio"] < 3 and found["import_torch"] > 0.5
