"""LoRA files between here and diffusers with PEFT: each side's files make the other side's networks compute the same.

Both compute in float32 with different kernels; outputs are of order 1, so 1e-5 is a hundred roundings.
"""

import json

import pytest
import torch
from conftest import peers
from lora_models import EVERY_TARGET, distance, file_of, inputs, learned, outputs, tiny
from safetensors.torch import save_file

import ldm
from ldm.finetune import lora
from ldm.finetune.lora_files import load_lora, merge_lora, save_lora

CLOSE = 1e-5
KINDS = ("sd1", "sd2")
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
UNET_LAYERS += ["conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"]
UNET_LAYERS += ["time_embedding.linear_1"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture(scope="module")
def models():
    return {kind: tiny(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    found = {kind: tmp_path_factory.mktemp("folders") / kind for kind in KINDS}
    for kind, folder in found.items():
        ldm.save(models[kind], folder, format="diffusers")
    return found


@pytest.fixture
def pipelines(folders):
    from diffusers import StableDiffusionPipeline

    return lambda kind: StableDiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)


@torch.no_grad()
def theirs(pipeline):
    """As `lora_models.outputs`, by diffusers and transformers."""
    x, t, context, tokens = inputs()
    return pipeline.unet(x, t, encoder_hidden_states=context).sample, pipeline.text_encoder(tokens)[0]


def teach(pipeline, rank=3, alpha=2.0, text_alpha=5.0):
    """Adapters of PEFT's in both networks, as training might leave them."""
    from peft import LoraConfig

    with peers("diffusers", "transformers", "peft"):
        pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=UNET_LAYERS))
        pipeline.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=text_alpha, target_modules=TEXT_LAYERS))
    generator = torch.Generator().manual_seed(3)
    for network in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)


def write(pipeline, folder, settings: bool):
    """By diffusers, as its training scripts do; with alpha in the header, or without as before 0.35."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    pipeline.save_lora_weights(
        folder,
        **{f"{part}_lora_layers": get_peft_model_state_dict(network) for part, network in networks.items()},
        **(_collate_lora_metadata(networks) if settings else {}),
    )
    return folder / "pytorch_lora_weights.safetensors"


def outputs_here(model, path, strength=1.0):
    kept = merge_lora(model, path, strength)
    found = outputs(model)
    lora.restore(model, kept)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_writes_loads_here(kind, models, pipelines, tmp_path):
    pipeline, plain = pipelines(kind), outputs(models[kind])
    assert distance(theirs(pipeline), plain) < CLOSE
    teach(pipeline)
    wanted = theirs(pipeline)
    path = write(pipeline, tmp_path, settings=True)
    adapters, notes = load_lora(path, models[kind])
    assert notes == [] and {adapter.alpha for adapter in adapters.values()} == {2.0, 5.0}
    assert distance(wanted, plain) > 0.1 and distance(outputs_here(models[kind], path), wanted) < CLOSE


def test_without_settings_alpha_is_the_rank_as_in_diffusers(models, pipelines, tmp_path):
    pipeline = pipelines("sd1")
    teach(pipeline, alpha=3.0, text_alpha=3.0)
    path = write(pipeline, tmp_path, settings=False)
    assert distance(outputs_here(models["sd1"], path), theirs(pipeline)) < CLOSE


def test_a_strength_is_what_it_is_in_diffusers(models, pipelines, tmp_path):
    pipeline = pipelines("sd1")
    teach(pipeline)
    path = write(pipeline, tmp_path, settings=True)
    fresh = pipelines("sd1")
    fresh.load_lora_weights(path, adapter_name="a")
    fresh.set_adapters(["a"], [0.6])
    assert distance(outputs_here(models["sd1"], path, 0.6), theirs(fresh)) < CLOSE


def test_what_pefts_own_model_writes_loads_here(models, pipelines, tmp_path):
    """peft.get_peft_model(unet).save_pretrained(folder): names without a part, alpha in a file beside."""
    from peft import LoraConfig, get_peft_model

    pipeline = pipelines("sd1")
    wrapped = get_peft_model(
        pipeline.unet,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_v", "conv1"],
            rank_pattern={"conv1": 2},
            alpha_pattern={r"mid_block.*to_q": 1.5},
            use_rslora=True,
            init_lora_weights=False,
        ),
    )
    wrapped.save_pretrained(tmp_path)
    adapters, notes = load_lora(tmp_path / "adapter_model.safetensors", models["sd1"])
    assert notes == [] and {adapter.rank for adapter in adapters.values()} == {2, 4}
    found, wanted = outputs_here(models["sd1"], tmp_path / "adapter_model.safetensors"), theirs(pipeline)
    assert distance(found, wanted) < CLOSE * max(1.0, wanted[0].abs().max().item())


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_loads_in_diffusers(kind, format, models, pipelines, tmp_path):
    model = models[kind]
    adapters = learned(model, targets=[*EVERY_TARGET, "emb_layers", "time_embed", r"input_blocks\.0\.0$", r"\bout\.2$"])
    wanted = outputs(model)
    lora.detach(adapters)
    save_lora(tmp_path / "ours.safetensors", adapters, model, format)
    pipeline = pipelines(kind)
    pipeline.load_lora_weights(tmp_path / "ours.safetensors")
    assert distance(wanted, outputs(model)) > 0.1 and distance(theirs(pipeline), wanted) < CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_alphas_that_differ_by_layer_load_in_diffusers(kind, models, pipelines, tmp_path):
    model = models[kind]
    adapters = learned(model)
    for i, name in enumerate(list(adapters)):
        if i % 3 == 0:
            adapters[name].disconnect()
            adapters[name] = lora.resized(adapters[name], 2).adapter
            lora.connect(model, {name: adapters[name]})
        if i % 5 == 0:
            adapters[name].alpha *= 1.5
    wanted = outputs(model)
    lora.detach(adapters)
    save_lora(tmp_path / "ours.safetensors", adapters, model, "peft")
    pipeline = pipelines(kind)
    pipeline.load_lora_weights(tmp_path / "ours.safetensors")
    assert distance(theirs(pipeline), wanted) < CLOSE


@pytest.mark.parametrize("naming", ["diffusers' processors", "diffusers before PEFT", "kohya te1"])
def test_old_namings_mean_to_diffusers_what_they_mean_here(naming, models, pipelines, tmp_path):
    """The namings that no installed version writes any more, checked by diffusers reading them."""
    model = models["sd1"]
    adapters = learned(model, targets=["attention", "text"], attached=False)
    state = file_of(adapters, naming)
    assert len(state) >= 10
    save_file(state, tmp_path / "x.safetensors")
    pipeline = pipelines("sd1")
    plain = theirs(pipeline)
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    wanted = theirs(pipeline)
    assert min((a - b).abs().max() for a, b in zip(plain, wanted, strict=True)) > 1e-3
    assert distance(outputs_here(model, tmp_path / "x.safetensors"), wanted) < CLOSE


def test_our_merged_folder_is_diffusers_with_the_lora_fused(models, folders, pipelines, tmp_path):
    model = models["sd1"]
    adapters = learned(model, attached=False)
    save_lora(tmp_path / "ours.safetensors", adapters, model)
    kept = merge_lora(model, tmp_path / "ours.safetensors", 0.7)
    ldm.save(model, tmp_path / "merged", format="diffusers")
    lora.restore(model, kept)
    from diffusers import StableDiffusionPipeline

    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True)
    fused = pipelines("sd1")
    fused.load_lora_weights(tmp_path / "ours.safetensors")
    fused.fuse_lora(lora_scale=0.7)
    assert distance(theirs(merged), theirs(fused)) < CLOSE


def test_the_header_is_what_diffusers_writes(models, pipelines, tmp_path):
    """Every key that ours has is one of theirs, with a value of the same kind."""
    from safetensors import safe_open

    pipeline = pipelines("sd1")
    teach(pipeline)
    headers = []
    adapters = learned(models["sd1"], attached=False)
    save_lora(tmp_path / "ours.safetensors", adapters, models["sd1"], "peft")
    for path in (tmp_path / "ours.safetensors", write(pipeline, tmp_path, settings=True)):
        with safe_open(path, "pt") as file:
            headers.append(json.loads(file.metadata()["lora_adapter_metadata"]))
    ours, wanted = headers
    assert ours.keys() <= wanted.keys()
    assert all(type(value) is type(wanted[key]) for key, value in ours.items())
