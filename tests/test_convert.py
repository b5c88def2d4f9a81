"""scripts/convert.py: precision, formats, own settings, LoRAs merged and rewritten, mistakes."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import refused
from lora_models import learned, tiny
from safetensors import safe_open
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

import ldm
from ldm.checkpoint.file import load_file
from ldm.commands.convert import main as convert
from ldm.commands.txt2img import main as txt2img
from ldm.finetune import lora
from ldm.finetune.lora_files import merge_lora, save_lora


def test_half_precision_rounds_each_weight_once_and_halves_the_file(tiny_checkpoint, tmp_path):
    out = tmp_path / "half.safetensors"
    convert(
        [str(tiny_checkpoint), str(out), "--dtype", "fp16", "--default", "scale=1.25", "--default", "interval=[0.5, 4]"]
    )
    config, half = load_file(out)
    _, full = load_file(tiny_checkpoint)
    assert config["params"]["defaults"]["scale"] == 1.25 and config["params"]["defaults"]["interval"] == [0.5, 4]
    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    assert out.stat().st_size < 0.65 * tiny_checkpoint.stat().st_size  # names and configuration do not shrink
    assert ldm.load(out, device="cpu").defaults["scale"] == 1.25


def test_mistakes_are_named_and_leave_the_output_alone(tiny_checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"kept")
    with pytest.raises(ValueError, match="'stepz=3' must be KEY=VALUE with a key of height"):
        convert([str(tiny_checkpoint), str(out), "--default", "stepz=3"])
    for default, message in {
        "steps=ten": "steps 'ten' is not an integer",
        "sampler=dimm": "the model's defaults: unknown sampler 'dimm'",
        "height=36": "the model's defaults: height 36 cannot be made by this model",
    }.items():
        refused(message, convert, [str(tiny_checkpoint), str(out), "--default", default])
    refused("does not exist", convert, [str(tmp_path / "none.safetensors"), str(out)], error=FileNotFoundError)
    assert out.read_bytes() == b"kept"


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """(a tiny Stable Diffusion 1, its file, two LoRAs for it)"""
    folder = tmp_path_factory.mktemp("stable")
    model = tiny("sd1")
    paths = [folder / name for name in ("model.safetensors", "a.safetensors", "b.safetensors")]
    ldm.save(model, paths[0])
    for seed, path in enumerate(paths[1:]):
        adapters = learned(model, rank=4, seed=seed)
        lora.detach(adapters)
        save_lora(path, adapters, model)
    return model, *map(str, paths)


def test_loras_are_merged_at_their_strengths(stable, tmp_path):
    model, file, a, b = stable
    out = tmp_path / "merged.safetensors"
    convert([file, str(out), "--lora", f"{a}:0.5", "--lora", b])
    merged, original = load_file(out)[1], load_file(file)[1]
    first, second = merge_lora(model, b), merge_lora(model, a, 0.5)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora.restore(model, second | first)
    assert merged.keys() == original.keys()
    changed = {name for name in merged if not torch.equal(merged[name], original[name])}
    assert len(changed) > 80 and not any(name.startswith("first_stage") for name in changed)
    assert all(torch.allclose(merged[name], wanted[name], atol=1e-6) for name in merged)  # of another order


@pytest.mark.parametrize("command", [convert, txt2img])
def test_a_merge_that_is_lost_in_rounding_is_said(stable, tmp_path, capsys, command):
    """In half precision, not in float32; nothing is said of a merge that shows."""
    model, file, a, _ = stable
    weak = tmp_path / "weak.safetensors"
    adapters = learned(model, rank=4, attached=False)
    for adapter in adapters.values():
        adapter.up.data *= 1e-6
    save_lora(weak, adapters, model)
    said = {}
    for lora_file, dtype in ((weak, "bf16"), (weak, "fp32"), (a, "bf16")):
        if command is convert:
            options = [file, str(tmp_path / "out.safetensors"), "--dtype", dtype]
        else:
            precision = {"bf16": "bf16", "fp32": "full"}[dtype]
            options = ["--ckpt", file, "--steps", "1", "--outdir", str(tmp_path), "--precision", precision]
            options += ["--device", "cpu", "--prompt", "a"]
        command([*options, "--lora", str(lora_file)])
        shown = capsys.readouterr()
        said[lora_file, dtype] = shown.out + shown.err
    lost = r"weak.safetensors: its change is lost in rounding: (9\d\.\d|100\.0)% of the weights .* in torch.bfloat16"
    assert [bool(re.search(lost, text)) for text in said.values()] == [True, False, False]


def test_every_format_is_written_and_read_back(stable, tmp_path, capsys):
    model, file, *_ = stable
    for format, name in (("ldm", "a.safetensors"), ("compvis", "b.safetensors"), ("diffusers", "folder")):
        convert([file, str(tmp_path / name), "--format", format])
        said = capsys.readouterr().out
        back = tmp_path / f"{format}.safetensors"
        convert([str(tmp_path / name), str(back)])
        state = load_file(back)[1]
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
        size = sum(p.stat().st_size for p in [tmp_path / name, *(tmp_path / name).rglob("*")] if p.is_file())
        assert f"{name}: {size:,} bytes" in said
    assert "a folder of diffusers, StableDiffusionPipeline" in capsys.readouterr().out  # model.notes


@pytest.mark.parametrize("format", ["ldm", "compvis"])
def test_a_ckpt_is_torchs_and_has_all(stable, tmp_path, format):
    """Tensors and texts alone, as CompVis's scripts and torch read them; the configuration travels."""
    model, file, *_ = stable
    out = tmp_path / "out.ckpt"
    convert([file, str(out), "--format", format, "--default", "steps=7", "--dtype", "fp16"])
    found = torch.load(out, weights_only=True)
    assert all(torch.equal(found["state_dict"][n], t.half()) for n, t in model.state_dict().items())
    assert ("betas" in found["state_dict"]) == (format == "compvis")
    loaded = ldm.load(out, device="cpu")
    assert loaded.notes == [] and loaded.defaults == model.defaults | {"steps": 7}
    assert loaded.config["unet_config"] == model.config["unet_config"]


def test_a_name_that_promises_another_format_is_refused(stable, tmp_path):
    _, file, a, _ = stable
    refused("looks like a folder.*--format diffusers", convert, [file, str(tmp_path / "E")])
    refused("a device or a pipe", convert, [file, os.devnull], error=OSError)
    refused("has the name of torch's format", convert, [a, str(tmp_path / "lora.pt")])
    convert([file, str(tmp_path / "E"), "--format", "ldm"])
    convert([file, str(tmp_path / "E")])  # a file that is there
    assert load_file(tmp_path / "E")[1].keys() == load_file(file)[1].keys()


def test_parts_and_prediction_are_those_asked_for(stable, tmp_path):
    _, file, *_ = stable
    other = tiny("sd1")
    for parameter in other.first_stage_model.parameters():
        parameter.data = torch.full_like(parameter, 0.25)
    ldm.save(other, tmp_path / "vae.safetensors")
    out = tmp_path / "out.safetensors"
    convert([file, str(out), "--vae", str(tmp_path / "vae.safetensors"), "--prediction", "v"])
    config, state = load_file(out)
    assert config["params"]["prediction"] == "v"
    assert all((tensor == 0.25).all() for name, tensor in state.items() if name.startswith("first_stage_model."))
    assert torch.equal(state["model.diffusion_model.out.2.weight"], other.model.diffusion_model.out[2].weight)
    save_file(state, tmp_path / "plain.safetensors")  # by another program, without a header of ours
    refused("averaged", convert, [str(tmp_path / "plain.safetensors"), str(out), "--ema"])


def test_a_lora_is_rewritten(stable, tmp_path, capsys):
    *_, a, _ = stable
    out = tmp_path / "out.safetensors"
    convert([a, str(out), "--rank", "2", "--lora-format", "peft", "--dtype", "fp16"])
    state = read_tensors(out)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    ranks = {len(tensor) for name, tensor in state.items() if name.endswith("lora_A.weight")}
    assert ranks == {2} and all(name.startswith(("unet.", "text_encoder.")) for name in state)
    said = capsys.readouterr().out
    assert "rank 2: " in said and f"{out}: {out.stat().st_size:,} bytes" in said
    convert([a, str(out)])
    assert out.read_bytes() == Path(a).read_bytes()


def test_options_of_the_other_kind_are_refused(stable, tmp_path):
    _, file, a, b = stable
    out = str(tmp_path / "out.safetensors")
    refused(r"--rank is for LoRA files, and '.*model.safetensors' is none", convert, [file, out, "--rank", "4"])
    refused(r"--lora is for models, and '.*a.safetensors' is a LoRA file", convert, [a, out, "--lora", b])
    refused("--format is for models", convert, [a, out, "--format", "diffusers"])
    with pytest.raises(FileNotFoundError, match="none.safetensors' does not exist"):
        convert([file, out, "--lora", str(tmp_path / "none.safetensors:0.5")])
    refused("holds no LoRA weights", convert, [file, out, "--lora", file])
    assert not Path(out).exists()


def test_weights_that_are_not_finite_are_refused_by_file(stable, tmp_path, capsys):
    """In a checkpoint, a part and a LoRA, by the name of the file that has them; nothing is written."""
    _, file, a, _ = stable
    out, bad = str(tmp_path / "out.safetensors"), {}
    for what, source in (("model", file), ("lora", a)):
        state, bad[what] = dict(read_tensors(source)), str(tmp_path / f"bad_{what}.safetensors")
        name = next(
            name for name in state if name.endswith(("lora_up.weight", "first_stage_model.decoder.conv_in.bias"))
        )
        state[name] = state[name] * torch.nan
        with safe_open(source, "pt") as opened:
            save_file(state, bad[what], opened.metadata())
    refused("checkpoint '.*bad_model.safetensors' .* not finite", convert, [bad["model"], out])
    refused("^checkpoint '.*bad_model.safetensors' .* not finite", convert, [file, out, "--vae", bad["model"]])
    convert([file, out, "--unet", bad["model"]])  # of which only the UNet is used
    Path(out).unlink()
    for line in ([file, out, "--lora", bad["lora"]], [bad["lora"], out, "--rank", "2"]):
        refused("LoRA '.*bad_lora.safetensors' is damaged: .* not finite", convert, line)
    large = ldm.load(file, device="cpu")
    large.model.diffusion_model.out[2].bias.data[0] = 1e5
    ldm.save(large, tmp_path / "large.safetensors")
    for format in ("ldm", "compvis", "diffusers"):
        line = [str(tmp_path / "large.safetensors"), out, "--dtype", "fp16", "--format", format]
        refused("has 1e.05 in .*, too large for torch.float16", convert, line)
    assert not Path(out).exists()
