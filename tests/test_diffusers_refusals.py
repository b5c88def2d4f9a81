"""What is wrong with a folder of diffusers, or with a model for one, is said in one sentence that names it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused
from tiny_stable_diffusion import MERGES, SD1, VAE, changed, edit, model_config

from ldm.checkpoint import diffusers_folder
from ldm.checkpoint.diffusers_files import read_json
from ldm.checkpoint.diffusers_folder import read_pipeline
from ldm.checkpoint.diffusers_writer import write_pipeline
from ldm.checkpoint.networks import CLASSES_TARGET
from ldm.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return LatentDiffusion(**SD1).state_dict()


@pytest.fixture(scope="module")
def written(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "sd1"
    write_pipeline(path, model_config(SD1), state)
    return path


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy, which a test may change."""
    return shutil.copytree(written, tmp_path / "sd1")


def test_folders_that_are_none(folder, tmp_path):
    refused("'.*nowhere' does not exist", read_pipeline, tmp_path / "nowhere", error=FileNotFoundError)
    refused("holds no model_index.json", read_pipeline, folder / "unet")
    for pipeline in ("StableDiffusionXLInpaintPipeline", "FluxPipeline", "StableDiffusionControlNetPipeline"):
        edit(folder / "model_index.json", _class_name=pipeline)
        refused(f"holds a {pipeline}: supported are StableDiffusionPipeline", read_pipeline, folder)
    (folder / "model_index.json").write_text("{")
    refused("model_index.json' is damaged", read_pipeline, folder)


def test_parts_that_are_missing_or_unknown(folder):
    index = json.loads((folder / "model_index.json").read_text())
    for name, cls, sentence in (
        ("controlnet", "ControlNetModel", "a part controlnet \\(ControlNetModel\\)"),
        ("text_encoder", "T5EncoderModel", "a T5EncoderModel as its text_encoder: only CLIPTextModel"),
        ("vae", "AutoencoderTiny", "a AutoencoderTiny as its vae: only AutoencoderKL"),
    ):
        edit(folder / "model_index.json", **{name: ["diffusers", cls]})
        refused(sentence, read_pipeline, folder)
        (folder / "model_index.json").write_text(json.dumps(index))
    edit(folder / "model_index.json", text_encoder=[None, None])
    refused("lacks text_encoder: it needs", read_pipeline, folder, error=FileNotFoundError)
    (folder / "model_index.json").write_text(json.dumps(index))
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    read_pipeline(folder)  # its folder need not be there
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vae' holds no weights \\(diffusion_pytorch_model.safetensors or"):
        read_pipeline(folder)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(FileNotFoundError, match="lacks vae, scheduler: it needs unet, vae, text_encoder, tokenizer"):
        read_pipeline(folder)


def test_a_truncated_file_and_a_missing_shard_are_named(folder, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("unet/diffusion_pytorch_model.safetensors' is not a complete safetensors file", read_pipeline, folder)
    file.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shard = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    refused(shard.name, read_pipeline, folder, error=FileNotFoundError)


def test_a_variant_that_is_missing_or_not_the_only_one(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    refused("holds no weights of the variant 'bf16'", read_pipeline, folder, variant="bf16")
    for variant in ("fp16", "non_ema"):
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    read_pipeline(folder)  # those without a variant come first
    weights.unlink()
    refused("in the variants fp16, non_ema: name one", read_pipeline, folder, error=FileNotFoundError)
    read_pipeline(folder, variant="non_ema")


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}, "UNet has class_embed_type 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 7}, "UNet has num_class_embeds 7"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "takes pooled text, as Stable Diffusion XL's alone"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "UNet has time_cond_proj_dim 256"),
        ("unet/config.json", {"something_new": "yes"}, "UNet has something_new 'yes'"),
        ("unet/config.json", {"norm_eps": 1e-6}, "UNet has norm_eps 1e-06"),
        ("unet/config.json", {"attention_head_dim": [2, 3, 4]}, r"attention_head_dim is \[2, 3, 4\] heads"),
        ("unet/config.json", {"cross_attention_dim": [32, 8, 32]}, "cross_attention_dim is"),
        ("unet/config.json", {"block_out_channels": [16, 24, 32]}, "each must be a multiple"),
        ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}, "mirrored on the way up"),
        ("unet/config.json", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "SimpleCrossAttnDownBlock2D"),
        ("unet/config.json", {"in_channels": 5}, "takes 1 channels beside 4 noised latents"),
        ("unet/config.json", {"in_channels": 8}, "StableDiffusionPipeline takes an image's latents"),
        ("unet/config.json", {"block_out_channels": None}, "damaged configuration"),
        ("vae/config.json", {"shift_factor": 0.1}, "autoencoder has shift_factor 0.1"),
        ("vae/config.json", {"use_quant_conv": False}, "autoencoder has use_quant_conv False"),
        ("vae/config.json", {"latents_mean": [0.0]}, "autoencoder has latents_mean"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act 'relu': known is quick_gelu or gelu"),
        ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06: known is 1e-05"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "'flow_prediction': known are eps"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ("tokenizer/special_tokens_map.json", {"pad_token": "zzz"}, None),
        ("tokenizer/tokenizer_config.json", {"pad_token": "zzz"}, "pad token 'zzz'"),
    ],
)
def test_what_our_networks_cannot_do_is_named(folder, file, changes, sentence):
    if not (folder / file).exists():  # transformers 5 writes no special_tokens_map.json
        (folder / file).write_text("{}")
    edit(folder / file, **changes)
    if sentence is None:
        read_pipeline(folder)
        return
    refused(f"folder '.*sd1'.*{sentence}", read_pipeline, folder)


def test_another_kind_of_scheduler_is_refused(folder):
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    refused("the scheduler is a FlowMatchEulerDiscreteScheduler", read_pipeline, folder)


def test_tokens_that_were_added_are_named(folder):
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": 514 + len(MERGES)}))
    refused("no vector for the token '<my-cat>'", read_pipeline, folder)  # the text encoder was not resized
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<my-cat>": 7}))
    refused("not in their place: <my-cat>", read_pipeline, folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    refused("neither vocab.json with merges.txt nor tokenizer.json", read_pipeline, folder)


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (SD1 | {"cond_stage_config": None}, "the conditioner None"),
        (SD1 | {"cond_stage_config": {"target": CLASSES_TARGET}}, "conditioner .*ClassEmbedder"),
        (SD1 | {"first_stage_config": {"target": "ldm.models.vq_autoencoder.VQModelInterface"}}, "VQModelInterface"),
        (SD1 | {"concat": "latents_mask"}, "concat 'latents_mask'"),
        (SD1 | {"schedule": {"name": "sigmoid_alphabar"}}, "noise schedule 'sigmoid_alphabar'"),
        (SD1 | {"schedule": {"name": "cosine", "shift": 3.0}}, "shift 3"),
        (SD1 | {"prediction": "flow"}, "prediction 'flow'"),
        (changed(SD1, "unet", num_classes=7), "num_classes"),
        (changed(SD1, "unet", resblock_updown=True), "resblock_updown"),
        (changed(SD1, "unet", conv_resample=False), "conv_resample False"),
        (changed(SD1, "unet", use_spatial_transformer=False, context_dim=None), "use_spatial_transformer False"),
        (changed(SD1, "unet", attention_type="linear"), "attention_type linear"),
        (changed(SD1, "unet", patch=2), "patch 2"),
        (changed(SD1, "unet", channel_mult=[2, 2, 4]), r"channel_mult \[2, 2, 4\]"),
        (changed(SD1, "unet", context_dim=[32, 8, 32]), "cross_attention_dim"),
        (changed(SD1, "unet", num_attention_blocks=[1, 1, 1]), "num_attention_blocks"),
        (changed(SD1, "unet", num_heads=-1, num_head_channels=12), "num_head_channels 12"),
        (changed(SD1, "first_stage", embed_dim=3), "embed_dim 3"),
        (changed(SD1, "first_stage", ddconfig=VAE["ddconfig"] | {"tanh_out": True}), "tanh_out True"),
        (changed(SD1, "first_stage", ddconfig=VAE["ddconfig"] | {"patch": 2}), "patch 2"),
        (changed(SD1, "cond_stage", layer="hidden", layer_index=-2), "layer hidden"),
        (changed(SD1, "cond_stage", pooled=True), "pooled text"),
    ],
)
def test_what_diffusers_cannot_say_is_named_and_nothing_written(state, tmp_path, params, sentence):
    refused(f"cannot express this model: .*{sentence}", write_pipeline, tmp_path / "out", model_config(params), state)
    assert not list(tmp_path.iterdir())


def test_a_weight_of_no_network_is_named(state, tmp_path):
    state = state | {"model_ema.decay": torch.zeros(())}
    refused("model_ema.decay is not a weight of", write_pipeline, tmp_path / "out", model_config(SD1), state)


def test_a_missing_package_is_named(state, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as when it is not installed
    refused("needs diffusers: pip install diffusers", write_pipeline, tmp_path / "out", model_config(SD1), state)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(folder, monkeypatch):
    """Its parts could be of two models."""
    file = folder / "vae/config.json"

    def replacing(path: Path):
        found = read_json(path)
        if path == file:
            shutil.copy(file, folder / "copy")
            os.replace(folder / "copy", file)
        return found

    monkeypatch.setattr(diffusers_folder, "read_json", replacing)
    refused("was changed while it was read: load it again", read_pipeline, folder)
