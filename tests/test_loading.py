"""A path -> a model and back: bit for bit, strictly, and without doing more than that takes."""

import copy
import random
import struct
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from torch import nn

import ldm
from ldm.checkpoint.file import file_hash, load_file
from ldm.checkpoint.networks import check_targets
from ldm.checkpoint.writing import save_file
from ldm.loading import load_network
from ldm.util import Unfilled

load = partial(ldm.load, device="cpu")


def pixels(model) -> np.ndarray:
    return np.stack([np.asarray(image) for image in model.generate(["five", ""], steps=2)])


@pytest.mark.smoke
def test_round_trip_is_bit_exact(tiny_model, tiny_checkpoint):
    model = load(str(tiny_checkpoint))
    assert model.path == tiny_checkpoint and not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    expected = tiny_model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert (model.prediction, model.scale_factor, model.schedule_params) == ("v", 1.0, {"name": "cosine"})
    assert model.defaults == tiny_model.defaults
    assert model.cond_stage_model.tokenizer.merges == ("f i", "v e</w>")
    assert np.array_equal(pixels(model), pixels(tiny_model))


def test_a_half_precision_file_and_half_precision_in_memory(tiny_model, tiny_checkpoint, tmp_path):
    path = tmp_path / "half.safetensors"
    ldm.save(tiny_model, path, torch.float16)
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = model.state_dict()
    for name, tensor in tiny_model.state_dict().items():
        wanted = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], wanted)
    # weights are bytes here; names and configuration take as much room in both files
    saved = tiny_checkpoint.stat().st_size - path.stat().st_size
    assert saved == pytest.approx(2 * sum(p.numel() for p in tiny_model.parameters()), rel=0.01)
    for dtype in (torch.bfloat16, "bf16"):
        assert {p.dtype for p in load(path, dtype=dtype).parameters()} == {torch.bfloat16}


def test_a_loaded_model_can_be_saved_over_its_own_file(tiny_checkpoint, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tiny_checkpoint.read_bytes())
    model = load(path)
    ldm.save(model, path)
    assert path.read_bytes() == tiny_checkpoint.read_bytes()


def test_weights_that_do_not_fit_are_listed(tiny_model, tmp_path):
    config = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": tiny_model.config}
    state = dict(tiny_model.state_dict())
    del state["model.diffusion_model.out.2.weight"], state["model.diffusion_model.out.2.bias"]
    state["unheard.of"] = torch.zeros(1)
    state["first_stage_model.quant_conv.bias"] = torch.zeros(3)
    save_file(tmp_path / "a", state, config)
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "a")
    assert str(caught.value) == (
        f"checkpoint '{tmp_path / 'a'}' does not fit its configuration: "
        "2 missing (model.diffusion_model.out.2.bias, model.diffusion_model.out.2.weight); "
        "1 unexpected (unheard.of); 1 of another shape (first_stage_model.quant_conv.bias)"
    )
    save_file(tmp_path / "b", {}, config)
    refused("missing \\(([\\w.]+, ){5}\\.\\.\\.\\)$", load, tmp_path / "b")


def test_what_is_not_a_complete_model(tiny_model, tmp_path):
    first_stage = tiny_model.config["first_stage_config"]
    save_file(tmp_path / "a", tiny_model.first_stage_model.state_dict(), first_stage)
    refused("holds a ldm.models.autoencoder.AutoencoderKL, not a complete model", load, tmp_path / "a")
    save_file(tmp_path / "b", tiny_model.first_stage_model.state_dict(), {"params": first_stage["params"]})
    refused("holds a None, not a complete model", load, tmp_path / "b")
    refused("names no target", load_network, tmp_path / "b")
    x = torch.rand(1, 1, 32, 32)
    network = load_network(tmp_path / "a")
    assert torch.equal(network(x, sample_posterior=False)[0], tiny_model.first_stage_model(x, False)[0])


@pytest.mark.parametrize(
    "damage",
    [
        *({"target": ["a"]}, {"params": "x"}, {"params": None}, {"prediction": []}),
        *({"schedule": {"name": "linear"} | wrong} for wrong in ({"T": "1000"}, {"start": 2.0})),
    ],
    ids=str,
)
def test_a_damaged_configuration_in_one_sentence(tiny_model, tmp_path, damage):
    config = {"target": "ldm.latent_diffusion.LatentDiffusion", "params": copy.deepcopy(tiny_model.config)}
    (config if damage.keys() <= config.keys() else config["params"]).update(damage)
    save_file(tmp_path / "a", tiny_model.state_dict(), config)
    refused(
        "^checkpoint '.*' has a (damaged configuration|configuration that cannot be built).*[^\\n]$",
        load,
        tmp_path / "a",
    )


def test_what_could_not_be_loaded_is_not_written(model, tmp_path):
    model.cond_stage_config = None  # while its network stays
    message = r"the model does not fit its configuration: \d+ unexpected \(cond_stage_model"
    refused(message, ldm.save, model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_models_that_ship_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("digits").path == load().path == ldm.loading.SHIPPED
    hint = "^checkpoint 'digit' does not exist; the models that ship: digits, digits-fast, emoji$"
    refused(hint, load, "digit", error=FileNotFoundError)
    (tmp_path / "digits").mkdir()  # a folder of images, say
    assert load("digits").path == ldm.loading.SHIPPED
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("of one's own")
    refused("checkpoint 'digits' ", load, "digits")  # a file of that name comes first


def test_a_wrong_part_is_named_by_its_own_file(model, tiny_checkpoint, tmp_path):
    judge = ldm.loading.SHIPPED.with_name("judge.safetensors")
    refused("judge.safetensors' holds a ldm.models.classifier.Judge, .* a model's unet", load, unet=judge)
    refused("judge.safetensors' holds a ldm.models.classifier.Judge, .* a model's vae", load, vae=judge)
    first_stage, path = model.config["first_stage_config"], tmp_path / "vae"
    save_file(path, {}, first_stage)
    refused("^checkpoint '.*vae' does not fit its configuration", load, tiny_checkpoint, vae=path)
    save_file(path, model.first_stage_model.state_dict(), {"params": first_stage["params"]})
    refused("^checkpoint '.*vae' .*names no target", load, tiny_checkpoint, vae=path)
    refused(r"^checkpoint '.*a' \(with unet: .*tiny", load, broken(tiny_checkpoint, tmp_path), unet=tiny_checkpoint)


def broken(checkpoint, folder):
    """A checkpoint without its text encoder's weights."""
    config, state = load_file(checkpoint)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("cond_stage_model.")}
    save_file(folder / "a", kept, config)
    return folder / "a"


@pytest.mark.parametrize("target", ["os.system", "torch.hub.load", "ldm.loading.load", "subprocess.Popen"])
def test_a_configuration_reaches_nothing_but_classes(tmp_path, target):
    params = {"command": f"touch {tmp_path}/hit", "args": ["touch", f"{tmp_path}/hit"]}
    save_file(tmp_path / "a", {"x": torch.zeros(1)}, {"target": target, "params": params})
    for function in (load, load_network):
        refused(f"'{target}'(, and a checkpoint may name only networks| is not a class)", function, tmp_path / "a")
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    "target",
    [
        *("ldm.compvis.encoders.FrozenCLIPTextEmbedder", "ldm.modules.encoders.modules.FrozenClipImageEmbedder"),
        *("ldm.finetune.dreambooth.DreamBoothStage", "ldm.training.autoencoder.AutoencoderStage"),
        *("ldm.training.diffusion.DiffusionStage", "ldm.data.folder.Folder", "torch.nn.Bilinear", "conftest.Path"),
    ],
)
@pytest.mark.parametrize("place", ["model", "part", "list"])
def test_a_checkpoint_names_only_networks_that_open_nothing(tiny_checkpoint, tmp_path, target, place, monkeypatch):
    config, state = load_file(tiny_checkpoint)
    named = {"target": target, "params": {"version": "someone/some-model"}}
    config["params"] |= {"part": {"cond_stage_config": named}, "list": {"defaults": [named]}}.get(place, {})
    save_file(tmp_path / "a", state, named if place == "model" else config)
    opened = []
    monkeypatch.setattr("socket.socket.connect", lambda *args: opened.append(args))
    refused(f"{target}', and a checkpoint may name only .*--config FILE", load, tmp_path / "a")
    assert opened == []


def test_a_checkpoint_may_name_a_package_that_the_user_allows(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text(
        "from ldm.conditioning.classes import ClassLabels\nclass Own(ClassLabels): pass"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config, state = load_file(tiny_checkpoint)
    save_file(tmp_path / "a", {}, {"target": "some_package.Own", "params": {"n_classes": 3}})
    refused("--allow some_package, or LDM_ALLOW=some_package", load_network, tmp_path / "a")
    monkeypatch.setenv("LDM_ALLOW", "some_package")
    assert type(load_network(tmp_path / "a")).__name__ == "Own"


@pytest.mark.parametrize("old", ["ldm.models.teaching.unet2d.UNet2D", "ldm.models.autoencoder.VQModel"])
def test_a_checkpoint_may_have_a_class_s_other_names(old):
    check_targets({"target": old, "params": {"lossconfig": {"target": "somewhere.Loss"}}})


def test_arguments_of_other_types_are_refused_in_a_sentence(tiny_model, tmp_path):
    for name in ("path", "vae", "unet", "config", "vocab"):
        refused(f"{'checkpoint' if name == 'path' else name} 5 must be a path", ldm.load, device="cpu", **{name: 5})
    for path in (5, b"a", ["a"]):
        refused("must be a path: a text or", ldm.load, path)
    for path in (None, 5):
        refused(f"the file to write {path} must be a path", ldm.save, tiny_model, path)
    refused("only models, as ldm.load returns, are saved: got NoneType", ldm.save, None, tmp_path / "a.safetensors")
    refused("checkpoint 5 must be a path", load_network, 5)


def test_a_folder_that_is_no_model_is_not_searched(tmp_path, monkeypatch):
    """`--ckpt /` searched the disk, and `--autoguide /` read all of it."""
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("searched"))
    for look in (ldm.load, file_hash, partial(ldm.load, vae=tmp_path)):
        refused("is not a diffusers folder: it holds no model_index.json", look, tmp_path)


def test_a_network_larger_than_the_file_is_not_built(tiny_checkpoint, tmp_path):
    config, state = load_file(tiny_checkpoint)
    config["params"]["unet_config"]["params"]["num_res_blocks"] = 1000
    save_file(tmp_path / "a", state, config)
    begin = time.perf_counter()
    refused(f"describes a network with more than {2 * len(state) + 4096} tensors", load, tmp_path / "a")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("first_stage", {"embed_dim": "four"}, "(cannot be built|does not fit)"),
        ("first_stage", {"ddconfig": {}}, "(cannot be built|does not fit)"),
        ("unet", {"norm_groups": 7}, "(cannot be built|does not fit)"),
        ("unet", {"model_channels": None}, "(cannot be built|does not fit)"),
        ("unet", {"model_channels": 10**30}, "cannot be built: [^\\n]*$"),  # without torch's own stack
        ("cond_stage", {"vocab_size": 3}, "(cannot be built|does not fit)"),
        ("cond_stage", {"target": "os.system"}, "damaged configuration .it names 'os.system', and"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_sentence(tiny_checkpoint, tmp_path, part, changes, message):
    config, state = load_file(tiny_checkpoint)
    own = config["params"][f"{part}_config"]
    if "target" in changes:
        own |= changes | {"params": {"command": f"touch {tmp_path}/hit"}}
    else:
        own["params"] |= changes
    save_file(tmp_path / "a", state, config)
    refused(f"^checkpoint .* {message}", load, tmp_path / "a")
    assert not (tmp_path / "hit").exists()


def test_flipped_bits_in_the_header_end_in_a_sentence(tiny_checkpoint, tmp_path):
    """Whatever bit of the header is flipped: a ValueError, or a model (a default, say, with another value)."""
    content = tiny_checkpoint.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    rng, failures = random.Random(0), 0
    bits = [*range(0, 64, 5), *(rng.randrange(64, 8 * (8 + length)) for _ in range(40))]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(damaged)
        try:
            load(tmp_path / "a")
        except ValueError:
            failures += 1
    assert failures > 30


def test_nothing_is_initialised_on_the_way(monkeypatch):
    """Neither by torch's own layers nor by modules that call an initialiser themselves."""
    reached = []
    for name in ("_no_grad_normal_", "_no_grad_uniform_", "_no_grad_trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda *arguments, name=name, **options: reached.append(name))
    with Unfilled():
        layers = nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(5, 6), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        assert nn.init.normal_(layers[0].weight, std=0.02) is layers[0].weight
        assert nn.init.kaiming_uniform_(tensor=layers[0].weight) is layers[0].weight
    assert all(p.is_meta for layer in layers for p in layer.parameters())
    assert reached == []


def test_loading_imports_nothing_heavy(warm_python, tiny_checkpoint):
    code = f"""
import sys, types
import ldm
assert isinstance(ldm.__version__, str)
assert isinstance(ldm.load, types.FunctionType)
model = ldm.load({str(tiny_checkpoint)!r}, device="cpu")
assert isinstance(model, ldm.LatentDiffusion)
import ldm.loading
assert isinstance(ldm.load, types.FunctionType)
print(sorted(name.rpartition(".")[2] for name in sys.modules if name.startswith("ldm.checkpoint.")))
heavy = ["torch._dynamo", "sympy", "transformers", "open_clip", "torchvision", "sklearn", "accelerate", "diffusers"]
assert isinstance(ldm.save, types.FunctionType)
print([name for name in heavy if name in sys.modules])
try:
    ldm.loda
except AttributeError as error:
    print(error)
"""
    done = warm_python(code)
    own = "['file', 'networks', 'tensors']\n"  # the reader of our own format, and no other
    assert (done.stdout, done.stderr) == (f"{own}[]\nmodule 'ldm' has no attribute 'loda'\n", "")
