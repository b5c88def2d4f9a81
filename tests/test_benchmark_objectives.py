"""The comparison of objectives: every one builds and is what it says, and the file of rows goes on where it stopped."""

import json
from pathlib import Path

import pytest
from conftest import refused
from omegaconf import OmegaConf

from benchmarks import objectives
from ldm.training.config import read_configs
from ldm.util import instantiate_from_config

CONFIG = Path(__file__).parents[1] / "configs" / "pixel" / "objectives.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The configuration at a tiny size, on scikit-learn's digits."""
    path = tmp_path_factory.mktemp("objectives") / "objectives.yaml"
    config = OmegaConf.load(CONFIG)
    config.data = {"target": "ldm.data.digits.Digits", "params": {"first": 40}}
    config.outdir = str(path.parent / "runs")
    unet = config.stage.params.model.params.unet_config.params
    unet.update({"model_channels": 8, "patch": 8, "channel_mult": [1, 1], "num_head_channels": 8, "norm_groups": 4})
    config.stage.params.model.params.defaults.steps = 1
    config.stage.params.previews = 1
    config.loop.update({"steps": 2, "batch_size": 4})
    OmegaConf.save(config, path)
    return path


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_changes_what_it_says(name, tiny):
    (config,) = read_configs([str(tiny)], objectives.OBJECTIVES[name].changes)
    stage = instantiate_from_config(config["stage"])
    model = stage.latent_diffusion
    first, _, second = name.partition(", ")
    if second:
        assert model.prediction == first
        weighted = second.startswith("weight ")
        assert model.schedule_params["name"] == ("cosine" if weighted else second)
        assert stage.objective.weight["name"] == (second.removeprefix("weight ") if weighted else "none")
    changed = {
        "learned variance": model.learned_variance,
        "self-conditioning": model.self_condition,
        "linear attention": any("LinearAttentionBlock" in str(type(module)) for module in model.modules()),
        "immiscible noise": stage.objective.noise["immiscible"],
        "offset noise": stage.objective.noise["offset"] > 0,
    }
    assert {key for key, value in changed.items() if value} == {name} & set(changed)


def test_rows_go_on_where_they_stopped(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "STEPS", 1)
    monkeypatch.setattr(objectives, "CONFIG", tiny)
    out = tmp_path / "rows.jsonl"
    command = ["--out", str(out), "--n", "100", "--device", "cpu", "--names"]
    objectives.main([*command, "learned variance"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["objective"], row["sampler"]) for row in rows] == [("learned variance", s) for s in ("ddim", "ddpm")]
    assert all(row["n"] == 100 and row["training_steps"] == 2 and row["training_cpu_seconds"] > 0 for row in rows)
    out.write_text(json.dumps(rows[0]) + "\n")  # stopped between the two
    capsys.readouterr()
    objectives.main([*command, "self-conditioning", "learned variance"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = [(row["objective"], row["sampler"], row["training_cpu_seconds"] is None) for row in rows]
    assert found[1:] == [("self-conditioning", "ddim", False), ("learned variance", "ddpm", True)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| learned variance", "ddim"],
        ["| learned variance", "ddpm"],
        ["| self-conditioning", "ddim"],
    ]
    other = ["--out", str(out), "--n", "50", "--names", "self-conditioning"]
    refused(r"rows of other numbers of images or steps than \(50, 2\)", objectives.main, other)


def test_an_unknown_objective_is_an_error_before_any_work(tmp_path):
    command = ["--out", str(tmp_path / "rows.jsonl"), "--names", "eps"]
    refused("unknown objective 'eps'; choose from v, cosine; eps, cosine", objectives.main, command)
    assert not (tmp_path / "rows.jsonl").exists()
