"""`ldm.load` on files of latent diffusion's models before Stable Diffusion: tiny ones of each family."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import randomised, refused
from meta_models import DDCONFIG, TINY_1, levels
from script_runs import load_script, runner, samples
from script_runs import pixels as script_pixels

import ldm
from ldm.checkpoint import networks as nets
from ldm.checkpoint.compvis import single_file
from ldm.latent_diffusion import LatentDiffusion

load = partial(ldm.load, device="cpu")

KL = TINY_1["params"]["first_stage_config"]
VQ_F2 = {
    "target": nets.VQ_TARGET,
    "params": {"embed_dim": 3, "n_embed": 64, "ddconfig": DDCONFIG | {"z_channels": 3, "double_z": False}},
}
CROSS = {"use_spatial_transformer": True, "context_dim": 16, "transformer_depth": 1}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
VOCAB = WORDS + [f"[unused{i}]" for i in range(30522 - len(WORDS))]


def unet(in_channels: int, out_channels: int, **options) -> dict:
    sizes = {"image_size": 16, "in_channels": in_channels, "out_channels": out_channels, "model_channels": 32}
    return {"target": nets.UNET_TARGET, "params": sizes | levels([1, 2], 1, [2, 1]) | options}


def bert(vocab_size: int, tokens: int) -> dict:
    params = {"n_embed": 16, "n_layer": 2, "vocab_size": vocab_size, "max_seq_len": tokens}
    return {"target": nets.BERT_TARGET, "params": params}


def random_ids(below: int, tokens: int) -> torch.Tensor:
    return torch.randint(below, (2, tokens), generator=torch.Generator().manual_seed(1))


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


# title -> UNet, first stage, conditioner, concat, and the conditions of two images
FAMILIES = {
    "LDM text-to-image (1.45B)": (unet(4, 4, num_heads=8, legacy=False, **CROSS), KL, bert(30522, 77), None,
                                  random_ids(30522, 77)),
    "LDM layout-to-image": (unet(3, 3, num_head_channels=32, **CROSS), VQ_F2, bert(8192, 92), None,
                            random_ids(8192, 92)),
    "LDM class-conditional (ImageNet)": (unet(3, 3, num_heads=1, **CROSS), VQ_F2,
                                         {"target": nets.CLASSES_TARGET, "params": {"embed_dim": 16, "n_classes": 11}},
                                         None, [3, "7"]),
    "LDM unconditional (VQ)": (unet(3, 3, num_head_channels=32), VQ_F2, None, None, ["", ""]),
    "LDM unconditional (KL)": (unet(4, 4, num_heads=8), KL, None, None, ["", ""]),
    "LDM inpainting": (unet(7, 3, num_heads=8), VQ_F2, None, "latents_mask", ["", ""]),
    "LDM semantic synthesis": (unet(6, 3, num_heads=8), VQ_F2,
                               {"target": nets.RESCALER_TARGET, "params": {"in_channels": 182, "out_channels": 3}},
                               None, random_images(182, 32, 32)),
    "LDM super-resolution (x4)": (unet(6, 3, num_head_channels=32), VQ_F2,
                                  {"target": nets.IMAGE_TARGET, "params": {}}, None, random_images(3, 16, 16)),
}  # fmt: skip
IMAGES = "conditioned on images"
REFUSED = {  # by scripts, which give words and numbers
    "LDM text-to-image (1.45B)": "prompt '7' cannot be read: .* give BERT's vocab.txt",
    "LDM layout-to-image": "its 8192 tokens are not BERT's 30522: give token ids",
    "LDM semantic synthesis": IMAGES,
    "LDM super-resolution (x4)": IMAGES,
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> tuple:
    """(title, model, its file as CompVis's code would write it, what to condition on)"""
    networks, first_stage, conditioner, concat, given = FAMILIES[request.param]
    torch.manual_seed(0)
    model = LatentDiffusion(
        unet_config=networks,
        first_stage_config=first_stage,
        cond_stage_config=conditioner,
        concat=concat,
        schedule=TINY_1["params"]["schedule"],
        scale_factor=0.18215 if first_stage is KL else 1.0,
    )
    model = randomised(model).eval().requires_grad_(False)
    state, _ = single_file(model.state_dict(), {"target": nets.MODEL_TARGET, "params": model.config})
    path = tmp_path_factory.mktemp("ldm") / "model.ckpt"
    torch.save({"state_dict": state, "global_step": 5}, path)
    return request.param, model, path, given


def pixels(model, given) -> np.ndarray:
    return np.stack(model.generate(given, steps=2, scale=1, height=32, width=32))


@pytest.mark.smoke
def test_each_family_is_recognised_and_generates_the_same(family):
    title, model, path, given = family
    loaded = load(path)
    assert loaded.notes[0].startswith(f"recognised {title}: ")
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    generated = pixels(loaded, given)
    assert np.array_equal(generated, pixels(model, given)) and generated.std() > 5  # levels of 255


def test_scripts_generate_with_each_or_say_what_it_needs(family, tmp_path):
    title, model, path, given = family
    generate = runner(load_script("txt2img"), path, tmp_path)
    options = ["--H", 32, "--W", 32, "--scale", 1, "--prompt", "7"]
    message = REFUSED.get(title)
    if message is not None:
        refused(message, generate, *options)
        return
    if model.cond_stage_model is None:
        refused("unconditional and takes no prompt", generate, *options)
        options = options[:-2]
    (generated,) = samples(generate(*options, steps=2))
    expected = model.generate(["7"] if given == [3, "7"] else [""], steps=2, scale=1, height=32, width=32)
    assert np.array_equal(script_pixels(generated), np.asarray(expected[0]))


def test_words_by_a_vocabulary_are_its_ids(family, tmp_path):
    title, model, path, _ = family
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(VOCAB) + "\n")
    if "text-to-image" not in title:
        message = "does not fit|tokens and the model 8192" if "layout" in title else "is not needed"
        refused(message, load, path, vocab=vocab)
        return
    loaded = load(path, vocab=vocab)
    ids = torch.tensor([[2, 5, 6, 3, *73 * [0]]])
    assert np.array_equal(pixels(loaded, ["a Cat"]), pixels(model, ids))
    ldm.save(loaded, tmp_path / "own.safetensors")  # the words travel
    assert np.array_equal(pixels(load(tmp_path / "own.safetensors"), ["a Cat"]), pixels(model, ids))


def test_a_null_condition_set_by_hand_is_not_lost(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model)
    for null in ("a blur", torch.zeros(2), None):
        model.cond_stage_model.null = null
        refused("null condition .* was set by hand", ldm.save, model, tmp_path / "x.safetensors")
    model.cond_stage_model.null = ""
    ldm.save(model, tmp_path / "x.safetensors")
