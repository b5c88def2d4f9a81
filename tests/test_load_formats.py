"""`ldm.load` and `ldm.save` on everything people bring: CompVis's single files, diffusers' folders, parts, mistakes."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, refused
from meta_models import TINY_1, TINY_2
from safetensors.torch import save_file
from script_runs import load_script, recipe, runner, samples
from script_runs import pixels as script_pixels

import ldm
from ldm.checkpoint.compvis import single_file
from ldm.checkpoint.networks import MODEL_TARGET, PREFIXES
from ldm.latent_diffusion import LatentDiffusion

load = partial(ldm.load, device="cpu")

ROOT = Path(__file__).parents[1]
TINY_V = copy.deepcopy(TINY_2)
TINY_V["params"]["prediction"] = "v"
KINDS = {"sd1": TINY_1, "sd2-v": TINY_V}


def pixels(model) -> np.ndarray:
    images = model.generate(["a cat", "a dog"], steps=2, height=32, width=32)
    return np.stack([np.asarray(image) for image in images])


def same_weights(model, state) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.fixture(scope="module", params=list(KINDS))
def model(request):
    torch.manual_seed(0)
    return randomised(LatentDiffusion(**KINDS[request.param]["params"])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(model) -> dict:
    """What a CompVis checkpoint of this model holds: weights, buffers, position ids; no configuration of ours."""
    return single_file(model.state_dict(), {"target": MODEL_TARGET, "params": model.config})[0]


@pytest.fixture(scope="module")
def complete(theirs, tmp_path_factory) -> Path:
    """Such a checkpoint."""
    return write("zip", tmp_path_factory.mktemp("single") / "theirs.ckpt", theirs)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The model as a folder of diffusers, which no test changes."""
    path = tmp_path_factory.mktemp("diffusers") / "folder"
    ldm.save(model, path, format="diffusers")
    return path


class Callback:
    """Stands for Lightning's ModelCheckpoint, which .ckpt files hold: nothing may import or build it."""

    def __setstate__(self, state):
        raise AssertionError("code of a checkpoint ran")


def write(form: str, path: Path, state: dict) -> Path:
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        return path
    callback = Callback()
    callback.best = 0.5
    content = {"state_dict": state, "global_step": 7, "epoch": 1, "callbacks": {"ModelCheckpoint": callback}}
    if form == "nested":
        content = {"state_dict": content}
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "nested"])
def test_a_compvis_single_file(model, theirs, tmp_path, form):
    loaded = load(write(form, tmp_path / "model.ckpt", theirs))
    assert same_weights(loaded, model.state_dict())
    for setting in ("prediction", "scale_factor", "schedule_params", "concat"):
        assert getattr(loaded, setting) == getattr(model, setting)
    assert loaded.notes[0].startswith("recognised Stable Diffusion")
    assert any("prediction" in note for note in loaded.notes)
    assert loaded.defaults["scale"] == model.defaults["scale"]
    if model.config["unet_config"]["params"].get("num_heads") == 8:  # SD2's 64 channels a head leave none here
        assert np.array_equal(pixels(loaded), pixels(model))


@pytest.mark.smoke
@pytest.mark.parametrize("format", ["ldm", "compvis", "diffusers"])
def test_round_trips_are_bit_exact(model, tmp_path, request, format):
    path = tmp_path / "out"
    if format == "diffusers" and model.cond_stage_model.layout == "openclip":
        pytest.skip("diffusers keeps no text_projection: its own test compares what the model uses")
    if format == "diffusers":
        path = request.getfixturevalue("folder")
    else:
        ldm.save(model, path, format=format)
    loaded = load(path)
    assert same_weights(loaded, model.state_dict())
    assert np.array_equal(pixels(loaded), pixels(model))


@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_a_text_encoder_with_another_mlp_width(model, tmp_path, format):
    """As some CLIPs have; a single file shows it by the shapes of its weights."""
    config = copy.deepcopy(model.config)
    config["cond_stage_config"]["params"]["mlp_width"] = 40
    other = randomised(LatentDiffusion(**config)).eval().requires_grad_(False)
    path = tmp_path / "a"
    if format == "compvis":
        write("safetensors", path, single_file(other.state_dict(), {"target": MODEL_TARGET, "params": config})[0])
    else:
        ldm.save(other, path, format=format)
    (cond,) = load(path).condition(["a cat"]).values()
    assert torch.equal(cond, other.condition(["a cat"])["c_crossattn"])


@pytest.mark.parametrize("style", ["to_q to_k to_v to_out.0", "query key value proj_attn"])
def test_attention_of_a_first_stage_under_diffusers_names(model, theirs, tmp_path, style):
    """As programs write it that take a model of diffusers apart; linear layers, where CompVis has convolutions."""
    names = dict(zip(("q", "k", "v", "proj_out"), style.split(), strict=True)) | {"norm": "group_norm"}
    state = {}
    for name, tensor in theirs.items():
        if "mid.attn_1." in name:
            *head, layer, kind = name.split(".")
            name, tensor = ".".join([*head, names[layer], kind]), tensor.squeeze()
        state[name] = tensor
    assert len(state.keys() - theirs.keys()) == 20
    assert same_weights(load(write("safetensors", tmp_path / "a.safetensors", state)), model.state_dict())


def test_an_unknown_format_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="format 'gguf' is unknown: it is one of ldm, compvis, diffusers, onnx"):
        ldm.save(model, tmp_path / "out", format="gguf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(model, theirs, tmp_path, dtype):
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in theirs.items()}
    loaded = load(write("safetensors", tmp_path / "half.safetensors", half))
    assert same_weights(loaded, {name: half[name].float() for name in model.state_dict()})
    kept = load(tmp_path / "half.safetensors", dtype=dtype)
    assert {p.dtype for p in kept.parameters()} == {dtype}


def averages(model) -> dict:
    """A UNet's weights plus 1, as a CompVis checkpoint names averaged weights."""
    unet = {n: t for n, t in model.state_dict().items() if n.startswith(PREFIXES["unet"])}
    return {"model_ema." + name.removeprefix("model.").replace(".", ""): t + 1 for name, t in unet.items()}


def test_averaged_weights_when_asked(model, theirs, complete, tmp_path):
    prefix = PREFIXES["unet"]
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    path = write("zip", tmp_path / "ema.ckpt", theirs | averages(model) | counters)
    plain, averaged = load(path), load(path, ema=True)
    assert same_weights(plain, model.state_dict())
    found = averaged.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor + 1 if name.startswith(prefix) else tensor), name
    refused("has no averaged weights", load, complete, ema=True)


def test_names_that_vary(model, theirs, tmp_path):
    state = {name.replace("transformer.text_model.", "transformer."): t for name, t in theirs.items()}
    state = {name: t for name, t in state.items() if not name.endswith("position_ids")}
    assert same_weights(load(write("zip", tmp_path / "a.ckpt", state)), model.state_dict())


def test_another_first_stage_and_unet(model, theirs, complete, tmp_path):
    """From a file of the part alone, from a complete model, and where the checkpoint has none of its own."""
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in theirs.items()}
    both = write("zip", tmp_path / "other.ckpt", other)
    for option, prefix in (("vae", "first_stage_model."), ("unet", "model.diffusion_model.")):
        bare = {name.removeprefix(prefix): t for name, t in other.items() if name.startswith(prefix)}
        wanted = {n: t + 1 if n.startswith(prefix) else t for n, t in model.state_dict().items()}
        for part in (write("safetensors", tmp_path / f"{option}.safetensors", bare), both):
            loaded = load(complete, **{option: part})
            assert same_weights(loaded, wanted)
            assert any(str(part) in note for note in loaded.notes)
    without = {name: t for name, t in theirs.items() if not name.startswith("first_stage_model.")}
    path = write("zip", tmp_path / "without.ckpt", without)
    refused("has no first stage.*vae", load, path)
    assert "first_stage_model.post_quant_conv.bias" in load(path, vae=complete).state_dict()
    message = "holds a ldm.models.autoencoder.AutoencoderKL, not a complete model: load.*--vae"
    refused(message, load, tmp_path / "vae.safetensors")


def test_a_first_stage_as_a_folder_of_diffusers(model, theirs, folder, tmp_path):
    """As VAEs are published: config.json and weights, in a folder of their own."""
    without = {name: t for name, t in theirs.items() if not name.startswith("first_stage_model.")}
    loaded = load(write("zip", tmp_path / "a.ckpt", without), vae=folder / "vae")
    assert same_weights(loaded, model.state_dict())


def test_a_first_stage_for_other_latents_is_refused(complete, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    config = other / "vae" / "config.json"
    config.write_text(config.read_text().replace("0.18215", "0.5"))
    for vae in (other / "vae", other):
        refused("has scale factor 0.18215, and the first stage given has 0.5", load, complete, vae=vae)


def test_what_is_not_the_files_own_is_written_down(complete):
    plain = load(complete)
    assert plain.changes == []
    changes = load(complete, vae=complete, prediction="v").changes
    assert list(map(str, changes)) == [f"vae {plain.hash}", "prediction v"]


def test_a_part_for_one_of_our_own_files(tiny_model, tiny_checkpoint, tmp_path):
    from ldm.checkpoint.writing import save_file as save_own

    changed = {name: t + 1 for name, t in tiny_model.first_stage_model.state_dict().items()}
    save_own(tmp_path / "vae.safetensors", changed, tiny_model.config["first_stage_config"])
    loaded = load(tiny_checkpoint, vae=tmp_path / "vae.safetensors")
    assert same_weights(loaded.first_stage_model, changed)
    assert same_weights(loaded.model, tiny_model.model.state_dict())


def test_prediction_is_what_one_says(model, theirs, tmp_path):
    unmarked = {name: t for name, t in theirs.items() if name != "v_pred"}
    path = write("zip", tmp_path / "a.ckpt", unmarked)
    for prediction in ("eps", "x0", "v"):
        assert load(path, prediction=prediction).prediction == prediction
    refused("unknown prediction 'noise'", load, path, prediction="noise")


def test_compvis_yaml_as_configuration(complete, model, tmp_path):
    """`config=` takes CompVis's own yaml: a file with other sizes than it describes is listed name by name."""
    yaml = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
    refused(r"does not fit its configuration: \d+ missing.*of another shape", load, complete, config=yaml)
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({"model": {"target": MODEL_TARGET, "params": model.config}}))  # JSON is yaml
    assert np.array_equal(pixels(load(complete, config=own)), pixels(model))
    refused("configuration 'none.yaml' does not exist", load, complete, config="none.yaml", error=FileNotFoundError)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_scripts_generate_with_it_and_again_from_the_image(model, complete, folder, tmp_path, form):
    """A folder has no bytes of its own to hash: its parts' files are."""
    path = complete if form == "file" else shutil.copytree(folder, tmp_path / "model")
    generate = runner(load_script("txt2img"), path, tmp_path)
    first, *_ = samples(generate("--H", 32, "--W", 32, out="first"))
    (again,) = samples(generate("--from-png", first, out="again", steps=None))
    assert np.array_equal(script_pixels(first), script_pixels(again))
    assert len(recipe(first).model_hash) == 10
    if form == "folder":
        ldm.save(model, path, dtype=torch.float16, format="diffusers")
        with pytest.raises(ValueError, match=f"made by the model model with hash {recipe(first).model_hash}, but"):
            generate("--from-png", first, out="other", steps=None)


def test_what_would_change_nothing_is_refused(tiny_checkpoint, complete, folder):
    """ema, variant and config, where the file or folder has none or says it itself."""
    yaml = ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
    for path in (folder, tiny_checkpoint, complete):
        refused(f"{path.name}'.* has no averaged weights", load, path, ema=True)
    refused("folder' has its own configuration: load it without config", load, folder, config=yaml)
    refused("theirs.ckpt' is one file: only diffusers' folders have a variant 'fp16'", load, complete, variant="fp16")


def test_averaged_weights_beside_another_first_stage(model, theirs, complete, tmp_path):
    """`ema` is of the file that the UNet comes from; a first stage of another file need not have any."""
    unet, vae = PREFIXES["unet"], PREFIXES["first_stage"]
    averaged = write("zip", tmp_path / "ema.ckpt", theirs | averages(model))
    alone = {name.removeprefix(vae): t for name, t in theirs.items() if name.startswith(vae)}
    first_stage = write("safetensors", tmp_path / "vae.safetensors", alone)
    wanted = {n: t + 1 if n.startswith(unet) else t for n, t in model.state_dict().items()}
    assert same_weights(load(averaged, ema=True, vae=first_stage), wanted)
    assert same_weights(load(complete, ema=True, unet=averaged), wanted)


def test_parts_of_another_kind_are_told_by_their_own_names(theirs, complete, folder, tmp_path):
    for option, other in (("vae", "model.diffusion_model."), ("unet", "first_stage_model.")):
        bare = {name.removeprefix(other): t for name, t in theirs.items() if name.startswith(other)}
        part = write("safetensors", tmp_path / "part.safetensors", bare)
        message = f"part.safetensors' holds a ldm.*, which cannot be a model's {option}"
        refused(message, load, complete, **{option: part})
    for part, kind in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")):
        for options in ({"path": folder / part}, {"path": complete, "vae": folder / part}):
            refused(f"folder '.*{part}' holds a .*{kind}.* alone: supported are pipelines", load, **options)


def test_strictly(theirs, tmp_path):
    first = "model.diffusion_model.out.2.bias"
    damaged = {name: t for name, t in theirs.items() if name != first}
    damaged["model.diffusion_model.surplus.weight"] = torch.zeros(1)
    message = rf"1 missing \({first}\); 1 unexpected \(model.diffusion_model.surplus.weight\)"
    refused(message, load, write("zip", tmp_path / "a.ckpt", damaged))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_numbers_of_the_wrong_kind(theirs, tmp_path, dtype):
    name = "model.diffusion_model.out.2.bias"
    path = write("zip", tmp_path / "a.ckpt", theirs | {name: theirs[name].to(dtype)})
    refused(f"integers for floats, or floats for integers, in 1 tensors, such as {name} \\({dtype}\\)", load, path)


def test_what_is_no_model(tmp_path, complete):
    foreign = write("safetensors", tmp_path / "a.safetensors", {"joint_blocks.0.x": torch.zeros(1)})
    refused("checkpoint '.*a.safetensors': .*Stable Diffusion 3", load, foreign)
    (tmp_path / "empty").mkdir()
    refused("model_index.json", load, tmp_path / "empty")
    content = complete.read_bytes()
    for size in (0, 1000, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.ckpt").write_bytes(content[:size])
        refused("checkpoint '.*cut.ckpt'", load, tmp_path / "cut.ckpt")


def test_a_file_of_ours_in_diffusers(model, folder, tmp_path, monkeypatch):
    """from_single_file, offline, with the folder that we write as its configuration: the same image to 1e-5."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import StableDiffusionPipeline

    ldm.save(model, tmp_path / "single.safetensors", format="compvis")
    # only configurations: the weights come from the single file
    config = shutil.copytree(folder, tmp_path / "folder", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "single.safetensors"), config=str(config), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[model.prediction]
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("a cat", latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="np").images[0]
    steps = []
    model.generate(["a cat"], steps=4, scale=3.0, seed=3, height=32, width=32, callback=steps.append)
    ours = (model.decode(steps[-1].x) / 2 + 0.5).clamp(0, 1)
    assert np.abs(theirs - ours[0].permute(1, 2, 0).numpy()).max() < 1e-5
