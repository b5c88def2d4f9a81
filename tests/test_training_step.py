"""How a training step is computed: gradient checkpointing, precision, torch.compile."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import load_file
from test_loop import assert_same, interrupt
from tiny_stages import config_of, write_inputs

from ldm.models import compiler
from ldm.training import loop
from ldm.training.loop import Interrupted, train


@pytest.mark.parametrize("stage", ["autoencoder", "pixel", "diffusion", "textual_inversion"])
def test_gradient_checkpointing_changes_memory_only(stage, tmp_path, monkeypatch):
    """The weights are equal to the bit, dropout and the adaptive weight of the discriminator included."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    paths, kept = [], []
    for on in (False, True):
        run = config_of(stage) | {"outdir": str(on)}
        run["loop"] |= {"gradient_checkpointing": on, "precision": "fp32", "preview_every": 9}
        params = run["stage"]["params"]
        inner = {"autoencoder": "ddconfig", "pixel": "model", "diffusion": "unet_config"}.get(stage)
        if inner is not None:
            part = params[inner].get("params", params[inner])
            part.get("unet_config", {"params": part})["params"]["dropout"] = 0.3
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            paths.append(train(run, device="cpu"))
    assert_same(*paths)
    assert kept[0] > kept[1]


def test_a_stage_without_such_blocks_says_so(tmp_path):
    run = config_of("classifier") | {"outdir": str(tmp_path)}
    run["loop"]["gradient_checkpointing"] = True
    refused("loop.gradient_checkpointing: no network of ClassifierStage has blocks for it", train, run, device="cpu")


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path, monkeypatch):
    """Autocast's masters: weights, average and optimizer state stay float32, and so do the steps that they take."""
    computed, conv = set(), F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: computed.add((out := conv(*args)).dtype) or out)
    moved = {}
    for precision, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        run = config_of("pixel") | {"outdir": str(tmp_path / precision)}
        run["loop"] |= {"precision": precision, "preview_every": 9, "ema": 0.9}
        run["stage"]["params"] |= {"learning_rate": 1e-6}  # bf16 weights would not move by it
        path = train(run, device="cpu")
        assert computed == {dtype, torch.float32}  # the preview is in float32
        computed.clear()
        state = torch.load(path.parent / "resume.pt", weights_only=True)
        adam = [value for p in state["optimizer_0"]["state"].values() for value in p.values()]
        kept = [*state["networks"].values(), *state["ema"]["shadow"].values(), *adam]
        assert len(adam) > 9 and {tensor.dtype for tensor in kept} == {torch.float32}
        moved[precision] = state["networks"]["model.diffusion_model.out.2.bias"]
    assert moved["bf16"].abs().max() > 0
    torch.testing.assert_close(moved["bf16"], moved["fp32"], rtol=0.1, atol=1e-7)


def compiled_run(stage: str, folder: Path, **settings) -> dict:
    run = config_of(stage) | {"outdir": str(folder)}
    run["loop"] |= {"steps": 3, "compile": True, "precision": "fp32"} | settings
    return run


def test_a_compiled_run_resumes_exactly_and_shows_previews_without(tmp_path, monkeypatch):
    traced = []

    def backend(graph, inputs):  # computes as before
        traced.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(compiler, "BACKEND", backend)
    plain = train(compiled_run("classifier", tmp_path / "plain", compile=False), device="cpu")
    assert not traced
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "preview", interrupt)
        train(compiled_run("classifier", tmp_path / "parts", preview_every=2), device="cpu")
    parts = train(compiled_run("classifier", tmp_path / "parts", preview_every=2), resume=True, device="cpu")
    assert_same(plain, parts)
    assert traced and all(traced)


def test_a_compiler_that_fails_is_one_sentence(tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("cannot find g++\nand many lines more")

    monkeypatch.setattr(compiler, "BACKEND", backend)
    message = r"torch.compile failed \(.*cannot find g\+\+\): repair that, or leave loop.compile out"
    refused(message, train, compiled_run("classifier", tmp_path), device="cpu")


def test_a_run_that_torch_leaves_uncompiled_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "BACKEND", "eager")
    message = r"torch computed \w+ uncompiled, as it does for TORCH_COMPILE_DISABLE=1.* or leave loop.compile out"
    with torch.compiler.set_stance("force_eager"):
        refused(message, train, compiled_run("classifier", tmp_path), device="cpu")


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_inductor_trains_the_same_weights(tmp_path):
    """Dropout takes the same random numbers; only the order of sums differs."""
    paths = []
    for on in (False, True):
        run = compiled_run("pixel", tmp_path / str(on), compile=on)
        run["stage"]["params"]["model"]["params"]["unet_config"]["params"]["dropout"] = 0.3
        paths.append(train(run, device="cpu"))
    plain, fast = map(load_file, paths)
    for name, tensor in plain.items():  # measured: 3e-6 after three steps of AdamW at 1e-3
        torch.testing.assert_close(fast[name], tensor, rtol=0, atol=5e-5)
