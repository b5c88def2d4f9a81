"""Masked loss: masks that lie as their images do, and what they leave out of the loss of every stage that denoises."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import load_file
from tiny_stages import config_of, write_inputs
from torch.utils.data import default_collate as collate

from ldm.commands.shards import main
from ldm.data.dreambooth import DreamBooth, unread
from ldm.data.finding import find_images
from ldm.data.folder import Folder
from ldm.data.hugging_face import HuggingFace
from ldm.data.shards import Shards
from ldm.diffusion.loss import mean_error
from ldm.training.contract import build_dataset, check_dataset
from ldm.training.loop import train
from ldm.training.objective import loss_mask
from ldm.training.validation import Validation
from ldm.util import instantiate_from_config

NOISE = np.random.default_rng(14)


def write(folder: Path, name: str, pixels: np.ndarray, mask: np.ndarray | None = None) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if mask is not None:
        Image.fromarray(mask).save(folder / f"{name}.mask.png")
    return folder


def blobs(height: int, width: int) -> np.ndarray:
    """White and black squares of 12 x 12 pixels."""
    squares = NOISE.integers(0, 2, (-(-height // 12), -(-width // 12)), np.uint8) * 255
    return squares.repeat(12, 0).repeat(12, 1)[:height, :width]


@pytest.mark.parametrize(
    "settings",
    [{}, {"crop": "random", "flip": True}, {"resize": "exact", "flip": True}, {"resize": "none", "crop": "random"}]
    + [{"buckets": [[32, 16], [16, 32]], "crop": "random", "flip": True}],
)
@pytest.mark.parametrize("mask", ["file", "alpha"])
def test_a_mask_is_cut_and_mirrored_as_its_image(tmp_path, settings, mask):
    """A mask that is the image itself stays equal to it, but for what Lanczos and areas make of edges."""
    for i, size in enumerate([(48, 72), (96, 40), (32, 32)]):
        grey = blobs(*size)
        if mask == "file":
            write(tmp_path, str(i), grey, grey)
        else:
            write(tmp_path, str(i), np.stack([np.full_like(grey, 255), grey], 2))
    data = Folder(tmp_path, 32, 1, reads=["image"], mask=mask, background="black", **settings)
    first, seen = None, []
    for epoch in range(4):
        data.set_epoch(epoch)
        for sample in data:
            image, made = (sample["image"] + 1) / 2, sample["mask"]
            assert made.dtype == torch.float32 and made.shape == image.shape and 0 <= made.min() <= made.max() <= 1
            assert (image - made).abs().mean() < 0.05 and image.std() > 0.2
            seen.append(made)
        first = seen[:3] if first is None else first
    assert data.augments == any(not torch.equal(a, b) for a, b in zip(first * 4, seen, strict=True))


def test_weights_of_latents_are_means_of_areas():
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :, 6:], mask[1, :, :8] = 1, 0.25
    z = torch.zeros(2, 4, 8, 8)
    weights = loss_mask({"mask": mask}, z)
    assert weights[0, 0, 3].tolist() == [0, 0.5, *[1] * 6] and weights[1, 0, :, 0].tolist() == [0.25] * 2 + [0] * 6
    assert loss_mask({}, z) is None and torch.equal(loss_mask({"mask": torch.ones(2, 1, 30, 34)}, z), z[:, :1] + 1)


def test_the_loss_is_a_mean_over_the_masks_weight():
    """By hand; all of ones is no mask to the bit, a black one is 0 and not nan, and each image counts by itself."""
    difference = torch.arange(8.0).reshape(2, 1, 2, 2)
    mask = torch.tensor([[[[1, 0.5], [0, 0]]], [[[0, 0], [0, 0.1]]]])
    zeros = torch.zeros_like(difference)
    assert mean_error("l2", difference, zeros, mask).tolist() == pytest.approx([0.5 / 1.5, 49])
    assert mean_error("l1", difference, zeros, mask).tolist() == pytest.approx([0.5 / 1.5, 7])
    assert mean_error("l2", difference, zeros, 0 * mask).tolist() == [0, 0]
    output = torch.randn(3, 4, 7, 9, requires_grad=True)
    found = [mean_error("l2", output, torch.ones_like(output), m) for m in (None, torch.ones(3, 1, 7, 9))]
    grads = [torch.autograd.grad(losses.sum(), output)[0] for losses in found]
    assert torch.equal(*found) and torch.equal(*grads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """16 images as they are, in `plain`, and beside masks that show all of them, or their left or right halves."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    left = np.zeros((32, 40), np.uint8)
    left[:, :20] = 255
    masks = {"plain": None, "white": left | 255, "left": left, "right": ~left}
    for i in range(16):
        pixels = NOISE.integers(0, 256, left.shape, np.uint8)
        for name, mask in masks.items():
            write(folder / name, str(i), pixels, mask)
    return folder


@pytest.fixture(autouse=True)
def there(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


KINDS = {
    "latent": {},
    "latent without a cache": {"cache_latents": False},
    "pixel": {},
    "pixel with a variance": {"bound_weight": 1.0},
    "dreambooth": {},
    "dreambooth without a cache": {"cache": False},
    "textual_inversion": {},
}


def config(kind, root, **params):
    """A configuration of such a stage, with the masks of a folder."""
    name = kind.partition(" ")[0]
    found = config_of("unconditional" if name == "latent" else name)
    if name == "pixel":
        found["data"] = {"target": "ldm.data.folder.Folder", "params": {"size": 32, "channels": 1}}
        found["stage"]["params"]["model"]["params"]["cond_stage_config"] = None
        network = found["stage"]["params"]["model"]["params"]["unet_config"]["params"]
        network["num_classes"] = None
        if "variance" in kind:
            found["stage"]["params"]["model"]["params"]["learned_variance"] = True
            network["out_channels"] = 2
    found["stage"]["params"] |= KINDS[kind] | params
    masks = None if root == "plain" else "file"
    found["data"]["params"] |= {"instance_data_dir" if name == "dreambooth" else "root": root, "mask": masks}
    return found


def prepared(kind, root, **params):
    torch.manual_seed(0)
    found = config(kind, root, **params)
    stage = instantiate_from_config(found["stage"])
    stage.train(False)
    return stage, stage.prepare(build_dataset(stage, found["data"]))


def batch_of(data, count=4):
    return collate([data.__getitems__([i])[0] if hasattr(data, "__getitems__") else data[i] for i in range(count)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_black_region_has_no_part_in_the_loss(kind):
    """No gradient reaches the prediction there. Halves have the loss of the whole as their mean, by the definition."""
    losses = {}
    for root in ("left", "right", "plain", "white"):
        stage, data = prepared(kind, root)
        outputs = []
        network = stage.latent_diffusion.model.diffusion_model
        network.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        batch = batch_of(data)
        assert ("mask" in batch) == (root != "plain") and "class_mask" not in batch
        torch.manual_seed(1)
        _, values = stage.loss(batch)
        losses[root] = values.get("instance_loss", values["loss"]).detach()
        losses[f"{root} class"] = values.get("class_loss", torch.zeros(())).detach()
        (grad,) = torch.autograd.grad(values.get("instance_loss", values["loss"]), outputs)
        middle = grad.shape[-1] // 2
        assert not (root == "left" and grad[:4, ..., middle:].any()), root
        assert not (root == "right" and grad[:4, ..., :middle].any()), root
        assert root in ("left", "right") or grad[:4].count_nonzero() > 0.9 * grad[:4].numel()
    mean = (losses["left"] + losses["right"]) / 2
    torch.testing.assert_close(mean, losses["plain"], rtol=1e-5, atol=0)
    assert losses["left"] != losses["right"] and torch.equal(losses["white"], losses["plain"])
    assert len({losses[f"{root} class"].item() for root in ("left", "right", "plain", "white")}) == 1


def trained(folder: Path, found: dict, **data) -> dict[str, torch.Tensor]:
    found["outdir"], found["loop"] = str(folder), found["loop"] | {"batch_size": 16, "precision": "fp32"}
    found["loop"] |= {"preview_every": 2, "save_every": 2}
    found["data"]["params"] |= data
    train(found)
    return load_file(next(folder.glob("*/model.safetensors")))


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["latent", "pixel", "dreambooth"])
def test_white_masks_are_none_to_the_bit(tmp_path, kind):
    plain, white, left = (trained(tmp_path / root, config(kind, root)) for root in ("plain", "white", "left"))
    assert_equal(plain, white)
    assert any(not torch.equal(plain[name], left[name]) for name in plain)


def test_a_cache_changes_nothing(tmp_path):
    options = {"memory": {}, "disk": {"cache_dir": str(tmp_path / "cache")}, "none": {"cache_latents": False}}
    found = [trained(tmp_path / name, config("latent", "left", **some)) for name, some in options.items()]
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])
    again = trained(tmp_path / "again", config("latent", "right", **options["disk"]))  # the same latents, other masks
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == 1
    assert_equal(again, trained(tmp_path / "right", config("latent", "right")))


@pytest.mark.usefixtures("few_triples")
def test_validation_is_masked_as_its_images_are():
    found = {}
    for root in ("plain", "white", "left", "right"):
        stage, data = prepared("latent", "plain")
        found[root] = Validation(
            stage, Folder(root, 32, 1, reads=["image"], mask=root != "plain" and "file" or None), 16
        )
    losses = {root: one.measure()["loss"] for root, one in found.items()}
    assert losses["white"] == losses["plain"] != losses["left"]
    assert (losses["left"] + losses["right"]) / 2 == pytest.approx(losses["plain"], rel=1e-5)


def test_masks_in_shards(tmp_path):
    pytest.importorskip("webdataset")
    main(["left", str(tmp_path / "shards"), "--images", "5"])
    options = {"size": 16, "channels": 1, "crop": "random", "flip": True, "reads": ["image"], "mask": "file"}
    one, other = Shards(str(tmp_path / "shards"), **options), Folder("left", **options)
    assert len(one) == len(other) == 16
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add("left/0.png", "0.png")
        tar.add("plain/1.png", "0.mask.png")
        tar.add("plain/1.png", "1.png")
    data = Shards(str(tmp_path / "one.tar"), 16, 1, reads=["image"], mask="file")
    assert len(data) == 2 and data[0]["mask"].std() > 0 and torch.equal(data[1]["mask"], torch.ones(1, 16, 16))


def test_masks_are_not_images(tmp_path, capsys):
    """Beside the image whose name they have; alone they are images like others."""
    for name in ("a", "b.1"):
        write(tmp_path, name, blobs(32, 32), blobs(32, 32))
    write(tmp_path, "c.mask", blobs(32, 32))
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "b.1.png", "c.mask.png"]
    assert len(Folder(tmp_path, 8, reads=["image"])) == 3 and unread(tmp_path, find_images(tmp_path)) == []
    assert "note: 2 of 3 images have a mask beside them, which denoising stages use" in capsys.readouterr().err
    Folder(tmp_path, 8, reads=["image"], mask="file")
    assert "note: 1 of 3 images have no mask (file): " in (said := capsys.readouterr().err) and "c.mask.png" in said


def test_unusable_masks_are_refused_or_skipped(tmp_path, capsys):
    white, right = np.full((20, 40), 255, np.uint8), np.zeros((20, 40), np.uint8)
    right[:, 35:] = 255
    masks = {"a": white, "b": 0 * white, "c": white[1:], "d": right, "e": white}
    for name, mask in masks.items():
        write(tmp_path, name, white, mask)
    (tmp_path / "e.mask.png").write_bytes(b"")
    options = {"size": 16, "channels": 1, "reads": ["image"], "mask": "file"}
    refused("4 of 5 images cannot be used: the mask of .*b.png is black", Folder, tmp_path, **options)
    refused(r"the mask of .*c.png is 40 x 19 pixels, and it 40 x 20;", Folder, tmp_path, **options)
    refused(r"the mask of .*d.png is black.*e.mask.png cannot be read|e.mask.png is not", Folder, tmp_path, **options)
    data = Folder(tmp_path, on_error="skip", **options)
    assert [Path(path).name for path in data.paths] == [
        "a.png"
    ] and "4 of 5 images are left out" in capsys.readouterr().err
    data = Folder(tmp_path, on_error="skip", crop="random", **options)  # black in some epochs only
    assert [Path(path).name for path in data.paths] == ["a.png", "d.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "alpha", "channels": 2}, "mask 'alpha' needs channels 1 or 3"),
        ({"mask": "alpha"}, r"16 of 16 images have no mask \(alpha\): .*0.png.*leave out data.params.mask"),
        ({"mask": "alfa"}, "mask 'alfa' must be 'file' or 'alpha'"),
    ],
)
def test_masks_are_refused(settings, message):
    refused(message, Folder, "plain", 16, reads=["image"], **settings)


def test_other_stages_refuse_masks():
    for name in ("autoencoder", "classifier", "ddgan", "distillation"):
        stage = instantiate_from_config(config_of(name)["stage"])
        data = {
            "target": "ldm.data.folder.Folder",
            "params": {"root": "left", "size": 32, "channels": 1, "mask": "file"},
        }
        if name in ("classifier", "ddgan", "distillation"):
            stage.reads = ("image",)
        refused("its samples have a mask, and this stage's loss takes none", build_dataset, stage, data)


def test_masks_of_other_data_sets_are_checked():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"image": torch.zeros(1, 32, 32), "mask": self.mask_}

    stage, data = prepared("latent", "plain")[0], Own()
    for mask in (torch.ones(32, 32), torch.full((1, 32, 32), 255.0), torch.ones(1, 32, 32).byte()):
        data.mask_ = mask
        refused(r"its mask must be floats \(1, 32, 32\) in \[0, 1\]", check_dataset, stage, data)
    data.mask_ = torch.eye(32)[None]
    check_dataset(stage, data)
    batch = batch_of(stage.prepare(data), 2)
    assert torch.equal(batch["mask"], torch.eye(32).expand(2, 1, 32, 32)) and "mean" in batch


def test_alpha_of_a_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    clear = np.stack([blobs(32, 32), blobs(32, 32)], 2)
    path = write(tmp_path / "images", "0", clear) / "0.png"
    datasets.Dataset.from_dict({"image": [path.read_bytes()]}).save_to_disk(tmp_path / "rows")
    one = HuggingFace(str(tmp_path / "rows"), 32, 1, reads=["image"], mask="alpha")
    assert torch.equal(one[0]["mask"][0] * 255, torch.from_numpy(clear[..., 1]).float())


def test_subjects_have_masks_and_their_class_has_none():
    row = {"instance_dir": "left", "instance_prompt": "sks", "class_dir": "right", "class_images": {"0.png": "a"}}
    sample = DreamBooth([row], 32, channels=1, mask="file")[0]
    assert "mask" in sample and "class_mask" not in sample
