"""Scenes of digits: deterministic, true captions, held-out combinations, boxes and maps that fit the pixels."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomised, refused
from test_mnist import idx

import ldm
from ldm.commands import evaluate
from ldm.data.captions import NUMBER_WORDS
from ldm.data.scenes import BACKGROUNDS, DIGIT_SIZES, PALETTE, PLACES, RELATIONS, Scenes, held_out
from ldm.evaluation.networks import JUDGE, load_image_network
from ldm.evaluation.reference import load_reference
from ldm.evaluation.scenes import judge_scenes, measure_scenes, score_scene

COLOUR_NAMES, BACKGROUND_NAMES, SIZE_NAMES = list(PALETTE), list(BACKGROUNDS), list(DIGIT_SIZES)
ALL = ("image", "caption", "boxes", "map")
TINY_SCENES = copy.deepcopy(TINY) | {"defaults": {"height": 64, "width": 64, "steps": 2, "scale": 2.0}}
TINY_SCENES["first_stage_config"]["params"]["ddconfig"] |= {"in_channels": 3, "out_ch": 3, "resolution": 64}
OBJECT = rf"a (?:(small|large) )?({'|'.join(PALETTE)}) ({'|'.join(NUMBER_WORDS)})"


@pytest.fixture
def make(mnist):
    return lambda count=60, combinations="seen", **own: Scenes(count, combinations, **{"root": str(mnist), **own})


def test_a_scene_follows_from_seed_and_index(make):
    few, more, other = make(5, reads=ALL), make(9, reads=ALL), make(5, seed=1, reads=ALL)
    assert few.scenes == more.scenes[:5] and few.scenes != other.scenes
    before = few[3]
    more.set_epoch(1)
    later = more[3]
    assert all(torch.equal(before[key], later[key]) for key in ("image", "boxes", "map"))
    assert [few.caption_of(i).text for i in range(5)] != [more.caption_of(i).text for i in range(5)]
    assert torch.equal(few[-2]["image"], before["image"])
    with pytest.raises(IndexError):
        few[5]
    assert {*make(2)[0]} == {"image", "caption"}


def test_scenes_have_at_most_so_many_digits(make):
    for most in (1, 2):
        assert {len(scene.objects) for scene in make(60, most=most).scenes} == set(range(1, most + 1))
    assert make(5, most=3).scenes == make(5).scenes


def test_a_sample_renders_its_scene_once(make, monkeypatch):
    scenes, rendered = make(5, reads=ALL), []
    render = Scenes.render
    monkeypatch.setattr(Scenes, "render", lambda self, index: rendered.append(index) or render(self, index))
    assert torch.equal(scenes[3]["map"], scenes.without_image(3)["map"]) and rendered == [3, 3]
    make(5).without_image(3)
    assert rendered == [3, 3] and "map" not in make(5)[3]


def test_pixels_boxes_and_map_agree(make):
    scenes = make(60, reads=ALL)
    for index, scene in enumerate(scenes.scenes):
        sample = scenes[index]
        assert sample["image"].shape == (3, 64, 64) and sample["boxes"].shape == (3, 5)
        pixels = ((sample["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()  # h w c
        background = BACKGROUNDS[BACKGROUND_NAMES[scene.background]]
        outside = np.ones((64, 64), bool)
        for one, row in zip(scene.objects, sample["boxes"].tolist(), strict=False):
            left, top, right, bottom = one.box
            assert row == [left, top, right, bottom, one.number] and one.number == 10 * one.colour + one.digit
            assert abs(max(right - left, bottom - top) - DIGIT_SIZES[SIZE_NAMES[one.size]]) == 0
            outside[top:bottom, left:right] = False
            inside = sample["map"][top:bottom, left:right].numpy()
            assert {*np.unique(inside)} | {0} == {0, 1 + one.number}
            ink = pixels[top:bottom, left:right][inside > 0].astype(int)
            colour = np.array(PALETTE[COLOUR_NAMES[one.colour]])
            assert (np.abs(ink - colour).sum(1) <= np.abs(ink - background).sum(1)).all()  # more than half ink
            for a in scene.objects:
                assert a is one or max(a.box[0] - right, left - a.box[2], a.box[1] - bottom, top - a.box[3]) >= 3
        assert (sample["map"].numpy()[outside] == 0).all() and (pixels[outside] == background).all()


def test_captions_are_true(make):
    """Read back by a grammar of its own, and compared with the boxes."""
    scenes, kinds = make(300), set()
    for index, scene in enumerate(scenes.scenes):
        caption = scenes.caption_of(index)
        found = re.findall(OBJECT, caption.text)
        assert len(found) == len(scene.objects)
        named = {(digit, colour, size or "medium") for size, colour, digit in found}
        assert named == {(NUMBER_WORDS[o.digit], COLOUR_NAMES[o.colour], SIZE_NAMES[o.size]) for o in scene.objects}
        centres = {NUMBER_WORDS[o.digit]: ((o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2) for o in scene.objects}
        background = re.search(r" on a (\w+) background$", caption.text)
        assert BACKGROUND_NAMES[scene.background] == ("dark" if background is None else background[1])
        if caption.relation is not None:
            first, words, second = re.fullmatch(rf"{OBJECT} ([a-z ]+) {OBJECT}.*", caption.text).group(3, 4, 7)
            step = RELATIONS[words]
            for axis in (0, 1):
                difference = centres[first][axis] - centres[second][axis]
                assert difference * step[axis] > 12 if step[axis] else abs(difference) < 9
        elif caption.places:
            for digit, place in re.findall(rf"({'|'.join(NUMBER_WORDS)}) ({'|'.join(PLACES)})", caption.text):
                cell = PLACES.index(place)
                assert (int(centres[digit][1] * 3 // 64), int(centres[digit][0] * 3 // 64)) == divmod(cell, 3)
        kinds.add((len(found), caption.relation is not None, caption.places))
    assert len(kinds) == 7  # one digit, two or three, with places or without, and relations of two


def test_words_of_all_captions_are_in_the_texts(make):
    scenes = make(300)
    known = {word for text in scenes.texts() for word in re.findall(r"\w+|,", text)}
    assert {word for i in range(300) for word in re.findall(r"\w+|,", scenes.caption_of(i).text)} == known


def test_held_out_combinations_are_never_trained_on_and_their_parts_are(make):
    seen = make(1500)
    assert all(held_out(scene.objects) == set() for scene in seen.scenes)
    objects = [one for scene in seen.scenes for one in scene.objects]
    assert len({(one.digit, one.colour) for one in objects}) == 50
    pairs = {frozenset((a.digit, b.digit)) for s in seen.scenes for a in s.objects for b in s.objects if a is not b}
    assert len(pairs) == 40
    in_rows = {
        (a.colour, b.colour)
        for s in seen.scenes for a in s.objects for b in s.objects
        if a.place // 3 == b.place // 3 and a.place < b.place
    }  # fmt: skip
    assert in_rows == {(a, b) for a in range(6) for b in range(6) if a != b and b != (a + 1) % 6}
    for kind in ("colours", "pairs", "relations"):
        assert all(held_out(scene.objects) == {kind} for scene in make(100, kind).scenes)


def test_each_argument_has_an_effect(make, monkeypatch):
    """As test_every_key.py has it for other data sets."""
    plain = make(20)
    assert len(make(21)) == 21 and make(20, seed=1).scenes != plain.scenes != make(20, "pairs").scenes
    assert make(20, last=12).scenes != plain.scenes and len(make(20, first=10).digits) == 10
    refused("t10k-images", make, 20, split="test", error=FileNotFoundError)
    refused("nowhere", make, 20, root="nowhere", error=FileNotFoundError)
    asked = []
    monkeypatch.setattr("ldm.data.mnist._download", lambda *where: asked.append(where[1]))
    make(20, download=True)
    assert asked == ["train"]
    assert {*make(2, reads=("boxes",))[0]} == {"image", "boxes"}


def test_what_cannot_be_made_is_refused(make):
    refused("'pairs' are of two digits: give most 2 or 3, not 1", make, 5, "pairs", most=1)
    refused("combinations 'new' is not one of seen, colours, pairs, relations", make, 5, "new")
    refused("need all ten digits: of the 9 images of MNIST none is nine", make, 5, first=9)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The digits that ship, as MNIST's test images."""
    reference, root = load_reference(), tmp_path_factory.mktemp("real")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx(reference.images.numpy()))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(reference.image_labels.numpy()))
    return root


def rendered(scenes: Scenes) -> torch.Tensor:
    return torch.from_numpy(np.stack([scenes.render(i)[0] for i in range(len(scenes))])).permute(0, 3, 1, 2)


def test_the_judge_reads_real_scenes(real):
    """Of 900 digits of the images that ship it misreads less than 1 in 40, and of colours and backgrounds none."""
    scenes, judge = Scenes(100, root=str(real), split="test"), load_image_network(JUDGE)

    def generate(captions):
        kind = ("seen", "colours", "pairs", "relations")[next(turn)]
        return rendered(Scenes(len(captions), kind, root=str(real), split="test", seed=1))

    turn = iter(range(4))
    report, rows = measure_scenes(generate, 100, str(real), judge)
    assert [row.label for row in rows] == ["seen", "held out: colours", "held out: pairs", "held out: relations"]
    for kind, figures in report.items():
        assert figures["generated"] == figures["real"], kind
        found = {name: part["accuracy"] for name, part in figures["real"].items()}
        assert found["colours"] > 0.995 and found["backgrounds"] == 1, (kind, found)
        assert min(found[name] for name in ("objects", "binding", "sizes", "places")) > 0.97, (kind, found)
        assert found["scenes"] > 0.93, (kind, found)
    # where things are is found to a pixel, where nothing is unclear
    for scene, (_, objects) in zip(scenes.scenes, judge_scenes(rendered(scenes), judge), strict=True):
        for one in scene.objects:
            left, top, right, bottom = one.box
            near = [o for o in objects if o.colour == one.colour]
            assert (
                len(near) != 1
                or np.abs(np.subtract(near[0].centre, ((left + right) / 2, (top + bottom) / 2))).max() < 3
            )


def shares(scenes: Scenes, changed: Scenes, judge) -> dict[str, float]:
    """What the judge makes of the images of changed scenes for the captions of the others."""
    answers = {}
    for index, (background, found) in enumerate(judge_scenes(rendered(changed), judge)):
        for name, right in score_scene(scenes.scenes[index], scenes.caption_of(index), background, found).items():
            answers[name] = answers.get(name, []) + right
    return {name: np.mean(right) for name, right in answers.items()}


def test_every_kind_of_mistake_shows_in_its_own_figure(real):
    judge = load_image_network(JUDGE)
    scenes, other = (Scenes(80, "pairs", root=str(real), split="test") for _ in range(2))
    whole = shares(scenes, scenes, judge)

    def of(change) -> dict[str, float]:
        other.scenes = [scene._replace(objects=tuple(change(scene.objects))) for scene in scenes.scenes]
        return shares(scenes, other, judge)

    def turned(objects, *names):  # the first object has these of the second, and so on
        values = [{name: getattr(one, name) for name in names} for one in objects]
        return [one._replace(**values[i - 1]) for i, one in enumerate(objects)]

    swapped = of(lambda objects: turned(objects, "colour"))
    assert swapped["binding"] < 0.02 and swapped["scenes"] == 0
    assert all(abs(swapped[name] - whole[name]) < 0.02 for name in ("objects", "colours", "places", "sizes"))
    moved = of(
        lambda objects: turned(objects, "digit", "source", "colour")
    )  # the digits, stretched to each other's boxes
    assert moved["places"] < 0.1 and min(moved["objects"], moved["binding"]) > 0.85
    fewer = of(lambda objects: objects[1:])
    assert 0.45 < fewer["objects"] < 0.65 and fewer["scenes"] == 0
    other.scenes = [scene._replace(background=(scene.background + 1) % 3) for scene in scenes.scenes]
    found = shares(scenes, other, judge)
    assert found["backgrounds"] == 0 and found["binding"] > 0.95


def test_an_image_without_objects_has_none():
    plain, noise = torch.full((1, 3, 64, 64), 232, dtype=torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    noise[0, :, 3, 3] = 255  # a speck
    assert judge_scenes(torch.cat([plain, noise]), load_image_network(JUDGE)) == [(2, []), (0, [])]


def test_the_command_reports_each_kind(real, tmp_path):
    torch.manual_seed(0)
    ldm.save(randomised(ldm.LatentDiffusion(**TINY_SCENES)), tmp_path / "model.safetensors")
    options = ["--ckpt", str(tmp_path / "model.safetensors"), "--data", str(real), "--n", "10", "--device", "cpu"]
    evaluate.main(["scenes", *options, "--out", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"seen", "colours", "pairs", "relations"} < report.keys() and report["settings"]["steps"] == 2
    assert report["pairs"]["real"]["binding"]["n"] >= 20 and report["seen"]["generated"]["scenes"]["accuracy"] == 0
    assert (tmp_path / "report.png").is_file()
    with pytest.raises(ValueError, match="is not one of scenes: those are texts to colour images of 64 x 64"):
        evaluate.main(["scenes", "--data", str(real)])
