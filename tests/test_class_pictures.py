"""Class pictures: the same from the same model, prompt and size, whatever the batch; and only those are taken again."""

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.inference.class_pictures import collect, draw_class_pictures, users_pictures
from ldm.inference.png import read_png_text
from ldm.inference.recipe import Recipe


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return ldm.load(tiny_checkpoint, device="cpu")


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def test_one_seed_per_picture_in_any_batch(model, tmp_path):
    """Pictures of another batch size agree to rounding; those that are there are not drawn again."""
    first = draw_class_pictures(model, tmp_path / "a", "a five", 3, 32, 1.0, 2)
    second = draw_class_pictures(model, tmp_path / "b", "a five", 5, 32, 1.0, 4)
    assert second[:3] == first and len(set(second)) == 5
    for i, name in enumerate(first):
        assert abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1
        recipe = Recipe.from_text(read_png_text(tmp_path / "a" / name))
        assert (recipe.prompt, recipe.seed, recipe.scale, recipe.width) == ("a five", i, 1.0, 32)
        assert recipe.model_hash == model.hash
    (alone,) = model.generate(["a five"], seed=2, scale=1.0)
    assert abs(np.asarray(alone, dtype=int) - pixels(tmp_path / "b" / second[2])).max() <= 1


def test_what_is_there_is_kept_and_what_is_damaged_is_drawn_anew(model, tmp_path, monkeypatch):
    names = draw_class_pictures(model, tmp_path, "a five", 4, 32, 1.0, 2)
    written = {name: (tmp_path / name).read_bytes() for name in names}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / names[3]).write_bytes(written[names[3]][:40])
    assert draw_class_pictures(model, tmp_path, "a five", 4, 32, 1.0, 2) == names
    assert {name: (tmp_path / name).read_bytes() for name in names} == written
    assert {name for name in names if (tmp_path / name).stat().st_mtime_ns != times[name]} == {names[3]}
    monkeypatch.setattr(type(model), "generate", None)  # nothing is left to draw
    assert draw_class_pictures(model, tmp_path, "a five", 4, 32, 1.0, 3) == names


def test_another_model_prompt_size_or_scale_makes_new_ones(model, tiny_checkpoint, tmp_path):
    other = ldm.load(tiny_checkpoint, device="cpu")
    other.hash = "0123456789"
    settings = [(model, "a five", 32, 1.0), (other, "a five", 32, 1.0), (model, "a six", 32, 1.0)]
    settings += [(model, "a five", 16, 1.0), (model, "a five", 32, 2.0)]
    names = [draw_class_pictures(m, tmp_path, prompt, 1, size, scale, 1)[0] for m, prompt, size, scale in settings]
    assert len(set(names)) == 5 == len(list(tmp_path.iterdir()))
    with pytest.raises(ValueError, match="cannot be made by this model"):
        draw_class_pictures(model, tmp_path, "a five", 1, 33, 1.0, 1)


def test_a_users_pictures_come_first(model, tmp_path, capsys):
    assert users_pictures(tmp_path / "none") == []
    for name in ("b.jpg", "a.png"):
        Image.new("L", (32, 32), 99).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("mine")

    def take(count):
        return collect(model, tmp_path, ["a five"], count, usual=3, size=32, scale=1.0, batch_size=2)

    assert take(None) == {"a.png": "a five", "b.jpg": "a five"} and list(take(1)) == ["a.png"]
    four = take(4)
    assert list(four)[:2] == ["a.png", "b.jpg"] and len(four) == 4 and set(four.values()) == {"a five"}
    assert "holds 2 pictures of the class; the model draws 2 more" in capsys.readouterr().out
    assert take(4) == four and list(take(None)) == ["a.png", "b.jpg"]  # what was drawn is not taken for the user's
    assert len(collect(model, tmp_path / "new", ["a five"], None, usual=3, size=32, scale=1.0, batch_size=2)) == 3


def test_several_prompts_share_what_is_drawn(model, tmp_path):
    """Evenly, each with seeds from 0 on; pictures of one's own have to say which they are."""
    prompts = ["a five", "a six", "a seven"]
    found = collect(model, tmp_path, prompts, 5, usual=3, size=32, scale=1.0, batch_size=2)
    recipes = [Recipe.from_text(read_png_text(tmp_path / name)) for name in found]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == [
        ("a five", 0),
        ("a five", 1),
        ("a six", 0),
        ("a six", 1),
        ("a seven", 0),
    ]
    assert list(found.values()) == [recipe.prompt for recipe in recipes]
    Image.new("L", (32, 32), 99).save(tmp_path / "own.png")
    assert collect(model, tmp_path, prompts, 2, usual=3, size=32, scale=1.0, batch_size=2) == {
        "own.png": None,
        next(iter(found)): "a five",
    }


def test_what_else_is_kept(model, tmp_path):
    """As many pictures again, of what is asked for or known, without the class's prompt; a user's own are enough."""

    def take(folder, **more):
        found = collect(model, folder, ["a five"], None, usual=2, size=32, scale=1.0, batch_size=2, **more)
        return sorted(found.values())

    known = ["a five", "a six", "a seven", "an eight"]
    assert take(tmp_path / "a", known=known) == ["a five", "a five", "a seven", "a six"]
    assert take(tmp_path / "a", known=known, keep=[]) == ["a five", "a five"]
    assert take(tmp_path / "a", known=known, keep=["a nine"]) == ["a five", "a five", "a nine", "a nine"]
    (tmp_path / "b").mkdir()
    Image.new("L", (32, 32), 99).save(tmp_path / "b" / "own.png")
    assert take(tmp_path / "b", known=known) == ["a five"]
    assert take(tmp_path / "b", known=known, keep=["a nine"]) == ["a five", "a nine"]


def test_a_full_disk_leaves_whole_pictures_only(model, tmp_path, monkeypatch):
    calls, save = [], Image.Image.save

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            args[0].write(b"half a picture")
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        draw_class_pictures(model, tmp_path, "a five", 3, 32, 1.0, 3)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(draw_class_pictures(model, tmp_path, "a five", 3, 32, 1.0, 3)) == 3
