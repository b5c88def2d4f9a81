"""scripts/benchmark.py, and by it that loading maps files: at a size that shows it, and in full."""

import json
import sys

import pytest
import torch
from meta_models import TINY_1

import ldm
from ldm.checkpoint.compvis import single_file
from ldm.inference import precision
from ldm.latent_diffusion import LatentDiffusion
from scripts import benchmark

WIDE = {"width": 512, "layers": 4, "heads": 8}  # 38 million parameters of text, 150 MB


def config_of(params: dict, **text) -> dict:
    conditioner = params["cond_stage_config"]
    return params | {"cond_stage_config": conditioner | {"params": conditioner["params"] | text}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model as safetensors and as .ckpt, and its configuration."""
    params = config_of(TINY_1["params"], **WIDE)
    params["unet_config"] = TINY_1["params"]["unet_config"] | {
        "params": TINY_1["params"]["unet_config"]["params"] | {"context_dim": 512}
    }
    model = LatentDiffusion(**params).eval()
    folder = tmp_path_factory.mktemp("wide")
    ldm.save(model, folder / "model.safetensors", format="compvis")
    state, _ = single_file(model.state_dict(), {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params})
    torch.save({"state_dict": state}, folder / "model.ckpt")
    (folder / "config.json").write_text(json.dumps(params))
    return folder, sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 2**30


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_loading_maps_the_file(files, suffix):
    folder, weights = files
    ours = benchmark.measure(*benchmark.OURS, folder / f"model{suffix}", folder / "config.json")
    naive = benchmark.measure(*benchmark.NAIVE[suffix], folder / f"model{suffix}", folder / "config.json")
    # the tokenizer's vocabulary and the modules take 33 MB, which is a fifth of these weights
    assert ours["private_GiB"] < 0.3 * weights and ours["peak_GiB"] < 0.4 * weights
    assert naive["private_GiB"] > 0.9 * weights and naive["peak_GiB"] > 1.5 * weights  # the measure can tell


@pytest.mark.full
def test_stable_diffusion_at_full_size(tmp_path):
    """Issue 3: private memory at most 0.1 times the weights, peak at most 1.15, no second copy when casting."""
    files = benchmark.make_stable_diffusion(tmp_path)
    weights = files[0].stat().st_size / 2**30
    for path in files:
        found = benchmark.measure(*benchmark.OURS, path, tmp_path / "config.json")
        assert found["private_GiB"] < 0.1 * weights and found["peak_GiB"] < 1.15 * weights
        half = ("import ldm.loading", "model = ldm.load({path!r}, device='cpu', dtype=torch.float16)")
        found = benchmark.measure(*half, path, tmp_path / "config.json")
        assert found["private_GiB"] < 0.6 * weights  # half the bytes, and nothing of the mapped file


def test_what_cannot_be_compared_is_told_before_any_work(files, tmp_path):
    folder, _ = files
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sampler": "ddim", "steps": 5, "n": 100}) + "\n")
    for options, message in (
        (["load", "--ckpt", folder], f"{folder} is a folder"),
        (["samplers", "--out", tmp_path / "rows.jsonl"], "rows.jsonl has rows of 100 images each"),
        (["samplers", "--out", tmp_path / "none" / "rows.jsonl"], "No such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            benchmark.main([str(option) for option in options])


@pytest.mark.parametrize("command", [["samplers", "--out={}/rows.jsonl"], ["trilemma", "--ddgan={}", "--ddpm={}"]])
def test_what_cannot_be_plotted_is_told_before_any_work(command, tmp_path, monkeypatch):
    for name in ("compare_samplers", "compare_generators"):
        monkeypatch.setattr(benchmark, name, lambda args: pytest.fail("it works before it looks"))
    command = [option.format(tmp_path) for option in command]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        with pytest.raises(ValueError, match="--plot needs matplotlib: pip install matplotlib"):
            benchmark.main([*command, "--plot=plot.png"])
    with pytest.raises(OSError, match=f"{tmp_path} cannot be written"):
        benchmark.main([*command, f"--plot={tmp_path}"])


def test_sampler_table_and_plot(tmp_path):
    rows = [
        {"sampler": name, "steps": s, "evaluations": s, "accuracy": 0.995, "ratio": 1 + 5 / s, "recall": 0.8}
        for name in ("ddim", "unipc")
        for s in (5, 10)
    ]
    table = benchmark.sampler_table(rows[:-1]).splitlines()
    assert (
        table[0] == "| sampler | 5 steps | 10 steps |"
        and table[2] == "| `ddim` | 99.5%, 2.00, 0.80 | 99.5%, 1.50, 0.80 |"
    )
    assert table[3] == "| `unipc` | 99.5%, 2.00, 0.80 | - |"
    benchmark.plot_samplers(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_trilemma_of_checkpoints(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    set_precision, computed = precision.set_precision, []

    def watched(model, *args):
        set_precision(model, *args)
        computed.append(precision.precision_of(model))

    monkeypatch.setattr(precision, "set_precision", watched)
    files = [f"--{kind}={tiny_checkpoint}" for kind in ("vae", "ddgan", "ddpm")]
    options = ["--n=10", "--ddim-steps", "3", f"--plot={tmp_path / 'plot.png'}", "--device=cpu", "--precision=bf16"]
    benchmark.main(["trilemma", *files, *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| VAE", "1"],
        ["| DDGAN", "4"],
        ["| DDPM", "4"],
        ["| DDIM, 3 steps", "3"],
    ]
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert computed == ["bf16"] * 3


def test_trilemma_table_and_plot(tmp_path):
    rows = [
        {"name": name, "evaluations": n, "accuracy": a, "ratio": 2.5, "recall": 0.75, "precision": 0.8}
        | {"seconds": s, "cpu_seconds": s}
        for name, n, a, s in (("VAE", 1, None, 0.001), ("DDGAN", 4, 0.995, 0.0123))
    ]
    assert benchmark.trilemma_table(rows).splitlines()[2:] == [
        "| VAE | 1 | - | 2.50 | 0.75 | 0.80 | 0.001 | 0.001 |",
        "| DDGAN | 4 | 99.5% | 2.50 | 0.75 | 0.80 | 0.012 | 0.012 |",
    ]
    benchmark.plot_trilemma(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
