"""Class images: the same from the same model, prompt and size, whatever the batch; and only those are taken again."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY, randomised, refused, save_noise
from PIL import Image

import ldm
from ldm.inference.again import read_image_text, recipe_from_text
from ldm.inference.class_images import Class, Share, collect, generate_class_images, users_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.loop import train


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return ldm.load(tiny_checkpoint, device="cpu")


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def generate(model, folder, count, batch_size, prompt="a five", size=32, scale=1.0):
    """Names of the images of one share."""
    (names,) = generate_class_images(model, [Share(folder, prompt, count)], size, scale, batch_size)
    return names


def images_of(model, *classes, known=(), default_count=3):
    """The images and captions of classes, given as arguments of `Class`."""
    return collect(model, [Class(*one) for one in classes], default_count, 32, 1.0, batch_size=2, known=known)


def test_one_seed_per_image_in_any_batch(model, tmp_path):
    """Images of another batch size agree to rounding; those that are there are not generated again."""
    first = generate(model, tmp_path / "a", 3, 2)
    second = generate(model, tmp_path / "b", 5, 4)
    assert second[:3] == first and len(set(second)) == 5
    for i, name in enumerate(first):
        assert abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "b" / name)).max() <= 1
        recipe = recipe_from_text(read_image_text(tmp_path / "a" / name))
        assert (recipe.prompt, recipe.seed, recipe.scale, recipe.width) == ("a five", i, 1.0, 32)
        assert recipe.model_hash == model.hash
    (alone,) = model.generate(["a five"], seed=2, scale=1.0)
    assert abs(np.asarray(alone, dtype=int) - pixels(tmp_path / "b" / second[2])).max() <= 1


def test_what_is_there_is_kept_and_what_is_damaged_is_generated_again(model, tmp_path, monkeypatch):
    names = generate(model, tmp_path, 4, 2)
    written = {name: (tmp_path / name).read_bytes() for name in names}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    (tmp_path / names[3]).write_bytes(written[names[3]][:40])
    assert generate(model, tmp_path, 4, 2) == names
    assert {name: (tmp_path / name).read_bytes() for name in names} == written
    assert {name for name in names if (tmp_path / name).stat().st_mtime_ns != times[name]} == {names[3]}
    monkeypatch.setattr(type(model), "generate", None)  # nothing remains to generate
    assert generate(model, tmp_path, 4, 3) == names


def test_another_model_prompt_size_or_scale_makes_new_ones(model, tiny_checkpoint, tmp_path):
    other = ldm.load(tiny_checkpoint, device="cpu")
    other.hash = "0123456789"
    settings = [(model, "a five", 32, 1.0), (other, "a five", 32, 1.0), (model, "a six", 32, 1.0)]
    settings += [(model, "a five", 16, 1.0), (model, "a five", 32, 2.0)]
    names = [generate(m, tmp_path, 1, 1, *setting)[0] for m, *setting in settings]
    assert len(set(names)) == 5 == len(list(tmp_path.iterdir()))
    refused("cannot be made by this model", generate, model, tmp_path, 1, 1, size=33)


def test_a_users_images_come_first(model, tmp_path, capsys):
    assert users_images(tmp_path / "none") == []
    for name in ("b.jpg", "a.png"):
        Image.new("L", (32, 32), 99).save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("mine")

    def some(count):
        return images_of(model, (tmp_path, ["a five"], count))[0]

    assert some(None) == {"a.png": "a five", "b.jpg": "a five"} and list(some(1)) == ["a.png"]
    four = some(4)
    assert list(four)[:2] == ["a.png", "b.jpg"] and len(four) == 4 and set(four.values()) == {"a five"}
    assert f"class images in {tmp_path}: 2; the model generates 2 more" in capsys.readouterr().out
    assert some(4) == four and list(some(None)) == ["a.png", "b.jpg"]  # generated images are not taken for the user's
    assert len(images_of(model, (tmp_path / "new", ["a five"]))[0]) == 3


def test_several_prompts_share_the_images(model, tmp_path):
    """Evenly, each with seeds from 0 on; images of one's own have to say which they are."""
    prompts = ["a five", "a six", "a seven"]
    (found,) = images_of(model, (tmp_path, prompts, 5))
    recipes = [recipe_from_text(read_image_text(tmp_path / name)) for name in found]
    expected = [("a five", 0), ("a five", 1), ("a six", 0), ("a six", 1), ("a seven", 0)]
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == expected
    assert list(found.values()) == [recipe.prompt for recipe in recipes]
    Image.new("L", (32, 32), 99).save(tmp_path / "own.png")
    assert images_of(model, (tmp_path, prompts, 2)) == [{"own.png": None, next(iter(found)): "a five"}]


def test_what_else_is_kept(model, tmp_path):
    """As many images again, of what is asked for or known, without the class's prompt; a user's own are enough."""

    known = ["a five", "a six", "a seven", "an eight"]

    def captions(name, keep=None):
        (found,) = images_of(model, (tmp_path / name, ["a five"], None, keep), known=known, default_count=2)
        return sorted(found.values())

    assert captions("a") == ["a five", "a five", "a seven", "a six"]
    assert captions("a", keep=[]) == ["a five", "a five"]
    assert captions("a", keep=["a nine"]) == ["a five", "a five", "a nine", "a nine"]
    (tmp_path / "b").mkdir()
    Image.new("L", (32, 32), 99).save(tmp_path / "b" / "own.png")
    assert captions("b") == ["a five"]
    assert captions("b", keep=["a nine"]) == ["a five", "a nine"]


def test_one_bar_over_all_that_is_missing(model, tmp_path, capsys):
    """Whatever the number of prompts and subjects; what is there, or asked for twice, is counted and generated once."""
    first, second = (tmp_path, ["a five"], 2, ["a six", "a seven"]), (tmp_path, ["a six"], 3, ["a five"])
    images_of(model, (tmp_path, ["a seven"], 1, []))
    capsys.readouterr()
    fives, sixes, nothing = images_of(model, first, second, (tmp_path, []))
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "| 6/6 [" in shown  # a bar ends its line; fives 0 to 2, sixes 0 to 2
    assert list(fives.values()) == ["a five", "a five", "a six", "a seven"] and nothing == {}
    assert list(sixes.values()) == ["a six"] * 3 + ["a five"] * 3
    assert len(list(tmp_path.iterdir())) == 7 == len({*fives, *sixes})
    assert images_of(model, first, second) == [fives, sixes] and capsys.readouterr().err == ""


def test_class_images_are_generated_in_eval_mode(tmp_path):
    """A model that has dropout and was left in training mode; what trains then has its dropout."""
    torch.manual_seed(0)
    unet = TINY["unet_config"] | {"params": TINY["unet_config"]["params"] | {"dropout": 0.5}}
    model = randomised(LatentDiffusion(**TINY | {"unet_config": unet})).train()
    images, loop = save_noise(tmp_path), {"steps": 1, "batch_size": 1, "report_to": "none", "ema": 0.0}
    prompts = {"instance_prompt": "a sks five", "class_prompt": "a five"}
    data = {"instance_data_dir": images["instance_dir"], "class_data_dir": str(tmp_path / "out"), "num_class_images": 1}
    data |= {"keep_prompt": "", "class_guidance_scale": 1.0}
    stage = {"ckpt": None, "learning_rate": 0.1, "resolution": 32, "previews": ["a five"], "preview_columns": 1}
    (before,) = copy.deepcopy(model).eval().generate(["a five"], scale=1.0)
    config = {
        **{"name": "run", "outdir": str(tmp_path), "seed": 0, "loop": loop},
        "stage": {"target": "ldm.finetune.dreambooth.DreamBoothStage", "params": stage | prompts},
        "data": {"target": "ldm.inference.class_images.SubjectImages", "params": data | prompts},
    }
    modes = []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    train(config, device="cpu", ckpt=model)
    (path,) = (tmp_path / "out").iterdir()
    assert (pixels(path) == np.asarray(before, dtype=int)).all()
    assert modes == [False] * 4 + [True] + [False] * 4  # the class image; a training step; a preview


def test_a_full_disk_leaves_whole_images_only(model, tmp_path, monkeypatch):
    calls, save = [], Image.Image.save

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            args[0].write_bytes(b"half an image")
            raise OSError(28, "No space left on device")
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    refused("No space left", generate, model, tmp_path, 3, 3, error=OSError)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(generate(model, tmp_path, 3, 3)) == 3
