"""Training on from a model's weights: `start` of the diffusion stage."""

import copy

import pytest
import torch
from conftest import refused
from tiny_stages import STAGES, write_inputs

import ldm
from ldm.training.contract import build_dataset
from ldm.util import instantiate_from_config


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that builds a kind of stage with its data, after a file `start` for it was written."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)

    def build(kind: str, **changed):
        target, params, data = copy.deepcopy(STAGES[kind])
        stage = instantiate_from_config({"target": target, "params": {**params, **changed}})
        stage.prepare(build_dataset(stage, data))
        return stage

    def save_start(kind: str) -> ldm.LatentDiffusion:
        torch.manual_seed(7)
        model = build(kind).latent_diffusion
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.scale_factor = 0.7
        ldm.save(model, tmp_path / "start.safetensors")
        return model

    return build, save_start


@pytest.mark.parametrize("kind", ["diffusion", "classes", "unconditional"])
def test_training_begins_with_the_weights_and_the_scale_factor(kind, trained):
    build, save_start = trained
    model = save_start(kind)
    found = build(kind, start="start.safetensors").latent_diffusion
    assert found.scale_factor == 0.7
    weights = found.model.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    if kind == "classes":
        assert torch.equal(model.cond_stage_model.embedding.weight, found.cond_stage_model.embedding.weight)
    if kind == "diffusion":  # frozen parts are those of their own files
        for part in ("cond_stage_model", "first_stage_model"):
            given, own = (getattr(m, part).state_dict() for m in (model, found))
            assert not all(torch.equal(tensor, own[name]) for name, tensor in given.items())


def test_another_network_is_refused(trained):
    build, save_start = trained
    save_start("diffusion")
    refused("has the unet_config .* and this stage", build, "unconditional", start="start.safetensors")
    save_start("classes")
    other = {"target": "ldm.conditioning.classes.ClassEmbedder", "params": {"embed_dim": 32, "n_classes": 5}}
    refused("cond_stage_config|classes", build, "classes", start="start.safetensors", cond_stage=other)
    refused("not a complete model", build, "diffusion", start="first_stage")
    refused("missing", build, "diffusion", start="missing", error=OSError)


def test_a_text_encoder_out_of_a_complete_model_trains_where_asked(trained):
    build, save_start = trained
    model = save_start("diffusion")
    files = {"start": "start.safetensors", "cond_stage": "start.safetensors"}
    stage = build("diffusion", train_text=True, **files)
    texts = stage.latent_diffusion.cond_stage_model
    assert stage.networks["cond_stage"] is texts
    given = model.cond_stage_model.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in texts.state_dict().items())
    cond = stage.condition(["one", "two"])
    cond["c_crossattn"].square().sum().backward()
    assert all(p.grad is not None for name, p in texts.named_parameters() if "layers.0" in name or "blocks.0" in name)
    frozen = build("diffusion", **files)
    assert "cond_stage" not in frozen.networks
    assert not any(p.requires_grad for p in frozen.latent_diffusion.cond_stage_model.parameters())
    refused("train_text are for a text encoder from a checkpoint", build, "classes", train_text=True)


def test_a_file_without_a_text_encoder_is_named(trained):
    build, save_start = trained
    save_start("unconditional")
    refused("is an unconditional model, without a text encoder", build, "diffusion", cond_stage="start.safetensors")
    save_start("classes")
    for file in ("start.safetensors", "first_stage"):
        refused(f"'{file}' holds a .*, which cannot be a model's text encoder", build, "diffusion", cond_stage=file)
