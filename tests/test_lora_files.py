"""ldm/finetune/lora_files.py: every naming read, both formats written, what is refused, ranks made smaller.

The names that each program gives a layer are spelled out here; test_lora_peers.py has files that the programs wrote.
"""

import json
import re

import pytest
import torch
from conftest import refused
from lora_models import ATTENTION, LAYERS, NAMINGS, RANK, TEXT, UNET, distance, file_of, learned, outputs, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import SD1, changed

import ldm
from ldm.finetune import lora
from ldm.finetune.lora_files import (
    apply_lora,
    holds_lora,
    load_lora,
    merge_lora,
    read_lora,
    rewrite,
    save_lora,
    split_strength,
)
from ldm.finetune.lora_names import layers_of, parse, to_kohya
from ldm.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def model():
    return tiny("sd1")


@pytest.fixture(scope="module")
def second():
    return tiny("sd2")


@pytest.fixture(scope="module")
def adapters(model):
    targets = [f"^{re.escape(name)}$" for name in LAYERS]
    found = learned(model, RANK, alpha=2.0, targets=targets, attached=False)
    assert found.keys() == LAYERS.keys()
    return found


@pytest.fixture
def written(adapters, model, tmp_path):
    save_lora(tmp_path / "lora.safetensors", adapters, model)
    return tmp_path / "lora.safetensors"


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].down, b[n].down) and torch.equal(a[n].up, b[n].up) and a[n].alpha == b[n].alpha for n in a
    )


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_read(naming, adapters, model, tmp_path):
    layers, _, (_, _, alpha) = NAMINGS[naming]
    save_file(file_of(adapters, naming), tmp_path / "x.safetensors")
    found, notes = load_lora(tmp_path / "x.safetensors", model)
    assert notes == []
    wanted = {
        name: lora.Adapter(adapters[name].down, adapters[name].up, RANK if alpha is None else 2.0) for name in layers
    }
    assert equal(found, wanted)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.ckpt"])
def test_pickled_files_are_read_without_being_run(name, adapters, model, tmp_path):
    state = file_of(adapters, "kohya")
    torch.save({"state_dict": state} if name == "lora.ckpt" else state, tmp_path / name)
    assert equal(load_lora(tmp_path / name, model)[0], adapters)


def test_names_of_stable_diffusion_2_are_openclip_s_thirds(second, tmp_path):
    adapters = learned(second, RANK, targets=["text", "text_feed_forward"], attached=False)
    save_lora(tmp_path / "x.safetensors", adapters, second)
    names = {name.partition(".")[0] for name in load_file(tmp_path / "x.safetensors")}
    layer = "lora_te_text_model_encoder_layers_{}_{}"
    parts = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    assert names == {layer.format(i, part) for i in (0, 1) for part in parts}
    assert equal(load_lora(tmp_path / "x.safetensors", second)[0], adapters)
    third = adapters["cond_stage_model.model.transformer.resblocks.1.attn.v_proj"]
    assert torch.equal(
        load_file(tmp_path / "x.safetensors")[layer.format(1, "self_attn_v_proj.lora_up.weight")], third.up
    )
    state = {
        "lora_te_model_transformer_resblocks_1_mlp_c_fc.lora_down.weight": torch.ones(RANK, 32),
        "lora_te_model_transformer_resblocks_1_mlp_c_fc.lora_up.weight": torch.ones(128, RANK),
    }
    save_file(state, tmp_path / "own.safetensors")  # open_clip's own names
    assert list(load_lora(tmp_path / "own.safetensors", second)[0]) == [
        "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc"
    ]


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_each_layer_has_one_name_that_can_be_taken_apart(kind):
    model = tiny(kind)
    theirs = layers_of(model)
    assert set(theirs.values()) == set(lora.places(model))
    for layer in theirs:
        assert parse(f"{to_kohya(layer, False)}.lora_down.weight") == (layer, "down")
        assert parse(f"{layer}.lora_B.weight") == (layer, "up")


@pytest.mark.parametrize("format", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_round_trip_keeps_every_bit_and_alpha(kind, format, tmp_path):
    model = tiny(kind)
    adapters = learned(model, RANK, alpha=2.5, attached=False)
    first = next(iter(adapters))
    adapters[first] = lora.resized(adapters[first], 1).adapter  # ranks and alphas may differ
    adapters[first].alpha = 0.3125
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    save_lora(paths[0], adapters, model, format, metadata={"about": "a test"})
    found, notes = load_lora(paths[0], model)
    assert notes == [] and equal(found, adapters)
    save_lora(paths[1], found, model, format, metadata={"about": "a test"})
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_half_precision_halves_the_file(adapters, model, written, tmp_path):
    save_lora(tmp_path / "half.safetensors", adapters, model, dtype=torch.float16)
    half = load_lora(tmp_path / "half.safetensors", model)[0]
    assert all(torch.equal(half[name].down, adapters[name].down.half().float()) for name in adapters)
    assert all(half[name].down.dtype == torch.float32 for name in adapters)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in (written, tmp_path / "half.safetensors")]
    assert sizes[1] < 0.51 * sizes[0]


def test_headers_say_rank_and_alpha(adapters, model, written, tmp_path):
    with safe_open(written, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "3",
            "ss_network_alpha": "2.0",
        }
    save_lora(tmp_path / "peft.safetensors", adapters, model, "peft")
    with safe_open(tmp_path / "peft.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == settings["text_encoder.r"] == 3
    assert settings["unet.lora_alpha"] == settings["text_encoder.lora_alpha"] == 2.0
    assert "encoder.layers.0.self_attn.q_proj" in settings["text_encoder.target_modules"]
    assert len(settings["unet.target_modules"]) == 15


def test_alpha_of_peft_settings(adapters, model, tmp_path):
    state = file_of(adapters, "peft")
    settings = {
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {r".*attn1\.to_q": 12, "conv1": 1.5},
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 9,
        "text_encoder.alpha_pattern": None,
    }
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    found, _ = load_lora(tmp_path / "x.safetensors", model)
    for ours, adapter in found.items():
        if ours.startswith(TEXT):
            assert adapter.scale == 9 / 3
        else:  # rank-stabilised
            alpha = 12 if "attn1.to_q" in ours else 1.5 if ours.endswith("in_layers.2") else 6
            assert adapter.scale == pytest.approx(alpha / 3**0.5, rel=1e-6)


def test_alpha_of_pefts_own_folder(adapters, model, tmp_path):
    save_file(file_of(adapters, "PEFT's own"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 3, "use_rslora": False}))
    found, _ = load_lora(tmp_path / "adapter_model.safetensors", model)
    assert {adapter.scale for adapter in found.values()} == {4.0}


def test_linear_layers_and_1x1_convolutions_stand_for_each_other(model, second, tmp_path):
    """proj_out is a convolution in Stable Diffusion 1 and linear in 2; the files of either kind are."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_out"
    down, up = torch.randn(RANK, 16), torch.randn(16, RANK)
    flat = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(flat, tmp_path / "flat.safetensors")
    save_file({n: t[:, :, None, None].clone() for n, t in flat.items()}, tmp_path / "convolution.safetensors")
    for own, ndim in ((model, 4), (second, 2)):
        for path in ("flat.safetensors", "convolution.safetensors"):
            ((_, adapter),) = load_lora(tmp_path / path, own)[0].items()
            assert adapter.down.ndim == adapter.up.ndim == ndim
            assert torch.equal(adapter.down.flatten(), down.flatten()) and adapter.alpha == RANK


def test_a_convolution_in_three_factors(model, tmp_path):
    """LyCORIS's: 1x1 down, k x k in the middle, 1x1 up, one after the other."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(4, 3, 3, 3), torch.randn(16, 4, 1, 1)
    state = {f"{name}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))}
    save_file(state, tmp_path / "x.safetensors")
    ((ours, adapter),) = load_lora(tmp_path / "x.safetensors", model)[0].items()
    x = torch.randn(2, 16, 8, 8)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(x, down), mid, padding=1), up)
    layer = lora.places(model)[ours].layer
    assert adapter.rank == 4 and torch.allclose(adapter(x, layer), wanted, rtol=1e-4, atol=1e-4)


def test_apply_and_merge_a_file_at_a_strength(model, adapters, written):
    plain = outputs(model)
    first = apply_lora(model, written, 0.5)
    second = apply_lora(model, written, 0.25)
    twice = outputs(model)
    lora.detach(first)
    lora.detach(second)
    kept = merge_lora(model, written, 0.75)
    merged = outputs(model)
    lora.restore(model, kept)
    assert distance(twice, merged) < 1e-5 and distance(twice, plain) > 0.1
    assert distance(outputs(model), plain) == 0
    for adapter in adapters.values():
        adapter.strength = 0.75
    lora.connect(model, adapters)
    assert distance(outputs(model), merged) < 1e-5
    lora.detach(adapters)
    for adapter in adapters.values():
        adapter.strength = 1.0


def test_the_model_that_ships_is_adapted_saved_and_loaded(tmp_path):
    model = ldm.load(device="cpu")
    adapters = learned(model, 4, targets=lora.DEFAULT_TARGETS, attached=False)
    sizes = {}
    for format in ("kohya", "peft"):
        path = tmp_path / f"{format}.safetensors"
        save_lora(path, adapters, model, format, torch.float16)
        assert load_lora(path, model)[0].keys() == adapters.keys()
        sizes[format] = path.stat().st_size
    assert max(sizes.values()) < 200_000
    before = model.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([500]), model.condition(["five"]))
    merge_lora(model, tmp_path / "kohya.safetensors")
    after = model.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([500]), model.condition(["five"]))
    assert (after - before).abs().max() > 0.01


def test_what_has_no_place_is_noted(model, adapters, tmp_path):
    state = file_of(adapters, "kohya")
    state |= {name.replace("down_blocks_0", "down_blocks_7"): t for name, t in state.items() if "down_blocks_0" in name}
    state |= {"loss": torch.zeros(1)}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    found, notes = load_lora(tmp_path / "x.safetensors", model)
    assert equal(found, adapters)
    assert len(notes) == 1 and "x.safetensors: 4 of its names have no place in this model" in notes[0]
    assert "loss" in notes[0] and "unet.down_blocks.7.downsamplers.0.conv" in notes[0]
    notes = model.notes
    model.notes = ["before"]
    lora.detach(apply_lora(model, tmp_path / "x.safetensors"))
    assert len(model.notes) == 2
    model.notes = notes


def test_a_layer_under_two_names_counts_once(model, adapters, tmp_path):
    name = f"{UNET}input_blocks.1.1.{ATTENTION}.to_q"
    both = {}
    for naming in ("kohya", "kohya, CompVis's blocks"):
        both |= {
            n: t.clone() for n, t in file_of(adapters, naming).items() if "_1_attn1_to_q" in n or "_0_attn1_to_q" in n
        }
    save_file(both, tmp_path / "x.safetensors")
    found, notes = load_lora(tmp_path / "x.safetensors", model)
    assert found.keys() == {name} and torch.equal(found[name].down, adapters[name].down)
    assert len(notes) == 1 and "1 of its names" in notes[0] and ATTENTION in notes[0]


def test_a_lora_for_another_architecture_is_refused(model, adapters, written, tmp_path):
    wider = LatentDiffusion(**changed(SD1, "unet", context_dim=48))
    with pytest.raises(
        ValueError,
        match=r"another architecture: it changes a weight \(16, 32\) of unet\..*attn2\.to_k, which is \(16, 48\)",
    ):
        load_lora(written, wider)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    refused("another architecture", merge_lora, wider, written)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wider.state_dict().items())
    state = {"lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight": torch.ones(2, 16)}
    state["lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight"] = torch.ones(16, 2)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"another architecture: this one has no unet\.down_blocks\.9\."):
        load_lora(tmp_path / "x.safetensors", model)


LAYER = "lora_unet_down_blocks_0_attentions_0_proj_in"
PAIR = {f"{LAYER}.lora_down.weight": torch.ones(2, 16), f"{LAYER}.lora_up.weight": torch.ones(16, 2)}
REFUSED = {
    "is a LoHa": {f"{LAYER}.hada_w1_a": torch.ones(2, 2), f"{LAYER}.alpha": torch.ones(())},
    "is a LoKr": {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.alpha": torch.ones(())},
    "is an OFT": {f"{LAYER}.oft_blocks": torch.ones(2, 2)},
    "is a DoRA": PAIR | {f"{LAYER}.dora_scale": torch.ones(16)},
    r"is a DoRA: only plain LoRA": PAIR | {"unet.conv_in.lora_magnitude_vector": torch.ones(16)},
    "is an IA3": {f"{LAYER}.weight": torch.ones(2), f"{LAYER}.on_input": torch.ones(())},
    "holds full weights": PAIR | {f"{LAYER}.diff": torch.ones(16)},
    "is for a diffusion transformer": {"transformer.single_blocks.0.x.lora_A.weight": torch.ones(2, 2)},
    "diffusion transformer": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
    "holds no LoRA weights; it has a, b": {"a": torch.ones(1), "b": torch.ones(1)},
    "is damaged: unet.conv_in lacks its matrix up": {"unet.conv_in.lora_A.weight": torch.ones(2, 2)},
    "is damaged at .*are not two matrices of one rank": PAIR | {f"{LAYER}.lora_up.weight": torch.ones(16, 3)},
    "is damaged at ": PAIR | {f"{LAYER}.alpha": torch.ones(3)},
    "is damaged at unet": PAIR | {f"{LAYER}.lora_mid.weight": torch.ones(3, 5, 1)},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_read_is_named(sentence, model, tmp_path):
    save_file(REFUSED[sentence], tmp_path / "x.safetensors")
    refused(f"^LoRA '.*x.safetensors' .*{sentence}", load_lora, tmp_path / "x.safetensors", model)


def test_headers_that_are_damaged(model, tmp_path):
    path = tmp_path / "x.safetensors"
    peft = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1)}
    for settings in (
        "{",
        "[1]",
        '{"unet.lora_alpha": "much"}',
        '{"unet.alpha_pattern": {"(": 1}}',
        '{"unet.alpha_pattern": 3}',
    ):
        save_file(peft, path, {"lora_adapter_metadata": settings})
        refused("is damaged.* its settings", read_lora, path)
    refused("does not exist", load_lora, tmp_path / "none.safetensors", model, error=FileNotFoundError)


def test_a_model_is_no_lora_and_the_reverse(model, written, tmp_path):
    ldm.save(model, tmp_path / "model.safetensors")
    assert not holds_lora(tmp_path / "model.safetensors") and holds_lora(written)
    refused("holds no LoRA weights; it has ", load_lora, tmp_path / "model.safetensors", model)


def test_layers_without_a_name_and_unknown_formats_are_not_written(model, adapters, tmp_path):
    with pytest.raises(ValueError, match=r"no name for 1 of the layers \(input_blocks\.0\.0\)"):
        save_lora(tmp_path / "x", {"input_blocks.0.0": adapters[f"{UNET}input_blocks.0.0"]}, model)
    refused("'loha' is unknown: it is one of kohya, peft", save_lora, tmp_path / "x", adapters, model, "loha")
    assert not (tmp_path / "x").exists()


def test_rewriting_changes_the_naming_alone(written, model, adapters, tmp_path):
    peft, back = tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    assert rewrite(written, peft, format="peft") == [] and rewrite(peft, back, format="kohya") == []
    assert back.read_bytes() == written.read_bytes()
    assert set(load_file(peft)) == {f"{t}.lora_{x}.weight" for t in LAYERS.values() for x in "AB"}
    rewrite(written, back)  # as it is
    assert back.read_bytes() == written.read_bytes()
    rewrite(written, back, dtype=torch.float16)
    assert {t.dtype for name, t in load_file(back).items() if not name.endswith("alpha")} == {torch.float16}
    rewrite(back, peft, format="peft")
    assert {t.dtype for t in load_file(peft).values()} == {torch.float16}


def test_rewriting_gives_compvis_blocks_their_names_in_stable_diffusion(tmp_path):
    pairs = {
        "input_blocks.4.1": "down_blocks.1.attentions.0",
        "middle_block.1": "mid_block.attentions.0",
        "output_blocks.5.1": "up_blocks.1.attentions.2",
        "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
        "input_blocks.10.0.in_layers.2": "down_blocks.3.resnets.0.conv1",
        "time_embed.0": "time_embedding.linear_1",
    }
    pairs = {
        f"{o}.proj_in" if o.endswith(".1") else o: f"{t}.proj_in" if o.endswith(".1") else t for o, t in pairs.items()
    }
    state = {
        f"lora_unet_{o.replace('.', '_')}.lora_{x}.weight": torch.ones(2, 2) for o in pairs for x in ("down", "up")
    }
    save_file(state, tmp_path / "x.safetensors")
    rewrite(tmp_path / "x.safetensors", tmp_path / "y.safetensors", format="peft")
    assert set(load_file(tmp_path / "y.safetensors")) == {
        f"unet.{t}.lora_{x}.weight" for t in pairs.values() for x in "AB"
    }
    other = {name.replace("input_blocks_4_", "input_blocks_14_"): tensor for name, tensor in state.items()}
    save_file(other, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match="x.safetensors' is not for Stable Diffusion 1, 2 or XL: .*input_blocks.14.1.proj_in"
    ):
        rewrite(tmp_path / "x.safetensors", tmp_path / "z.safetensors", format="peft")
    assert not (tmp_path / "z.safetensors").exists()


def test_a_smaller_rank_of_a_file(written, model, adapters, tmp_path):
    small = tmp_path / "small.safetensors"
    (note,) = rewrite(written, small, rank=1)
    found, _ = load_lora(small, model)
    singular = {n: torch.linalg.svdvals(a.delta().double().flatten(1)).square() for n, a in adapters.items()}
    kept, whole = (sum(s[:k].sum() for s in singular.values()).item() for k in (1, None))
    least = min(singular, key=lambda n: singular[n][0] / singular[n].sum())
    share = (singular[least][0] / singular[least].sum()).item()
    assert note.startswith(f"rank 1: {kept / whole:.2%} of the change")
    assert f"at least {share:.2%} in each ({LAYERS[least]})" in note
    for name, adapter in found.items():
        assert adapter.rank == 1 and adapter.scale == pytest.approx(adapters[name].scale)
        error = (adapters[name].delta() - adapter.delta()).double().square().sum()
        assert error.item() == pytest.approx(singular[name][1:].sum().item(), rel=1e-3)
    with safe_open(small, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "1"
    refused("rank 0 must be at least 1", rewrite, written, small, rank=0)


def test_what_the_header_says_of_training_stays_and_old_hashes_go(written, tmp_path):
    save_file(
        load_file(written),
        tmp_path / "x.safetensors",
        {"ss_steps": "400", "sshs_model_hash": "12", "ss_network_dim": "9"},
    )
    rewrite(tmp_path / "x.safetensors", tmp_path / "y.safetensors", rank=2)
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_steps"] == "400" and found["ss_network_dim"] == "2" and "sshs_model_hash" not in found


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a:b.safetensors:-1", ("a:b.safetensors", -1.0)),
        ("folder:1/a.safetensors", ("folder:1/a.safetensors", 1.0)),
        ("a.safetensors:.5", ("a.safetensors", 0.5)),
        ("a.safetensors:1e-3", ("a.safetensors", 0.001)),
        (":0.5", (":0.5", 1.0)),
    ],
)
def test_file_and_strength(text, wanted):
    path, strength = split_strength(text)
    assert (str(path), strength) == wanted


def test_a_strength_is_finite():
    refused("the strength '1e999' of a.safetensors is not a finite number", split_strength, "a.safetensors:1e999")


def damaged(path, to, end, value):
    """Copy a LoRA file with one number, or the only one, of the first tensor with this ending replaced."""
    state = load_file(path)
    name = next(name for name in state if name.endswith(end))
    state[name] = torch.zeros_like(state[name]) + state[name]
    state[name].view(-1)[0] = value
    save_file(state, to)
    return to


@pytest.mark.parametrize("end", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(written, model, tmp_path, end, value):
    before, path = list(model.changes), damaged(written, tmp_path / "bad.safetensors", end, value)
    for read in (read_lora, lambda path: apply_lora(model, path), lambda path: rewrite(path, tmp_path / "x", rank=1)):
        refused(r"LoRA '.*bad.safetensors' is damaged.*finite", read, path)
    assert model.changes == before and not (tmp_path / "x").exists()


def test_alphas_and_ranks_that_cannot_be(tmp_path):
    layer, down, up = "unet.x.to_q", torch.ones(2, 4), torch.ones(4, 2)
    cases = {
        "NaN": ({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, '{"unet.lora_alpha": NaN}'),
        "rank 0": ({f"{layer}.lora_A.weight": down[:0], f"{layer}.lora_B.weight": up[:, :0]}, "{}"),
    }
    for sentence, (state, settings) in cases.items():
        save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
        refused(f"is damaged at {layer}: (?i:.*{sentence})", read_lora, tmp_path / "a.safetensors")
    torch.save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.alpha": up}, tmp_path / "a.pt")
    refused("is damaged at", read_lora, tmp_path / "a.pt")


def test_a_merge_that_overflows_changes_nothing(written, model):
    half = tiny("sd1").half()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    refused(
        "LoRA at strength 1e.07: the merged model has .* too large for torch.float16", merge_lora, half, written, 1e7
    )
    refused("the merged model holds weights that are not finite", merge_lora, half, written, float("nan"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())
    assert ldm.changes.changes_of(half) == ()


def test_what_vanishes_or_does_nothing_is_said(written, model, tmp_path):
    weak = tmp_path / "weak.safetensors"
    state = {n: t * 1e-9 if n.endswith("up.weight") else t for n, t in load_file(written).items()}
    save_file(state, weak)
    assert rewrite(weak, tmp_path / "x", dtype=torch.bfloat16) == []
    (note,) = rewrite(weak, tmp_path / "x", dtype=torch.float16)
    assert re.search(r"\d\d\.\d% of the nonzero weights are too small for torch.float16", note)
    assert load_lora(weak, model)[1] == []
    refused("too large for torch.float16", rewrite, damaged(weak, weak, "up.weight", 1e5), tmp_path / "y", None, None,
            torch.float16)  # fmt: skip
    assert not (tmp_path / "y").exists()
    save_file({n: t if n.endswith("alpha") else t * 0 for n, t in state.items()}, weak)
    for notes in (load_lora(weak, model)[1], rewrite(weak, tmp_path / "x")):
        assert len(notes) == 1 and "it changes nothing" in notes[0]
