"""Every condition of Rombach et al. 2022: trained for two steps, in a checkpoint, and sampled from the command line."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, randomised, refused
from PIL import Image
from script_runs import ROOT, check_reproduced, load_script, pixels, runner, samples, saved
from test_spatial import images
from tiny_stages import UNCONDITIONAL, WITHOUT_POOLED
from torch.utils.data import Dataset, default_collate

import ldm
from ldm.checkpoint.writing import save_file
from ldm.conditioning.layout import LayoutEncoder
from ldm.conditioning.spatial import SpatialRescaler
from ldm.loading import load_network
from ldm.training.diffusion import DiffusionStage
from ldm.training.loop import train as train_run
from ldm.training.masks import middle_masks, random_masks
from ldm.training.share import BatchShare
from ldm.util import instantiate_network

RESCALER = {"n_stages": 2, "in_channels": 3, "out_channels": 2}
LAYOUT = {"names": ["square", "disc"], "size": 32, "width": 32, "layers": 1, "objects": 2, "pooled": True}
# condition -> the conditioner, the UNet's additional channels, and other settings of the stage
CONDITIONS: dict[str, tuple] = {
    "label": ("classes.ClassEmbedder", {"embed_dim": 32, "n_classes": 3}, 0, {}),
    "image": ("spatial.ConcatImage", {}, 1, {}),
    "map": ("spatial.SpatialRescaler", RESCALER, 2, {}),
    "boxes": ("layout.LayoutEncoder", LAYOUT, 0, {}),
    "inpaint": (None, {}, 5, {"concat": "latents_mask"}),
    "text and inpaint": ("cond_stage", {}, 5, {"concat": "mask_latents"}),
}
SQUARE = [{"class": "disc", "box": [4, 8, 12, 30]}]


class Squares(Dataset):
    """Bright squares in grey noise, with every part of a sample that a model may be conditioned on."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        image, classes = images(5, 1, 32, 32)[index].clamp(-1, 1), torch.zeros(32, 32, dtype=torch.int64)
        image[:, 8:20, 4:12], classes[8:20, 4:12] = 1.0, 1 + index % 2
        boxes = torch.tensor([[4, 8, 12, 20, index % 2], [-1] * 5])
        return {"image": image, "label": index % 2, "caption": "a square", "boxes": boxes, "map": classes}


def stage_params(name: str, tiny_parts: dict) -> dict:
    target, params, channels, others = copy.deepcopy(CONDITIONS[name])
    pooled = TINY["unet_config"]
    unets = {"classes.ClassEmbedder": WITHOUT_POOLED, "layout.LayoutEncoder": pooled, "cond_stage": pooled}
    unet = copy.deepcopy(unets.get(target, UNCONDITIONAL))
    if target == "layout.LayoutEncoder":
        unet["params"]["adm_in_channels"] = params["width"]
    unet["params"]["in_channels"] += channels
    cond = None if target is None else {"target": f"ldm.conditioning.{target}", "params": params}
    parts = {**tiny_parts, "cond_stage": tiny_parts["cond_stage"] if target == "cond_stage" else cond}
    scale = 2.0 if name in ("label", "boxes", "text and inpaint") else 1.0
    own = {"defaults": TINY["defaults"] | {"scale": scale}, "schedule": {"name": "cosine"}, "preview_columns": 2}
    return {"unet_config": unet, **parts, **own, "learning_rate": 1e-3, **others}


def stage_of(name: str, tiny_parts: dict, **changes) -> DiffusionStage:
    torch.manual_seed(0)
    stage = DiffusionStage(**stage_params(name, tiny_parts) | changes)
    randomised(stage.networks)
    return stage


@pytest.fixture(scope="module")
def trained(tiny_parts_of_module, tmp_path_factory):
    """`trained(condition)` gives the checkpoint of two training steps."""
    made: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in made:
            target = "ldm.training.diffusion.DiffusionStage"
            loop = {"steps": 2, "batch_size": 2, "preview_every": 2, "save_every": 2, "report_to": "none"}
            config = {"name": "run", "outdir": str(tmp_path_factory.mktemp("run")), "seed": 0, "loop": loop}
            config |= {"stage": {"target": target, "params": stage_params(name, tiny_parts_of_module)}}
            train_run(config | {"data": {"target": "test_family.Squares", "params": {}}}, device="cpu")
            made[name] = Path(config["outdir"]) / "run" / "model.safetensors"
            randomise(made[name])
        return made[name]

    return train


def randomise(path: Path) -> None:
    """Change the weights, of which some start at zero and hardly move in two steps, so that the condition shows."""
    model = ldm.load(path, device="cpu").requires_grad_(False)
    for parameter in (*model.model.parameters(), *getattr(model.cond_stage_model, "parameters", list)()):
        assert parameter.isfinite().all()
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    ldm.save(model, path)


@pytest.fixture(scope="module")
def tiny_parts_of_module(tiny_parts):
    return tiny_parts


@pytest.fixture
def generate(trained, tmp_path):
    return lambda script, name, *options, **more: runner(load_script(script), trained(name), tmp_path)(*options, **more)


def condition_of(name: str):
    sample = Squares()[1]
    small = F.adaptive_avg_pool2d(sample["image"], 8)
    return {"label": 1, "image": small, "map": sample["map"], "boxes": sample["boxes"], "text and inpaint": "a"}.get(
        name, ""
    )


@pytest.mark.parametrize("name", CONDITIONS)
def test_it_trains_and_comes_back_from_its_checkpoint(trained, name):
    """The checkpoint's model follows the condition: another one gives another image."""
    model = ldm.load(trained(name), device="cpu")
    kind = CONDITIONS[name][0]
    assert type(model.cond_stage_model).__name__ == {None: "NoneType", "cond_stage": "TextEncoder"}.get(
        kind, str(kind).rpartition(".")[2]
    )
    given, other = condition_of(name), {"label": 0, "boxes": "", "text and inpaint": "five"}.get(name)
    other = torch.zeros_like(given) if name in ("image", "map") else other
    options = {"steps": 2, "seed": 3}
    if model.concat is not None:
        options |= {"image": Image.new("L", (32, 32), 200), "mask": Image.fromarray(np.uint8(255 * np.eye(32)))}
    (first,), (again,) = model.generate([given], **options), model.generate([given], **options)
    assert first.size == (32, 32) and np.array_equal(first, again)
    if name != "inpaint":
        assert not np.array_equal(first, model.generate([other], **options)[0])


def test_an_image_is_made_as_small_as_its_latents(tiny_parts):
    """Super-resolution: beside the noised latents the UNet has the means of squares; cached or not, the loss is one."""
    losses = []
    for cached in (True, False):
        stage = stage_of("image", tiny_parts, cache_latents=cached)
        data = stage.prepare(Squares())
        batch = default_collate(data.__getitems__([0, 2]) if cached else [data[0], data[2]])
        assert ("mean" in batch) == cached
        torch.manual_seed(1)
        z, cond = stage.data(batch)
        assert cond.keys() == {"c_concat"} and z.shape == (2, 4, 8, 8)
        want = batch["image"].view(2, 1, 8, 4, 8, 4).mean((3, 5))
        torch.testing.assert_close(cond["c_concat"], want)
        torch.manual_seed(2)
        losses.append(stage.loss(batch)[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert torch.equal(stage.preview_prompts[1], F.adaptive_avg_pool2d(Squares()[1]["image"], 8))


@pytest.mark.parametrize(("concat", "blank"), [("latents_mask", -1.0), ("mask_latents", 0.0)])
def test_inpainting_sees_the_mask_and_the_rest_of_the_image(tiny_parts, concat, blank):
    stage = stage_of("inpaint", tiny_parts, concat=concat)
    model, batch = stage.latent_diffusion, default_collate([Squares()[i] for i in range(2)])
    _, cond = stage.data(batch, training=False)
    seen = batch["image"].clone()
    seen[..., 8:24, 8:24] = blank
    latents, mask = model.encode(seen, mode=True), torch.zeros(2, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    want = [latents, 2 * mask - 1] if concat == "latents_mask" else [mask, latents]
    torch.testing.assert_close(cond["c_concat"], torch.cat(want, 1))
    first, second = (stage.data(batch)[1]["c_concat"] for _ in range(2))
    assert not torch.equal(first, second)  # in training the masks are random
    refused("no data set here has pairs", stage_of, "inpaint", tiny_parts, concat="latents")
    refused("does not fit latents", stage_of, "label", tiny_parts, concat="latents_mask")


def test_random_masks():
    torch.manual_seed(0)
    masks = random_masks(2000, 32, 32, BatchShare())
    assert masks.shape == (2000, 1, 32, 32) and set(masks.unique().tolist()) == {0.0, 1.0}
    covered = masks.mean((1, 2, 3))
    assert (covered == 1).float().mean() == pytest.approx(0.1, abs=0.027)  # 4 standard deviations of 0.0067
    assert covered.min() > 0.003 and 0.2 < covered.mean() < 0.5
    shares = [BatchShare(rank, 2) for rank in range(2)]
    for share in shares:  # two processes mask as one does
        share.begin(0, 0)
    one = BatchShare()
    one.begin(0, 0)
    assert torch.equal(random_masks(8, 16, 16, one), torch.cat([random_masks(4, 16, 16, share) for share in shares]))
    assert middle_masks(1, 8, 8).sum() == 16


def test_maps_become_one_channel_for_each_class():
    encoder, classes = SpatialRescaler(n_stages=1, in_channels=3), torch.tensor([[[0, 0, 2, 2], [0, 1, 2, 2]]])
    want = torch.tensor([[[[0.75, 0.0]], [[0.25, 0.0]], [[0.0, 1.0]]]])
    torch.testing.assert_close(encoder(classes)["c_concat"], want)
    assert torch.equal(encoder([classes[0]])["c_concat"], encoder(classes)["c_concat"])
    refused("the map has the classes 0 to 3, and this model's are 0 to 2", encoder, classes + classes.gt(1))


def test_layouts_become_a_token_for_each_object():
    """A token is the embedding of the class, of two and the absent object, and a linear layer of the box's waves."""
    encoder, absent = LayoutEncoder(**LAYOUT), [0, 0, 0, 0, 2]
    assert encoder.rows(SQUARE).tolist() == [[4, 8, 12, 30, 1], absent]
    assert encoder.rows(json.dumps(SQUARE)).tolist() == encoder.rows(SQUARE).tolist()
    assert encoder.rows(torch.tensor([[4, 8, 12, 30, 1], [-1] * 5])).tolist() == encoder.rows(SQUARE).tolist()
    assert encoder.rows("").tolist() == encoder.rows([]).tolist() == [absent] * 2
    waves = [f(math.pi * edge / 32 * 2**k) for edge in (4, 8, 12, 30) for f in (math.sin, math.cos) for k in range(4)]
    token = encoder.class_emb.weight[1] + encoder.box_emb(torch.tensor(waves))
    want = torch.nn.functional.layer_norm(token, (32,)) * 4.0  # at the start the transformer adds nothing
    found = encoder([SQUARE, ""])
    torch.testing.assert_close(found["c_crossattn"][0, 0], want)
    torch.testing.assert_close(found["c_adm"], torch.stack([want, torch.zeros(32)]))
    two = encoder([SQUARE * 2])
    torch.testing.assert_close(two["c_adm"][0], two["c_crossattn"][0].sum(0) / 2**0.5)
    for wrong, match in {
        "[": "is not a layout (Expecting value",
        "5": "'5' is not a layout|5 is not a layout",
        '["disc"]': "is not a layout: write",
        '[{"class": "disc"}]': "an object has class and box, not class",
        '[{"class": "cat", "box": [0, 0, 1, 1]}]': "class 'cat' does not exist: this model's are square, disc",
        '[{"class": "disc", "box": [0, 0, 33, 1]}]': "is not left, top, right and bottom in pixels, from 0 to 32",
        '[{"class": "disc", "box": [9, 0, 9, 1]}]': "is not left, top",
        '[{"class": "disc", "box": [true, 0, 9, 1]}]': "is not left, top",
        json.dumps(SQUARE * 3): "has 3 objects, and this model's maximum is 2",
    }.items():
        refused(match.replace("(", r"\("), encoder.rows, wrong)
    refused("is not a layout .*recursion", encoder.rows, "[" * 100_000)
    for row, match in {
        (4, 8, 12, 30): r"\(1, 4\) is not a layout, rows of left",
        (4, 8, 12, 30, 2): "class 2 does not exist: this model's are 0 to 1",
        (4, 8, 12, 30, -2): "class -2 does not exist",
        (4, 8, 12, 30, math.nan): "class nan does not exist",
        (4, 8, 33, 30, 1): "is not left, top, right and bottom in pixels, from 0 to 32",
        (4.0, 8.0, math.nan, 30.0, 1.0): "is not left, top",
    }.items():
        refused(match, encoder.rows, torch.tensor([row]))
    refused("different names", LayoutEncoder, **LAYOUT | {"names": ["a", "a"]})


def test_half_precision_keeps_classes_and_boxes():
    """bfloat16 has neither class 257 nor edge 301: only the vectors made of them are rounded."""
    encoder = LayoutEncoder([str(i) for i in range(300)], size=512, width=32, layers=1)
    layouts = [[{"class": "257", "box": [3, 301, 511, 333.5]}]]
    expected, found = encoder(layouts)["c_crossattn"], encoder.bfloat16()(layouts)["c_crossattn"]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)  # of numbers up to about 12


def test_null_conditions_are_dropped_in(tiny_parts):
    stage = stage_of("boxes", tiny_parts, caption_dropout=1.0)
    batch = default_collate([Squares()[i] for i in range(2)])
    dropped, kept = (stage.data(batch, training=training)[1]["c_crossattn"] for training in (True, False))
    null = stage.latent_diffusion.condition(["", ""])["c_crossattn"]
    assert torch.equal(dropped, null) and not torch.equal(kept, null)
    stage.loss(batch)[0].backward()
    assert stage.latent_diffusion.cond_stage_model.class_emb.weight.grad.abs().sum() > 0


# --- from the command line


def test_a_small_image_is_enlarged(generate, trained, tmp_path):
    """5 x 7 pixels become 20 x 28, though the UNet halves; the PNG makes the image again from the same small one."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5), dtype=np.uint8))
    file = saved(tmp_path / "small.png", small)
    options = ["--upscale", "--init-img", file]
    out = generate("img2img", "image", *options, "--n_samples", 2)
    assert [Image.open(path).size for path in samples(out)] == [(20, 28)] * 2
    x = F.pad(torch.from_numpy(np.array(small))[None, None] / 127.5 - 1, (0, 1, 0, 1), mode="replicate")
    model = ldm.load(trained("image"), device="cpu")
    want = model.generate(x.expand(2, -1, -1, -1), steps=3, width=20, height=28)
    assert [np.asarray(image).tolist() for image in want] == [pixels(path).tolist() for path in samples(out)]
    check_reproduced(lambda *a, **k: generate("img2img", "image", *a, **k), samples(out), *options)
    other = saved(tmp_path / "other.png", small.rotate(180))
    again = ["--from-png", samples(out)[0]]
    refused("but the one given has", generate, "img2img", "image", *again, "--upscale", "--init-img", other)
    refused("made from a small image or a map", generate, "img2img", "image", *again, "--init-img", file)
    refused("made from a small image or a map", generate, "sample", "image", *again)
    for ignored in (["--strength", 0.5], ["--W", 32], ["--resize"], ["--prompt", "five"]):
        refused(f"leave out {ignored[0]}", generate, "img2img", "image", *options, *ignored)
    refused("needs a model that is conditioned on small images", generate, "img2img", "map", *options)
    refused("guidance scale 2 needs", generate, "img2img", "image", *options, "--scale", 2)
    refused("img2img --upscale", generate, "sample", "image")


def test_a_map_is_followed_as_in_python(generate, trained, tmp_path):
    classes = np.zeros((32, 40), np.uint8)
    classes[4:20, 8:30] = 2
    palette = Image.fromarray(classes, "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    files = [saved(tmp_path / "grey.png", Image.fromarray(classes)), saved(tmp_path / "palette.png", palette)]
    made = [pixels(samples(generate("sample", "map", "--map", file, out=file.stem))[0]) for file in map(Path, files)]
    (want,) = ldm.load(trained("map"), device="cpu").generate(torch.from_numpy(classes)[None].long(), steps=3, width=40)
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], want) and want.size == (40, 32)
    check_reproduced(lambda *a, **k: generate("sample", "map", *a, **k), samples(tmp_path / "grey"), "--map", files[0])
    odd = saved(tmp_path / "odd.png", Image.new("L", (36, 32)))
    refused("36 x 32 pixels: this model takes multiples of 8", generate, "sample", "map", "--map", odd)
    large = saved(tmp_path / "large.png", Image.new("L", (32, 32), 9))
    refused("the map has the classes 9 to 9", generate, "sample", "map", "--map", large)
    colours = saved(tmp_path / "colours.png", Image.new("RGB", (32, 32)))
    refused("is not a map of classes", generate, "sample", "map", "--map", colours)
    refused("leave out --class", generate, "sample", "map", "--map", files[0], "--class", "1")
    layout = tmp_path / "layout.json"
    layout.write_text("[]")
    refused("leave out --layout", generate, "sample", "map", "--map", files[0], "--layout", layout)
    refused("conditioned on maps of classes, and this one is not", generate, "sample", "label", "--map", files[0])


def test_layouts_are_files_of_json(generate, trained, tmp_path):
    file = tmp_path / "layout.json"
    file.write_text(json.dumps(SQUARE, indent=2))
    (tmp_path / "none.json").write_text("[]")
    out = generate("sample", "boxes", "--layout", file, tmp_path / "none.json")
    want = ldm.load(trained("boxes"), device="cpu").generate([SQUARE, []], steps=3)
    assert [pixels(path).tolist() for path in samples(out)] == [np.asarray(image).tolist() for image in want]
    check_reproduced(lambda *a, **k: generate("sample", "boxes", *a, **k), samples(out)[:1])
    file.write_text("[{")
    refused("layout.json' is not JSON", generate, "sample", "boxes", "--layout", file)
    refused("'5' is not a layout|5 is not a layout", generate, "sample", "boxes", "--class", "5")
    refused(
        "--layout needs a layout-conditional model",
        generate,
        "sample",
        "text and inpaint",
        "--layout",
        tmp_path / "none.json",
    )


def test_what_the_mask_keeps_stays_to_the_byte(generate, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 32, 16))
    files = ["--init-img", saved(tmp_path / "a.png", image), "--mask", saved(tmp_path / "m.png", mask)]
    made = pixels(samples(generate("inpaint", "inpaint", *files))[0])
    assert np.array_equal(made[16:], np.asarray(image)[16:]) and not np.array_equal(made[:16], np.asarray(image)[:16])


@pytest.mark.full
@pytest.mark.parametrize("path", sorted((ROOT / "configs/family").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_that_ship_train(path, mnist, tmp_path, monkeypatch):
    """One step of two images each, on sixteen digits, or scenes of them with an untrained first stage."""
    monkeypatch.setenv("LDM_DATA", str(mnist))
    monkeypatch.chdir(ROOT)
    short = ["loop.steps=1", "loop.batch_size=2", "loop.report_to=none", "stage.params.preview_columns=2"]
    short += [f"outdir={tmp_path}", "data.params.first=16"]
    if path.stem == "first-stage":
        load_script("train").main([str(path), *short, "stage.params.disc_start=0", "--device", "cpu"])
        assert load_network(tmp_path / path.stem / "model.safetensors").embed_dim == 3
        return
    short += ["stage.params.defaults.steps=1"]
    if "Scenes" in path.read_text():
        first_stage = copy.deepcopy(TINY["first_stage_config"])
        first_stage["params"]["ddconfig"] |= {"in_channels": 3, "out_ch": 3}
        save_file(tmp_path / "first_stage", instantiate_network(first_stage).state_dict(), first_stage)
        short += [f"stage.params.first_stage={tmp_path}/first_stage", "data.params.count=4"]
    load_script("train").main([str(path), *short, "--device", "cpu"])
    assert ldm.load(tmp_path / path.stem / "model.safetensors", device="cpu").first_stage_model is not None
