"""Stable Diffusion XL samples what diffusers samples, at a tiny size, from a folder and from a single file.

Both sides compute in float32; outputs are of order 1.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, refused
from safetensors.torch import load_file, save_file
from tiny_sdxl import CLOSE, PROMPTS, SCALE, SIZE, SIZES, STEPS, build_pipeline, our_images, start, their_images
from tiny_stable_diffusion import edit

import ldm
from ldm.conditioning.sizes import Sizes
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.schedule import sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion

pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def model(theirs) -> LatentDiffusion:
    return ldm.load(theirs[1], device="cpu")


@pytest.fixture(scope="module")
def file(model, tmp_path_factory) -> Path:
    """A single file of the same weights, with the original names and no configuration."""
    path = tmp_path_factory.mktemp("file") / "xl.safetensors"
    ldm.save(model, path, format="compvis")
    save_file(load_file(path), path)  # without our header
    return path


@torch.no_grad()
def test_the_conditioning_and_the_unet(theirs, model):
    pipe, _ = theirs
    embeds, zeros, pooled, no_pooled = pipe.encode_prompt(PROMPTS)
    cond, null = model.condition(PROMPTS, sizes=SIZES), model.condition(["", ""], sizes=SIZES, negative=True)
    torch.testing.assert_close(cond["c_crossattn"], embeds, **CLOSE)
    torch.testing.assert_close(cond["c_adm"][:, :32], pooled, **CLOSE)
    assert torch.equal(null["c_crossattn"], zeros) and torch.equal(null["c_adm"][:, :32], no_pooled)
    assert torch.equal(null["c_adm"][:, 32:], cond["c_adm"][:, 32:])
    x, t = start(), torch.tensor([7, 801])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 48, 0, 0, 32, 48]] * 2)}
    expected = pipe.unet(x, t, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(model.apply_model(x, t, cond), expected, **CLOSE)
    other = pipe.unet(x, t, embeds, added_cond_kwargs=added | {"time_ids": added["time_ids"].flip(1)}).sample
    assert (other - expected).abs().max() > 100 * CLOSE["atol"]  # the sizes count


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_a_folder_samples_the_same(theirs, model, negative):
    images = their_images(theirs[0], negative_prompt=[negative] * 2 if negative else None)
    assert images.std() > 0.02
    np.testing.assert_allclose(our_images(model, negative), images, atol=1e-4)
    made = model.generate(PROMPTS, negative, steps=STEPS, scale=SCALE, **SIZE)
    assert np.abs(np.stack(made) / 255.0 - images).max() * 255 < 0.6
    assert model.defaults["sampler"] == "euler" and model.defaults["scale"] == 5.0
    assert (model.defaults["height"], model.scale_factor, model.prediction) == (32, 0.13025, "eps")


def test_a_crop_of_a_larger_image_samples_the_same(theirs, model):
    pipe, sizes = theirs[0], Sizes((64, 80), (8, 24), (32, 48))
    images = their_images(pipe, original_size=sizes.original_size, crops_coords_top_left=sizes.crop)
    np.testing.assert_allclose(our_images(model, sizes=sizes), images, atol=1e-4)
    made = model.generate(PROMPTS, steps=STEPS, scale=SCALE, original_size=(64, 80), crop=[8, 24], **SIZE)
    assert np.abs(np.stack(made) / 255.0 - images).max() * 255 < 0.6
    assert np.abs(np.stack(model.generate(PROMPTS, steps=STEPS, scale=SCALE, **SIZE)) / 255.0 - images).max() > 0.005
    refused("^aesthetic_score would have no effect: .* not Stable Diffusion XL's refiner", model.generate, PROMPTS,
        aesthetic_score=7)  # fmt: skip


def test_a_single_file_samples_the_same(theirs, model, file, tmp_path):
    names = load_file(file).keys()
    assert not any(name.startswith("cond_stage_model.") for name in names)
    ours = ldm.load(file, device="cpu")
    assert any("recognised Stable Diffusion XL" in note for note in ours.notes)
    assert ours.defaults["height"] == 256 and ours.scale_factor == 0.13025
    assert np.array_equal(our_images(ours), our_images(model))
    ldm.save(ours, tmp_path / "ours.safetensors")
    assert np.array_equal(our_images(ldm.load(tmp_path / "ours.safetensors", device="cpu")), our_images(model))


def test_diffusers_reads_the_single_file(theirs, file):
    """The judge of the original names."""
    from diffusers import StableDiffusionXLPipeline

    pipe, folder = theirs
    again = StableDiffusionXLPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(their_images(again), their_images(pipe), atol=1e-4)


def test_an_empty_prompt_is_encoded_where_the_folder_says_so(theirs, tmp_path):
    pipe, folder = theirs
    copy = shutil.copytree(folder, tmp_path / "xl")
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    model = ldm.load(copy, device="cpu")
    np.testing.assert_allclose(our_images(model), their_images(pipe, negative_prompt=["", ""]), atol=1e-4)


@pytest.fixture(scope="module")
def refiner(theirs, tmp_path_factory):
    """A pipeline of the refiner's kind from the other's parts, and the folder that it wrote."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

    pipe, root = theirs[0], tmp_path_factory.mktemp("refiner")
    torch.manual_seed(2)
    sizes = {"cross_attention_dim": 128, "projection_class_embeddings_input_dim": 32 + 5 * 256}
    found = StableDiffusionXLImg2ImgPipeline(
        **{"vae": pipe.vae, "text_encoder": None, "tokenizer": None, "scheduler": pipe.scheduler},
        **{"text_encoder_2": pipe.text_encoder_2, "tokenizer_2": pipe.tokenizer_2, "add_watermarker": False},
        unet=randomised(UNet2DConditionModel(**{**pipe.unet.config, **sizes}).eval()),
        **{"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    )
    found.set_progress_bar_config(disable=True)
    found.save_pretrained(root / "xl")
    return found, root / "xl"


@torch.no_grad()
def test_the_refiner_s_conditioning_and_unet(refiner, tmp_path):
    """From a folder and from a single file; the empty prompt is encoded, and the negative prompt has another score."""
    pipe, folder = refiner
    ours = ldm.load(folder, device="cpu")
    ldm.save(ours, tmp_path / "file.safetensors", format="compvis")
    save_file(load_file(tmp_path / "file.safetensors"), tmp_path / "file.safetensors")  # without our header
    embeds, null, pooled, null_pooled = pipe.encode_prompt(PROMPTS, negative_prompt=["", ""])
    ids, null_ids = pipe._get_add_time_ids(
        *((64, 80), (8, 24), (32, 48), 7.0, 2.5, (64, 80), (8, 24), (32, 48)),
        dtype=torch.float32,
        text_encoder_projection_dim=32,
    )
    x, t = start(), torch.tensor([7, 801])
    for model in (ours, ldm.load(tmp_path / "file.safetensors", device="cpu")):
        for texts, score, states, own, numbers in (
            (PROMPTS, 7.0, embeds, pooled, ids),
            (["", ""], 2.5, null, null_pooled, null_ids),
        ):
            cond = model.condition(texts, sizes=Sizes((64, 80), (8, 24), (32, 48), score))
            torch.testing.assert_close(cond["c_crossattn"], states, **CLOSE)
            added = {"text_embeds": own, "time_ids": numbers.expand(2, -1)}
            expected = pipe.unet(x, t, states, added_cond_kwargs=added).sample
            torch.testing.assert_close(model.apply_model(x, t, cond), expected, **CLOSE)


def test_generate_tells_the_refiner_scores(refiner):
    """The prompt's, and that of negative prompts."""
    model = ldm.load(refiner[1], device="cpu")
    seen = []
    model.generate(PROMPTS, steps=2, scale=SCALE, aesthetic_score=7.0, crop=(8, 24), callback=seen.append, **SIZE)
    cond = [
        model.condition(texts, sizes=Sizes((32, 48), (8, 24), (32, 48), score))
        for texts, score in ((PROMPTS, 7.0), (["", ""], 2.5))
    ]
    sigmas = sampling_sigmas(model.schedule, 2, "leading", "zero")
    with torch.no_grad():
        denoise = classifier_free(model.denoiser(), *cond, SCALE)
        *_, step = get_sampler("euler")(denoise, start() * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
    torch.testing.assert_close(torch.as_tensor(seen[-1].x), step.x, **CLOSE)


def test_an_inversion_has_the_image_s_sizes(model):
    """Not the model's own, 32 x 32."""
    from ldm.editing import invert_images

    image = model.generate(PROMPTS[:1], steps=STEPS, **SIZE)
    sizes: dict = {"own": {}, "given": {"original_size": (32, 48)}, "other": {"original_size": (32, 32)}}
    noise = {
        name: invert_images(model, image, PROMPTS[:1], steps=3, sampler="ddim", **own).noise
        for name, own in sizes.items()
    }
    assert torch.equal(noise["own"], noise["given"]) and not torch.equal(noise["own"], noise["other"])


def test_diffusers_reads_our_folder(theirs, model, refiner, tmp_path):
    """The judge of what is written; what is read of it again is what was written, to the bit."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    notes = ldm.save(model, tmp_path / "xl", format="diffusers")
    assert any("the folder's scheduler is DDIM; the model's own sampler is euler" in note for note in notes)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl", local_files_only=True)
    pipe.scheduler = theirs[0].scheduler
    pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(their_images(pipe), their_images(theirs[0]), atol=1e-5)
    own = ldm.load(refiner[1], device="cpu")
    ldm.save(own, tmp_path / "refiner", format="diffusers")
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "refiner", local_files_only=True)
    assert pipe.config.requires_aesthetics_score and not pipe.config.force_zeros_for_empty_prompt
    for path, before in ((tmp_path / "xl", model), (tmp_path / "refiner", own)):
        again, state = ldm.load(path, device="cpu"), before.state_dict()
        assert again.config["cond_stage_config"] == before.config["cond_stage_config"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    ldm.save(own, tmp_path / "xl", format="diffusers")  # in place of another that we wrote
    assert ldm.load(tmp_path / "xl", device="cpu").config["cond_stage_config"] == own.config["cond_stage_config"]


def test_what_is_not_supported_is_said(theirs, model, tmp_path):
    copy = shutil.copytree(theirs[1], tmp_path / "xl")
    edit(copy / "unet/config.json", projection_class_embeddings_input_dim=2560)
    refused("takes 2560 numbers .* has 32 of pooled text and 6 numbers of 256 each", ldm.load, copy)
