"""Folders of diffusers: ours generate there what they generate here, theirs here what they generate there, and back.

Both sides compute in float32 with different kernels; outputs are of order 1, so 1e-5 is a hundred roundings.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, refused
from PIL import Image
from safetensors import safe_open
from tiny_stable_diffusion import KINDS, MERGES, PROMPTS, SD1, SD2, TEXT, VAE, built, changed, edit, model_config

import ldm
from ldm.checkpoint.diffusers_config import read_vae
from ldm.checkpoint.diffusers_folder import read_pipeline
from ldm.checkpoint.diffusers_text_writer import write_tokenizer
from ldm.checkpoint.diffusers_writer import WRITTEN, write_pipeline
from ldm.commands.train import main as train
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.schedule import sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.diffusion import DiffusionStage

ROOT = Path(__file__).parents[1]

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: randomised(LatentDiffusion(**params)).eval().requires_grad_(False) for name, params in KINDS.items()}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The models as we write them. Tests that change one copy it first."""
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp("ours") / name
        write_pipeline(found[name], model_config(model.config), model.state_dict())
    return found


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    return shutil.copytree(folders["sd1"], tmp_path / "sd1")


def pipeline(folder: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders that diffusers writes of networks that it built itself."""
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    found = {}
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    for kind in KINDS:
        second = kind == "sd2"
        root = tmp_path_factory.mktemp("theirs")
        write_tokenizer(root / "tokenizer", MERGES, pad=0 if second else 513 + len(MERGES), context_length=24)
        vae = AutoencoderKL(
            **{"block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3},
            **{"up_block_types": ("UpDecoderBlock2D",) * 3, "norm_num_groups": 4, "sample_size": 32},
        )
        unet = UNet2DConditionModel(
            **{"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8},
            **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32},
            **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "use_linear_projection": second},
            attention_head_dim=(2, 4) if second else 4,
        )
        text = CLIPTextConfig(
            **{"vocab_size": 514 + len(MERGES), "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "max_position_embeddings": 24, "bos_token_id": 512 + len(MERGES)},
            **{"eos_token_id": 513 + len(MERGES), "pad_token_id": 0, "hidden_act": "gelu" if second else "quick_gelu"},
        )
        kinds = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}
        scheduler = DDIMScheduler(**schedule, **kinds) if second else PNDMScheduler(**schedule, skip_prk_steps=True)
        pipe = StableDiffusionPipeline(
            **{"vae": vae, "unet": unet, "text_encoder": randomised(CLIPTextModel(text)), "scheduler": scheduler},
            tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
            **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        )
        for module in (vae, unet):
            randomised(module.eval())
        pipe.save_pretrained(root / kind)
        found[kind] = (pipe, root / kind)
    return found


@torch.no_grad()
def assert_same_numbers(model: LatentDiffusion, pipe) -> None:
    """Each network, and an image of four DDIM steps with guidance."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([7, 801])
    pixels = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    cond = model.condition(PROMPTS)
    assert all(not p.detach().eq(0).all() for p in model.model.parameters())  # no branch is off

    tokens = pipe.tokenizer(PROMPTS, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], model.cond_stage_model.tokenizer(PROMPTS))
    context = pipe.text_encoder(tokens["input_ids"])[0]
    torch.testing.assert_close(cond["c_crossattn"], context, **CLOSE)
    torch.testing.assert_close(model.apply_model(x, t, cond), pipe.unet(x, t, context).sample, **CLOSE)
    posterior, expected = model.first_stage_model.encode(pixels), pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.mode(), expected.mode(), **CLOSE)
    torch.testing.assert_close(posterior.std, expected.std, **CLOSE)
    assert model.scale_factor == pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert decoded.std() > 0.1
    torch.testing.assert_close(model.decode(x), decoded, **CLOSE)

    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS, negative_prompt=[""] * 2, num_inference_steps=4, guidance_scale=3.0, latents=x, output_type="np"
    )
    sigmas = sampling_sigmas(model.schedule, 4, model.defaults["spacing"], model.defaults["final_sigma"])
    denoise = classifier_free(model.denoiser(), cond, model.condition([""] * 2), 3.0)
    *_, step = get_sampler("ddim")(denoise, x * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
    latents = step.x / (1 + sigmas[-1] ** 2).sqrt().float()
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert 0.02 < ours.std() and ours.gt(0).logical_and(ours.lt(1)).float().mean() > 0.5
    np.testing.assert_allclose(ours.numpy(), theirs.images, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_generates_what_we_generate(models, folders, kind):
    files = {p.relative_to(folders[kind]).as_posix() for p in folders[kind].rglob("*") if p.is_file()}
    # versions of transformers write one of these, whatever else they write
    some = {"tokenizer/special_tokens_map.json", "tokenizer/tokenizer.json"}
    missing = {name for name in WRITTEN - files if "_2/" not in name}  # that is in Stable Diffusion XL alone
    assert missing <= some and files < WRITTEN
    with safe_open(folders[kind] / "text_encoder/model.safetensors", "pt") as file:  # as every version reads them
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - not a dict
    pipe = pipeline(folders[kind])
    assert pipe.scheduler.config.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[kind]
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 32
    assert_same_numbers(models[kind], pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_diffusers_to_ours_is_exact(models, folders, kind):
    model = models[kind]
    config, state, notes, *_ = read_pipeline(folders[kind])
    again = built(config, state)
    unused = re.compile(r"cond_stage_model\.model\.(text_projection|logit_scale|transformer\.resblocks\.2\..*)")
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    different = {name for name, tensor in state.items() if not torch.equal(tensor, expected[name])}
    assert all(unused.fullmatch(name) for name in different) and bool(different) == (kind == "sd2")
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), model.condition(PROMPTS)
    assert torch.equal(again.condition(PROMPTS)["c_crossattn"], cond["c_crossattn"])
    assert torch.equal(again.apply_model(x, t, cond), model.apply_model(x, t, cond))
    assert torch.equal(again.decode(x), model.decode(x))
    for key in ("schedule", "prediction", "scale_factor", "concat", "cond_stage_config"):
        assert again.config[key] == model.config[key], key
    assert again.defaults == model.defaults
    assert any(f"predicts {model.prediction} (its scheduler says so)" in note for note in notes)
    # and once more: the same folder, byte for byte
    write_pipeline(folders[kind].with_name("again"), config, state)
    for file in (file for file in folders[kind].rglob("*") if file.is_file()):
        assert (folders[kind].with_name("again") / file.relative_to(folders[kind])).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_we_generate_what_diffusers_generates(theirs, kind):
    from diffusers import DDIMScheduler

    pipe, folder = theirs[kind]
    config, state, notes, *_ = read_pipeline(folder)
    model = built(config, state)
    assert model.prediction == {"sd1": "eps", "sd2": "v"}[kind]
    assert model.schedule_params == {"name": "scaled_linear", "T": 1000, "start": 0.00085, "end": 0.012}
    sampler = model.defaults.pop("sampler")
    assert sampler in {"sd1": ("plms", "ddim"), "sd2": ("ddim",)}[kind]
    sizes = {"height": 32, "width": 32, "steps": 50, "scale": 7.5, "spacing": "leading", "interval": None}
    assert model.defaults == sizes | {"final_sigma": "sigma_min"}
    assert model.cond_stage_model.tokenizer.merges == tuple(MERGES)
    if kind == "sd1":
        settings = {"set_alpha_to_one": False, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    assert_same_numbers(model, pipe)


def test_where_sampling_ends_goes_through_files_and_folders(theirs, tmp_path):
    """A scheduler with set_alpha_to_one false, in Stable Diffusion 1 and 2: folder -> file -> folder."""
    pipe, folder = theirs["sd2"]
    pipe.set_progress_bar_config(disable=True)
    ldm.save(ldm.load(folder, device="cpu"), tmp_path / "one.safetensors")
    model = ldm.load(tmp_path / "one.safetensors", device="cpu")
    notes = ldm.save(model, tmp_path / "again", format="diffusers")
    assert not pipeline(tmp_path / "again").scheduler.config.set_alpha_to_one and "final" not in str(notes)
    start = SeededNoise([0, 1], (4, 8, 8))()
    images = pipe(PROMPTS, num_inference_steps=4, guidance_scale=3.0, latents=start, output_type="np").images
    options = {"negative": "", "steps": 4, "scale": 3.0, "plain": True}
    ours, other = (model.generate(PROMPTS, **options, **own) for own in ({}, {"final_sigma": "zero"}))
    far, near = (np.abs(np.stack(made) / 255.0 - images).max() * 255 for made in (other, ours))
    assert near < 0.6 < 1.5 < far


@pytest.mark.parametrize(
    ("how", "variant", "files"),
    [
        ({"safe_serialization": False}, None, {"unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"}),
        ({"variant": "fp16"}, "fp16", {"unet/diffusion_pytorch_model.fp16.safetensors"}),
        ({"variant": "fp16"}, None, {"vae/diffusion_pytorch_model.fp16.safetensors"}),
        ({"max_shard_size": "200KB"}, None, {"unet/diffusion_pytorch_model.safetensors.index.json"}),
        (
            {"max_shard_size": "200KB", "variant": "fp16"},
            "fp16",
            {"unet/diffusion_pytorch_model.safetensors.index.fp16.json"},
        ),
    ],
    ids=["bin", "variant", "only variant", "shards", "shards of a variant"],
)
def test_every_form_of_the_weights(theirs, tmp_path, how, variant, files):
    pipe, folder = theirs["sd1"]
    expected = read_pipeline(folder)[1]
    shutil.copytree(folder, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipe, part).save_pretrained(tmp_path / "x" / part, **how)
    found = {file.relative_to(tmp_path / "x").as_posix() for file in (tmp_path / "x").rglob("*")}
    if "safe_serialization" in how:  # transformers 5 writes safetensors whatever it is asked
        (tmp_path / "x/text_encoder/model.safetensors").unlink(missing_ok=True)
        torch.save(pipe.text_encoder.state_dict(), tmp_path / "x/text_encoder/pytorch_model.bin")
        files = files - {"text_encoder/pytorch_model.bin"}
    assert files <= found
    _, state, notes, *_ = read_pipeline(tmp_path / "x", variant)
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert any("'fp16'" in note for note in notes) == ("variant" in how)


def test_a_missing_weight_is_left_for_the_network_to_list(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["down_blocks.1.resnets.0.norm1.weight"]
    save_file(weights, file)
    config, state, *_ = read_pipeline(folder)
    names = LatentDiffusion(**config["params"]).state_dict().keys()
    assert names - state.keys() == {"model.diffusion_model.input_blocks.3.0.in_layers.0.weight"}
    assert not state.keys() - names


def test_what_is_assumed_is_said(folder):
    def without(file, *keys):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))

    without("scheduler/scheduler_config.json", "prediction_type", "timestep_spacing")
    without("vae/config.json", "scaling_factor")
    edit(folder / "unet/config.json", _diffusers_version="0.6.0", sample_size=32)
    config, _, notes, *_ = read_pipeline(folder)
    assert config["params"]["defaults"]["height"] == 64 * 4
    for said in ("predicts eps (assumed", "scale factor 0.18215 is assumed", "sample_size 32 is taken for 64"):
        assert sum(said in note for note in notes) == 1, (said, notes)
    without("unet/config.json", "sample_size")
    config, _, notes, *_ = read_pipeline(folder)
    assert config["params"]["defaults"]["height"] == 64 * 4 and any("size of images is assumed" in n for n in notes)
    edit(folder / "unet/config.json", sample_size=[8, 16])
    defaults = read_pipeline(folder)[0]["params"]["defaults"]
    assert (defaults["height"], defaults["width"]) == (32, 64)


@pytest.mark.parametrize(
    ("concat", "channels", "pipeline"),
    [("mask_latents", 9, "StableDiffusionInpaintPipeline"), ("latents", 8, "StableDiffusionInstructPix2PixPipeline")],
)
def test_models_that_change_images(tmp_path, concat, channels, pipeline):
    import diffusers

    params = changed(SD1, "unet", in_channels=channels) | {"concat": concat}
    model = LatentDiffusion(**params)
    write_pipeline(tmp_path / "x", model_config(model.config), model.state_dict())
    pipe = getattr(diffusers, pipeline).from_pretrained(tmp_path / "x", local_files_only=True)
    assert pipe.unet.config.in_channels == channels
    config, state, notes, *_ = read_pipeline(tmp_path / "x")
    assert config["params"]["concat"] == concat and pipeline in notes[0]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items()) and len(state) == len(expected)


def test_inpainting_agrees_under_a_partial_mask(tmp_path, monkeypatch):
    """At strength 1 both start from noise alone, kept parts too: the network has these in its input."""
    import diffusers

    torch.manual_seed(0)
    params = changed(SD1, "unet", in_channels=9) | {"concat": "mask_latents"}
    model = randomised(LatentDiffusion(**params)).eval().requires_grad_(False)
    write_pipeline(tmp_path / "x", model_config(model.config), model.state_dict())
    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "x", local_files_only=True)

    def encode(image, generator):  # theirs samples the posterior
        return pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor

    monkeypatch.setattr(pipe, "_encode_vae_image", encode)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image, mask = Image.fromarray(levels), Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 32, 20))
    images = {"image": image, "mask_image": mask, "output_type": "np"}
    steps = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 1.0, "height": 32, "width": 32}
    theirs = pipe(PROMPTS[0], latents=SeededNoise([5], (4, 8, 8))(), **images, **steps).images[0]
    (ours,) = model.generate(PROMPTS[:1], seed=5, image=image, mask=mask, steps=4, scale=3.0, strength=1.0)
    difference = np.abs(np.asarray(ours) - 255 * theirs)[np.asarray(mask) > 0]
    assert difference.max() <= 0.6 and np.ptp(theirs) > 0.2  # half a level is rounding


def test_nothing_is_lost(models, tmp_path, monkeypatch):
    model, path = models["sd1"], tmp_path / "a" / "out"
    config, state = model_config(model.config), model.state_dict()
    path.mkdir(parents=True)
    write_pipeline(path, config, state)  # an empty folder is filled
    before = (path / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    inodes = (path / "vae").stat().st_ino
    write_pipeline(f"{path}/", config, state)  # our own is replaced
    assert (path / "vae").stat().st_ino != inodes and os.listdir(path.parent) == ["out"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.AutoencoderKL.save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            write_pipeline(path, config, {name: 0 * tensor for name, tensor in state.items()})
    assert os.listdir(path.parent) == ["out"]
    assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before

    (path / "README.md").write_text("mine")
    refused("already holds README.md, which would be lost", write_pipeline, path, config, state)
    (path / "README.md").unlink()
    index = json.loads((path / "model_index.json").read_text())
    del index["_written_by"]  # as when diffusers has saved it again
    (path / "model_index.json").write_text(json.dumps(index))
    refused("already holds .*model_index.json.*would be lost", write_pipeline, path, config, state)
    with pytest.raises(ValueError, match="README' is a file"):
        (tmp_path / "README").write_text("mine")
        write_pipeline(tmp_path / "README", config, state)


def test_writing_over_the_folder_it_was_read_from(folder):
    config, state, *_ = read_pipeline(folder)
    before = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    write_pipeline(folder, config, state)
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_half_precision(models, tmp_path):
    model = models["sd2"]
    write_pipeline(tmp_path / "x", model_config(model.config), model.state_dict(), torch.float16)
    _, state, *_ = read_pipeline(tmp_path / "x")
    expected = model.state_dict()
    name = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert torch.equal(state[name], expected[name].half())
    pipe = pipeline(tmp_path / "x")
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


@pytest.mark.parametrize("pad", ["eos", 5])
def test_another_pad_token_is_kept(tmp_path, pad):
    params = changed(SD2, "cond_stage", tokenizer={"merges": MERGES, "pad": pad})
    model = LatentDiffusion(**params)
    write_pipeline(tmp_path / "x", model_config(model.config), model.state_dict())
    assert read_pipeline(tmp_path / "x")[0]["params"]["cond_stage_config"] == params["cond_stage_config"]


def test_the_full_vocabulary_does_not_travel_in_the_configuration(models, tmp_path):
    text = {key: value for key, value in TEXT.items() if key != "tokenizer"} | {"vocab_size": 49408}
    params = SD1 | {"cond_stage_config": SD1["cond_stage_config"] | {"params": text}}
    model = LatentDiffusion(**params)
    write_pipeline(tmp_path / "x", model_config(model.config), model.state_dict())
    config, *_ = read_pipeline(tmp_path / "x")
    assert config["params"]["cond_stage_config"]["params"] == text
    assert json.loads((tmp_path / "x/vae/config.json").read_text())["sample_size"] == 32
    assert read_vae(json.loads((tmp_path / "x/vae/config.json").read_text()))[0] == VAE


STAGES = {
    "autoencoder": ["stage.params.ddconfig.ch=8", "stage.params.ddconfig.norm_groups=4"],
    "clip": [
        "stage.params.width=32",
        "stage.params.heads=2",
        "stage.params.layers=2",
        "stage.params.merges_first=0",
        "stage.params.pooled=false",
    ],
    "diffusion": [
        "stage.params.preview_prompts=['']",
        "stage.params.unet_config.params.context_dim=32",
        "stage.params.pooled=false",
    ],
}


def test_what_the_three_stages_train_for_diffusers_is_sampled_there(tmp_path):
    """`pooled=false` in the last two stages leaves out the pooled text, which diffusers does not have."""
    (tmp_path / "images").mkdir()
    for i, prompt in enumerate(PROMPTS):
        Image.effect_noise((32, 32), 90 + i).convert("RGB").save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(prompt)
    configs = [f"{ROOT}/configs/folder/{stage}.yaml" for stage in STAGES]
    both = ["data.params.size=32", "loop.steps=1", "loop.batch_size=2"]
    both += [f"data.params.root={tmp_path}/images", f"outdir={tmp_path}", "clip.stage.params.context_length=24"]
    own = [f"{stage}.{change}" for stage, changes in STAGES.items() for change in changes]
    train([*configs, *both, *own])
    model = randomised(ldm.load(tmp_path / "diffusion/model.safetensors", device="cpu"))
    model.defaults["spacing"] = "trailing"
    ldm.save(model, tmp_path / "folder", format="diffusers")
    assert_same_numbers(model, pipeline(tmp_path / "folder"))
    unet = model.config["unet_config"]
    pooled = {**unet, "params": unet["params"] | {"num_classes": "sequential", "adm_in_channels": 128}}
    parts = [tmp_path / stage / "model.safetensors" for stage in ("autoencoder", "clip")]
    refused("differ about pooled text", DiffusionStage, pooled, *parts, learning_rate=1e-3, schedule={"name": "cosine"})
