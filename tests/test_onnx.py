"""ONNX models: their images are the checkpoint's, torch is not needed for them, and what they cannot hold is named."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, pixels, randomised, refused
from script_runs import pixels as levels
from tiny_stable_diffusion import SD1, SD2

import ldm
from ldm.commands.convert import main as convert
from ldm.commands.txt2img import main as txt2img
from ldm.editing import attention_maps
from ldm.latent_diffusion import LatentDiffusion
from ldm.onnx import export
from ldm.onnx.attention import WithAttention
from ldm.onnx.export import write_onnx
from ldm.onnx.model import OnnxModel
from ldm.pixel_diffusion import PixelDiffusion

NETWORKS = {"text", "unet", "decoder", "encoder"}
lacking = [name for name in export.NEEDED if find_spec(name) is None]
with_extra = pytest.mark.skipif(bool(lacking), reason=f"the extra onnx is not installed: no {', '.join(lacking)}")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The tiny model's ONNX folder, by the script."""
    path = tmp_path_factory.mktemp("onnx") / "model"
    convert([str(tiny_checkpoint), str(path), "--format", "onnx"])
    return path


def check_same_images(ours, theirs, prompts, **settings):
    found, expected = (pixels(model.generate(prompts, seed=3, **settings)) for model in (ours, theirs))
    assert expected.std() > 5  # of an image, not of nothing
    assert abs(found - expected).max() <= 1


@with_extra
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "ddpm", "eta": 0.7, "fixed_code": True},
        {"sampler": "dpmpp_2m_sde", "spacing": "karras", "width": 48, "rescale": 0.5},
        {"sampler": "unipc", "batch_size": 2, "negative": "a one"},
        {"scale": 1, "interval": (0.1, 5)},
    ],
    ids=str,
)
def test_images_are_the_checkpoints(folder, tiny_checkpoint, settings):
    prompts = ["five", "a (five:1.4) [six]", "five " * 40]  # plain, weighted, and of several chunks
    check_same_images(ldm.load(folder), ldm.load(tiny_checkpoint, device="cpu"), prompts, **settings)


@with_extra
def test_images_between_prompts_and_seeds(folder, tiny_checkpoint):
    models = ldm.load(folder), ldm.load(tiny_checkpoint, device="cpu")
    found = [pixels(m.generate(ldm.interpolate("5", "6", 3), seeds=ldm.interpolate(2, 7, 3))) for m in models]
    assert abs(found[0] - found[1]).max() <= 1


@with_extra
def test_a_process_without_torch(folder, tiny_checkpoint, tmp_path):
    options = ["--prompt", "five", "--n_samples", "2", "--strip", "--outdir"]
    code = f"""
import sys
from ldm.commands.txt2img import main
main({["--ckpt", str(folder), *options, str(tmp_path / "onnx")]})
assert not {{"torch", "scipy", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    txt2img(["--ckpt", str(tiny_checkpoint), "--device", "cpu", *options, str(tmp_path / "torch")])
    names = ["samples/00000.png", "samples/00001.png", "grid-0000.png", "strip-0000.png", "strip-0001.png"]
    for name in names:
        found, expected = (levels(tmp_path / kind / name).astype(int) for kind in ("onnx", "torch"))
        assert abs(found - expected).max() <= 1, name
    made, again = tmp_path / "onnx" / names[1], tmp_path / "again"
    txt2img(["--ckpt", str(folder), "--from-png", str(made), "--outdir", str(again)])
    assert (levels(again / names[0]) == levels(made)).all()


@with_extra
def test_the_folder(folder):
    """All in it that a program in another language needs is plain JSON."""
    index = json.loads((folder / "model.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"model.json", *(f"{name}.onnx" for name in NETWORKS)}
    assert len(index["alphas_cumprod"]) == 1000 and index["prediction"] == "v" and index["multiple"] == 8
    assert index["tokenizer"]["merges"] == ["f i", "v e</w>"] and index["defaults"]["steps"] == 4
    assert set(index["differences"]) == NETWORKS and max(index["differences"].values()) < 1e-5


@with_extra
def test_the_second_output_is_the_attention_of_the_maps(folder, tiny_checkpoint):
    """Their mean over steps, summed over a word's tokens, is what `attention_maps` collects; images are as before."""
    prompts, model = ["a (five:1.4) [six]", "five " * 40], ldm.load(tiny_checkpoint, device="cpu")
    for prompt in prompts:
        with attention_maps(model, [prompt], parts=100) as maps:
            model.generate([prompt], seed=3, steps=7)
        onnx, seen = ldm.load(folder), []
        unet = onnx.unet
        onnx.unet = lambda unet=unet, seen=seen, **given: seen.append(unet(**given)) or seen[-1]
        onnx.generate([prompt], seed=3, steps=7)
        found = np.mean([outputs["attention"][-1] for outputs in seen], axis=0)  # of the conditional half
        (words,) = maps.words
        assert len(seen) == 7 and found.shape[0] == words.size
        for word in words.texts:
            expected = maps.of(word).numpy()
            np.testing.assert_allclose(found[words.places(word)].sum(0), expected, atol=1e-5)


@torch.no_grad()
def test_attention_of_layers_of_two_sizes():
    params = TINY["unet_config"]["params"] | {"attention_resolutions": [1, 2]}
    model = randomised(LatentDiffusion(**TINY | {"unet_config": TINY["unet_config"] | {"params": params}})).eval()
    given = {"x": torch.randn(1, 4, 6, 8), "t": torch.tensor([500.0])} | model.condition(["five ab"])
    with attention_maps(model, ["five ab"]) as maps:
        output = model.model(**given)
    assert {total.shape[2:] for total, _ in maps.sums.values()} == {(6, 8), (3, 4)}
    found = WithAttention(model)(**given)
    torch.testing.assert_close(found[0], output, atol=1e-5, rtol=1e-4)
    for word in ("five", "ab"):
        torch.testing.assert_close(found[1][0, maps.words[0].places(word)].sum(0), maps.of(word))


@with_extra
def test_the_files_name_no_folder_of_this_machine(folder):
    here = str(Path(ldm.__file__).parent).encode()
    assert not [path.name for path in folder.glob("*.onnx") if here in path.read_bytes()]


@with_extra
def test_options_that_need_the_checkpoint(folder, tmp_path):
    model = ldm.load(folder, device="cpu", dtype="fp32")
    assert isinstance(model, OnnxModel)
    refused("clip_skip 2 needs the checkpoint", model.generate, ["5"], clip_skip=2)
    refused(
        "this needs the checkpoint: an ONNX model, which only generates images, has no encode", lambda: model.encode
    )
    refused("image needs the checkpoint", model.generate, ["5"], image=pixels(model.generate(["5"])))
    refused("height 21 cannot be made by this model: use a positive multiple of 8", model.generate, ["5"], height=21)
    refused("prediction eps needs the checkpoint: .* is an ONNX model", ldm.load, folder, prediction="eps")
    refused("dtype fp16 needs the checkpoint", ldm.load, folder, dtype="fp16")
    for options, said in [
        (["--lora", "x"], "lora .* needs the checkpoint"),
        (["--precision", "bf16"], "precision bf16 needs the checkpoint"),
        (["--device", "cuda"], "device cuda needs the checkpoint"),
        (["--pag", "2"], "pag 2.0 needs the checkpoint"),
        (["--no-optimize"], "no-optimize True needs the checkpoint"),
    ]:
        refused(said, txt2img, ["--ckpt", str(folder), "--outdir", str(tmp_path), *options])


@with_extra
def test_damaged_folders(folder, tmp_path):
    def damaged(name: str, content: bytes) -> str:
        path = tmp_path / name
        shutil.copytree(folder, path)
        (path / name).write_bytes(content)
        return str(path)

    index = json.loads((folder / "model.json").read_text())
    for name, change in {
        "schedule": {"alphas_cumprod": [0.5, 0.9]},
        "overflow": {"alphas_cumprod": [10**400]},
        "no prediction": {"prediction": "y"},
        "no pixels": {"downsampling": 0},
    }.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model.json").write_text(json.dumps(index | change))
        refused(f"{name}/model.json' is damaged", ldm.load, tmp_path / name)
    (tmp_path / "schedule" / "model.json").write_text(json.dumps(index | {"channels": 3}))
    refused("unet.onnx' cannot be computed: .* invalid dimensions", ldm.load(tmp_path / "schedule").generate, ["5"])
    refused("model.json' is damaged", ldm.load, damaged("model.json", b"{"))
    refused("unet.onnx' is not a network that onnxruntime reads", ldm.load, damaged("unet.onnx", b"no"))


def test_without_the_extra(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    said = "format 'onnx' needs onnx, onnxscript, onnxruntime, which the extra onnx installs"
    refused(said, write_onnx, tiny_model, tmp_path / "x")
    monkeypatch.setattr("ldm.onnx.model.find_spec", lambda name: None)
    (tmp_path / "model.json").write_text("{}")
    refused("needs the package onnxruntime: pip install", ldm.load, tmp_path)


def test_what_cannot_be_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name)  # as if the extra were installed
    refused("'onnx' has weights in float32 or float16, not in bfloat16", ldm.save, tiny_model, tmp_path, "bf16", "onnx")
    (tmp_path / "file").write_text("mine")
    refused("is not an empty folder", write_onnx, tiny_model, tmp_path)
    classes = {"target": "ldm.conditioning.classes.ClassEmbedder", "params": {"embed_dim": 32, "n_classes": 3}}
    unet = TINY["unet_config"] | {"params": TINY["unet_config"]["params"] | {"num_classes": None, "in_channels": 9}}
    refused(
        "conditioned on texts by CLIP's encoder, or on nothing: this one has a ClassEmbedder",
        *(write_onnx, LatentDiffusion(**TINY | {"cond_stage_config": classes, "unet_config": unet}), tmp_path / "x"),
    )
    masks = LatentDiffusion(**TINY | {"unet_config": unet, "concat": "latents_mask"})
    refused("this one takes an init image beside the noise", write_onnx, masks, tmp_path / "x")
    refused("computes in float32", write_onnx, LatentDiffusion(**TINY).half(), tmp_path / "x")


def test_a_network_that_differs_is_not_written(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: name)
    for name, value in (("_export", None), ("Network", None), ("_difference", float("nan"))):
        monkeypatch.setattr(export, name, lambda *given, value=value: value)
    said = "the network text would differ from torch's by nan: nothing is written"
    refused(said, write_onnx, tiny_model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@with_extra
@pytest.mark.full
@pytest.mark.parametrize("kind", [SD1, SD2, "pixels", "digits", "digits-fast", "emoji"], ids=str)
def test_other_models(kind, tmp_path):
    if kind == "pixels":
        unet = TINY["unet_config"]["params"] | {"in_channels": 1, "out_channels": 1, "num_classes": None}
        unet |= {"use_spatial_transformer": False, "context_dim": None, "adm_in_channels": None}
        config = TINY["unet_config"] | {"params": unet}
        model = PixelDiffusion(config, 1, defaults={"height": 16, "width": 16, "steps": 4, "scale": 1})
    else:
        model = ldm.load(kind, device="cpu") if isinstance(kind, str) else LatentDiffusion(**kind)
    model = model.eval() if isinstance(kind, str) and kind != "pixels" else randomised(model).eval()
    assert len(ldm.save(model, tmp_path / "onnx", format="onnx")) == (3 if kind == "pixels" else 4)
    prompts = ["", ""] if kind == "pixels" else ["a photo of a cat", "five"]
    check_same_images(ldm.load(tmp_path / "onnx"), model, prompts, steps=4)
