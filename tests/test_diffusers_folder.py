"""Folders of diffusers: ours draw there what they draw here, theirs here what they draw there, and back again exactly.

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
from conftest import randomised
from torch import Tensor

from ldm.checkpoint.diffusers_config import read_unet, read_vae
from ldm.checkpoint.diffusers_folder import WRITTEN, read_folder, write_folder
from ldm.checkpoint.diffusers_scheduler import read_scheduler, write_scheduler
from ldm.checkpoint.diffusers_text import CLIP_MERGES, read_tokenizer, vocabulary, write_tokenizer
from ldm.conditioning.tokenizer import Tokenizer, clip_merges, reduce
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.schedule import make_schedule, sampling_sigmas
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import instantiate_network

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = ["a photo of a cat", "An astronaut, riding a horse: 4K (don't blink)"]
MERGES = reduce(PROMPTS, merges_first=50)
UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 16,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 1],
    "channel_mult": [1, 2, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 32,
    "legacy": False,
    "norm_groups": 8,
}
VAE = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 8,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
        "norm_groups": 4,
    },
}
TEXT = {
    "layout": "transformers",
    "width": 32,
    "layers": 2,
    "heads": 2,
    "activation": "quick_gelu",
    "vocab_size": 514 + len(MERGES),
    "context_length": 24,
    "layer": "last",
    "tokenizer": {"merges": MERGES},
}
SD1 = {
    "unet_config": {"target": "ldm.models.unet.UNetModel", "params": UNET},
    "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": VAE},
    "cond_stage_config": {"target": "ldm.conditioning.text.TextEncoder", "params": TEXT},
    "schedule": {"name": "scaled_linear", "T": 1000, "start": 0.00085, "end": 0.012},
    "prediction": "eps",
    "scale_factor": 0.18215,
    "defaults": {"height": 32, "width": 32, "steps": 50, "scale": 7.5, "sampler": "ddim", "spacing": "leading"},
}
OPENCLIP = {"layout": "openclip", "layers": 3, "activation": "gelu", "layer": "penultimate"}
LINEAR = {"num_heads": -1, "num_head_channels": 8, "use_linear_in_transformer": True}
SD2 = SD1 | {
    "unet_config": {"target": "ldm.models.unet.UNetModel", "params": UNET | LINEAR},
    "cond_stage_config": {"target": "ldm.conditioning.text.TextEncoder", "params": TEXT | OPENCLIP},
    "prediction": "v",
}
KINDS = {"sd1": SD1, "sd2": SD2}


def changed(params: dict, part: str, **changes) -> dict:
    """LatentDiffusion's parameters with some of a part's changed."""
    config = params[f"{part}_config"]
    return params | {f"{part}_config": config | {"params": config["params"] | changes}}


def whole(params: dict) -> dict:
    return {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params}


def built(config: dict, state: dict[str, Tensor]) -> LatentDiffusion:
    model = instantiate_network(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


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
        write_folder(found[name], whole(model.config), model.state_dict())
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
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            norm_num_groups=8,
            cross_attention_dim=32,
            attention_head_dim=(2, 4) if second else 4,
            use_linear_projection=second,
        )
        text = CLIPTextConfig(
            vocab_size=514 + len(MERGES),
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=24,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=512 + len(MERGES),
            eos_token_id=513 + len(MERGES),
            pad_token_id=0,
        )
        kinds = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}
        scheduler = DDIMScheduler(**schedule, **kinds) if second else PNDMScheduler(**schedule, skip_prk_steps=True)
        pipe = StableDiffusionPipeline(
            vae=vae,
            unet=unet,
            text_encoder=randomised(CLIPTextModel(text)),
            tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for module in (vae, unet):
            randomised(module.eval())
        pipe.save_pretrained(root / kind)
        found[kind] = (pipe, root / kind)
    return found


@torch.no_grad()
def assert_same_numbers(model: LatentDiffusion, pipe) -> None:
    """Each network, and a picture of four DDIM steps with guidance."""
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
    drawn = pipe(
        PROMPTS, negative_prompt=[""] * 2, num_inference_steps=4, guidance_scale=3.0, latents=x, output_type="np"
    )
    spacing = model.defaults["spacing"]
    # set_alpha_to_one false is CompVis's last level
    sigmas = sampling_sigmas(model.schedule, 4, spacing, "sigma_min")
    denoise = classifier_free(model.denoiser(), cond, model.condition([""] * 2), 3.0)
    *_, step = get_sampler("ddim")(denoise, x * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
    latents = step.x / (1 + sigmas[-1] ** 2).sqrt().float()
    ours = (model.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert 0.02 < ours.std() and ours.gt(0).logical_and(ours.lt(1)).float().mean() > 0.5
    np.testing.assert_allclose(ours.numpy(), drawn.images, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_draws_what_we_draw(models, folders, kind):
    assert {p.relative_to(folders[kind]).as_posix() for p in folders[kind].rglob("*.*")} == WRITTEN
    pipe = pipeline(folders[kind])
    assert pipe.scheduler.config.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[kind]
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 32
    assert_same_numbers(models[kind], pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_diffusers_to_ours_is_exact(models, folders, kind):
    model = models[kind]
    config, state, notes = read_folder(folders[kind])
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
    write_folder(folders[kind].with_name("again"), config, state)
    for name in WRITTEN:
        assert (folders[kind].with_name("again") / name).read_bytes() == (folders[kind] / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_we_draw_what_diffusers_draws(theirs, kind):
    from diffusers import DDIMScheduler

    pipe, folder = theirs[kind]
    config, state, notes = read_folder(folder)
    model = built(config, state)
    assert model.prediction == {"sd1": "eps", "sd2": "v"}[kind]
    assert model.schedule_params == {"name": "scaled_linear", "T": 1000, "start": 0.00085, "end": 0.012}
    sampler = model.defaults.pop("sampler")
    assert sampler in {"sd1": ("plms", "ddim"), "sd2": ("ddim",)}[kind]
    sizes = {"height": 32, "width": 32, "steps": 50, "scale": 7.5, "spacing": "leading", "interval": None}
    assert model.defaults == sizes
    assert model.cond_stage_model.tokenizer.merges == tuple(MERGES)
    if kind == "sd1":
        settings = {"set_alpha_to_one": False, "clip_sample": False}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    assert_same_numbers(model, pipe)


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
    expected = read_folder(folder)[1]
    shutil.copytree(folder, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipe, part).save_pretrained(tmp_path / "x" / part, **how)
    found = {file.relative_to(tmp_path / "x").as_posix() for file in (tmp_path / "x").rglob("*")}
    if "safe_serialization" in how:  # transformers 5 writes safetensors whatever it is told
        (tmp_path / "x/text_encoder/model.safetensors").unlink()
        torch.save(pipe.text_encoder.state_dict(), tmp_path / "x/text_encoder/pytorch_model.bin")
        files = files - {"text_encoder/pytorch_model.bin"}
    assert files <= found
    _, state, notes = read_folder(tmp_path / "x", variant)
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert any("'fp16'" in note for note in notes) == ("variant" in how)


def test_a_missing_weight_is_left_for_the_network_to_list(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["down_blocks.1.resnets.0.norm1.weight"]
    save_file(weights, file)
    config, state, _ = read_folder(folder)
    names = LatentDiffusion(**config["params"]).state_dict().keys()
    assert names - state.keys() == {"model.diffusion_model.input_blocks.3.0.in_layers.0.weight"}
    assert not state.keys() - names


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model_index.json"):
        read_folder(folder / "unet")
    for pipeline in ("StableDiffusionXLPipeline", "FluxPipeline", "StableDiffusionControlNetPipeline"):
        edit(folder / "model_index.json", _class_name=pipeline)
        with pytest.raises(ValueError, match=f"holds a {pipeline}: only Stable Diffusion 1 and 2"):
            read_folder(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json' is damaged"):
        read_folder(folder)


def test_parts_that_are_missing_or_unknown(folder):
    index = json.loads((folder / "model_index.json").read_text())
    for name, entry, sentence in (
        ("controlnet", ["diffusers", "ControlNetModel"], "a part controlnet \\(ControlNetModel\\)"),
        (
            "text_encoder",
            ["transformers", "T5EncoderModel"],
            "a T5EncoderModel as its text_encoder: only CLIPTextModel",
        ),
        ("text_encoder", [None, None], "a None as its text_encoder"),
        ("vae", ["diffusers", "AutoencoderTiny"], "a AutoencoderTiny as its vae: only AutoencoderKL"),
    ):
        edit(folder / "model_index.json", **{name: entry})
        with pytest.raises(ValueError, match=sentence):
            read_folder(folder)
        (folder / "model_index.json").write_text(json.dumps(index))
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    read_folder(folder)  # its folder need not be there
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vae' holds no weights \\(diffusion_pytorch_model.safetensors or"):
        read_folder(folder)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match="lacks vae, scheduler: it needs unet, vae, text_encoder, tokenizer"):
        read_folder(folder)


def test_weights_that_are_damaged_or_not_there(theirs, folder, tmp_path):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.safetensors' is not a whole safetensors file"):
        read_folder(folder)
    file.unlink()
    theirs["sd1"][0].unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shard = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_folder(folder)
    shutil.rmtree(folder / "unet")
    shutil.copytree(theirs["sd1"][1] / "unet", folder / "unet")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="holds no weights of the variant 'bf16'"):
        read_folder(folder, variant="bf16")
    for variant in ("fp16", "non_ema"):
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    read_folder(folder)  # those without a variant come first
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="in the variants fp16, non_ema: name one"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, "UNet has class_embed_type 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 7}, "UNet has num_class_embeds 7"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "UNet has time_cond_proj_dim 256"),
        ("unet/config.json", {"something_new": "yes"}, "UNet has something_new 'yes'"),
        ("unet/config.json", {"norm_eps": 1e-6}, "UNet has norm_eps 1e-06"),
        ("unet/config.json", {"attention_head_dim": [2, 3, 4]}, r"attention_head_dim is \[2, 3, 4\] heads"),
        ("unet/config.json", {"cross_attention_dim": [32, 8, 32]}, "cross_attention_dim is"),
        ("unet/config.json", {"block_out_channels": [16, 24, 32]}, "each must be a multiple"),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}, "mirrored on the way up"),
        ("unet/config.json", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "SimpleCrossAttnDownBlock2D"),
        ("unet/config.json", {"in_channels": 5}, "takes 5 channels where latents have 4"),
        ("unet/config.json", {"in_channels": 8}, "takes 8 channels where latents have 4"),
        ("unet/config.json", {"block_out_channels": None}, "damaged configuration"),
        ("vae/config.json", {"shift_factor": 0.1}, "autoencoder has shift_factor 0.1"),
        ("vae/config.json", {"use_quant_conv": False}, "autoencoder has use_quant_conv False"),
        ("vae/config.json", {"latents_mean": [0.0]}, "autoencoder has latents_mean"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act 'relu': known is quick_gelu or gelu"),
        ("text_encoder/config.json", {"intermediate_size": 99}, "intermediate_size 99: known is 128"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "'flow_prediction': known are eps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ("tokenizer/special_tokens_map.json", {"pad_token": "zzz"}, None),
        ("tokenizer/tokenizer_config.json", {"pad_token": "zzz"}, "pad token 'zzz'"),
    ],
)
def test_what_our_networks_cannot_do_is_named(folder, file, changes, sentence):
    edit(folder / file, **changes)
    if sentence is None:
        read_folder(folder)
        return
    with pytest.raises(ValueError, match=f"folder '.*sd1'.*{sentence}"):
        read_folder(folder)


def test_another_kind_of_scheduler_is_refused(folder):
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(ValueError, match="the scheduler is a FlowMatchEulerDiscreteScheduler"):
        read_folder(folder)


def test_tokens_that_were_added_are_named(folder):
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": 514 + len(MERGES)}))
    with pytest.raises(ValueError, match="not in their place: <my-cat>"):
        read_folder(folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="neither vocab.json with merges.txt nor tokenizer.json"):
        read_folder(folder)


def test_what_is_assumed_is_said(folder):
    def without(file, *keys):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))

    without("scheduler/scheduler_config.json", "prediction_type", "timestep_spacing")
    without("vae/config.json", "scaling_factor")
    edit(folder / "unet/config.json", _diffusers_version="0.6.0", sample_size=32)
    config, _, notes = read_folder(folder)
    assert config["params"]["defaults"]["height"] == 64 * 4
    for said in ("predicts eps (assumed", "scale factor 0.18215 is assumed", "sample_size 32 is taken for 64"):
        assert sum(said in note for note in notes) == 1, (said, notes)
    without("unet/config.json", "sample_size")
    config, _, notes = read_folder(folder)
    assert config["params"]["defaults"]["height"] == 64 * 4 and any("size of pictures is assumed" in n for n in notes)
    edit(folder / "unet/config.json", sample_size=[8, 16])
    defaults = read_folder(folder)[0]["params"]["defaults"]
    assert (defaults["height"], defaults["width"]) == (32, 64)


@pytest.mark.parametrize(
    ("concat", "channels", "pipeline"),
    [
        ("mask_latents", 9, "StableDiffusionInpaintPipeline"),
        ("latents", 8, "StableDiffusionInstructPix2PixPipeline"),
    ],
)
def test_models_that_change_pictures(tmp_path, concat, channels, pipeline):
    import diffusers

    params = changed(SD1, "unet", in_channels=channels) | {"concat": concat}
    model = LatentDiffusion(**params)
    write_folder(tmp_path / "x", whole(model.config), model.state_dict())
    pipe = getattr(diffusers, pipeline).from_pretrained(tmp_path / "x", local_files_only=True)
    assert pipe.unet.config.in_channels == channels
    config, state, notes = read_folder(tmp_path / "x")
    assert config["params"]["concat"] == concat and pipeline in notes[0]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items()) and len(state) == len(expected)


def test_heads_are_a_number_or_a_width(folder):
    config = json.loads((folder / "unet/config.json").read_text())  # widths 16, 32, 32; all but none attended
    for heads, expected in (
        (4, {"num_heads": 4}),
        ([4, 4, 4], {"num_heads": 4}),
        ([2, 4, 4], {"num_head_channels": 8}),
    ):
        params = read_unet(config | {"attention_head_dim": heads})
        assert {key: value for key, value in params.items() if "head" in key} == expected


SCHEDULES = [
    ({"name": "scaled_linear"}, "eps"),
    ({"name": "scaled_linear", "T": 500, "start": 0.001, "end": 0.01}, "x0"),
    ({"name": "linear", "T": 1000}, "eps"),
    ({"name": "cosine"}, "v"),
    ({"name": "scaled_linear", "zero_terminal_snr": True}, "v"),
]


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule, prediction):
    from diffusers import DDIMScheduler

    config, notes = write_scheduler(schedule, prediction, {"spacing": "trailing"})
    scheduler = DDIMScheduler.from_config(config)
    own = make_schedule(**schedule).alphas_cumprod
    # float32 betas near 1 (cosine) cost the last of 1,000 products some digits
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), own, atol=1e-6, rtol=1e-3)
    params, _ = read_scheduler(config)
    assert torch.equal(make_schedule(**params["schedule"]).alphas_cumprod, own)
    assert (params["prediction"], params["defaults"]) == (prediction, {"sampler": "ddim", "spacing": "trailing"})
    assert notes == [] and dict(scheduler.config)["steps_offset"] == 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [4, 7, 50])
def test_spacings_are_those_of_diffusers(spacing, steps):
    from diffusers import DDIMScheduler

    config, _ = write_scheduler({"name": "scaled_linear"}, "eps", {"spacing": spacing})
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    schedule = make_schedule("scaled_linear")
    sigmas = sampling_sigmas(schedule, steps, read_scheduler(config)[0]["defaults"]["spacing"])
    assert [schedule.t_at(sigma) for sigma in sigmas[:-1].tolist()] == scheduler.timesteps.tolist()


def test_schedulers_that_are_read():
    euler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "use_karras_sigmas": True}
    params, _ = read_scheduler(euler)
    assert params["defaults"]["spacing"] == "karras"
    params, notes = read_scheduler({"_class_name": "OddScheduler", "beta_schedule": "sigmoid"})
    assert params["schedule"]["name"] == "sigmoid_beta" and params["defaults"]["sampler"] == "ddim"
    assert any("OddScheduler; drawn with ddim" in note for note in notes)
    _, notes = write_scheduler({"name": "linear"}, "eps", {"spacing": "karras", "steps": 20, "scale": 7.5})
    assert "spacing karras" in notes[0] and "'steps': 20" in notes[1]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (SD1 | {"cond_stage_config": None}, "the conditioner None"),
        (
            SD1 | {"cond_stage_config": {"target": "ldm.conditioning.classes.ClassEmbedder"}},
            "conditioner .*ClassEmbedder",
        ),
        (SD1 | {"first_stage_config": {"target": "ldm.models.vq_autoencoder.VQModelInterface"}}, "VQModelInterface"),
        (SD1 | {"concat": "latents_mask"}, "concat 'latents_mask'"),
        (SD1 | {"schedule": {"name": "sigmoid_alphabar"}}, "noise schedule 'sigmoid_alphabar'"),
        (changed(SD1, "unet", num_classes=7), "num_classes"),
        (changed(SD1, "unet", resblock_updown=True), "resblock_updown"),
        (changed(SD1, "unet", conv_resample=False), "conv_resample false"),
        (changed(SD1, "unet", use_spatial_transformer=False, context_dim=None), "use_spatial_transformer false"),
        (changed(SD1, "unet", num_attention_blocks=[1, 1, 1]), "num_attention_blocks"),
        (changed(SD1, "unet", num_heads=-1, num_head_channels=12), "num_head_channels 12"),
        (changed(SD1, "first_stage", embed_dim=3), "embed_dim 3 beside z_channels 4"),
        (changed(SD1, "first_stage", ddconfig=VAE["ddconfig"] | {"tanh_out": True}), "tanh_out"),
        (changed(SD1, "cond_stage", layer="hidden", layer_index=-2), "layer hidden"),
        (changed(SD1, "cond_stage", pooled=True), "pooled text"),
    ],
)
def test_what_diffusers_cannot_say_is_named_and_nothing_written(models, tmp_path, params, sentence):
    with pytest.raises(ValueError, match=f"has no words for this model: .*{sentence}"):
        write_folder(tmp_path / "out", whole(params), models["sd1"].state_dict())
    assert not list(tmp_path.iterdir())


def test_a_weight_of_no_network_is_named(models, tmp_path):
    state = models["sd1"].state_dict() | {"model_ema.decay": torch.zeros(())}
    with pytest.raises(ValueError, match="model_ema.decay is no weight of"):
        write_folder(tmp_path / "out", whole(SD1), state)


def test_nothing_is_lost(models, tmp_path, monkeypatch):
    model, path = models["sd1"], tmp_path / "a" / "out"
    config, state = whole(model.config), model.state_dict()
    path.mkdir(parents=True)
    write_folder(path, config, state)  # an empty folder is filled
    before = (path / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    inodes = (path / "vae").stat().st_ino
    write_folder(f"{path}/", config, state)  # our own is replaced
    assert (path / "vae").stat().st_ino != inodes and os.listdir(path.parent) == ["out"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldm.checkpoint.diffusers_folder.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            write_folder(path, config, {name: 0 * tensor for name, tensor in state.items()})
    assert os.listdir(path.parent) == ["out"]
    assert (path / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before

    (path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="already holds README.md, which would be lost"):
        write_folder(path, config, state)
    (path / "README.md").unlink()
    index = json.loads((path / "model_index.json").read_text())
    del index["_written_by"]  # as when diffusers has saved it again
    (path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="already holds model_index.json, scheduler.*would be lost"):
        write_folder(path, config, state)
    with pytest.raises(ValueError, match="README' is a file"):
        (tmp_path / "README").write_text("mine")
        write_folder(tmp_path / "README", config, state)


def test_writing_over_the_folder_it_was_read_from(folder):
    config, state, _ = read_folder(folder)
    before = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    write_folder(folder, config, state)
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_half_precision(models, tmp_path):
    model = models["sd2"]
    write_folder(tmp_path / "x", whole(model.config), model.state_dict(), torch.float16)
    _, state, _ = read_folder(tmp_path / "x")
    expected = model.state_dict()
    name = "model.diffusion_model.input_blocks.1.1.proj_in.weight"
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert torch.equal(state[name], expected[name].half())
    pipe = pipeline(tmp_path / "x")
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


AWKWARD = [
    *PROMPTS,
    "",
    "  A   b\n c ",
    "it's we'll 1234 12.5% $5 a1b2 under_score hy-phen",
    "café naïve cafe\u0301 日本語 Привет 🎉",
    "word " * 100,
    "<b>bold</b> (x:1.3)",
]


@pytest.mark.parametrize("files", ["all", "slow", "fast"])
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("cleaning", ["clip", "openclip"])
def test_transformers_reads_our_tokenizer(tmp_path, files, vocabulary, cleaning):
    """From all files, from vocab.json and merges.txt alone, and from tokenizer.json alone."""
    from transformers import CLIPTokenizer

    ours = Tokenizer(merges=MERGES if vocabulary == "reduced" else None, context_length=24, cleaning=cleaning)
    write_tokenizer(tmp_path, ours.merges, ours.pad, ours.context_length)
    for name in {"all": (), "slow": ("tokenizer.json",), "fast": ("vocab.json", "merges.txt")}[files]:
        (tmp_path / name).unlink()
    own = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (own.model_max_length, own.pad_token_id, own.bos_token_id, own.eos_token_id) == (
        24,
        ours.pad,
        ours.sot,
        ours.eos,
    )
    ids = own(AWKWARD, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, ours(AWKWARD))
    merges, pad = read_tokenizer(tmp_path)
    assert pad == ours.pad and merges == (None if vocabulary == "full" else MERGES)


def test_the_vocabulary_is_the_tokenizers():
    import hashlib

    ours = Tokenizer()
    names = vocabulary(clip_merges())
    assert names == [ours._pipeline.id_to_token(i) for i in range(ours.vocab_size)]
    assert hashlib.sha256("\n".join(clip_merges()).encode()).hexdigest() == CLIP_MERGES


@pytest.mark.parametrize("pad", ["eos", 5])
def test_another_pad_token_is_kept(tmp_path, pad):
    params = changed(SD2, "cond_stage", tokenizer={"merges": MERGES, "pad": pad})
    model = LatentDiffusion(**params)
    write_folder(tmp_path / "x", whole(model.config), model.state_dict())
    assert read_folder(tmp_path / "x")[0]["params"]["cond_stage_config"] == params["cond_stage_config"]


def test_the_whole_vocabulary_does_not_travel_in_the_configuration(models, tmp_path):
    text = {key: value for key, value in TEXT.items() if key != "tokenizer"} | {"vocab_size": 49408}
    params = SD1 | {"cond_stage_config": SD1["cond_stage_config"] | {"params": text}}
    model = LatentDiffusion(**params)
    write_folder(tmp_path / "x", whole(model.config), model.state_dict())
    config, _, _ = read_folder(tmp_path / "x")
    assert config["params"]["cond_stage_config"]["params"] == text
    assert json.loads((tmp_path / "x/vae/config.json").read_text())["sample_size"] == 32
    assert read_vae(json.loads((tmp_path / "x/vae/config.json").read_text()))[0] == VAE
