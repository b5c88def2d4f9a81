"""ldm/finetune/lora.py: what adapters compute, where they sit, merging and its undoing, smaller ranks."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from lora_models import EVERY_TARGET, distance, inputs, learned, outputs, tiny
from tiny_stable_diffusion import SD1, changed
from torch import nn

from ldm.checkpoint.compvis_config import from_compvis
from ldm.conditioning.text import TextEncoder
from ldm.finetune import lora
from ldm.finetune.lora_names import layers_of
from ldm.input_files import read_yaml
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.attention import CrossAttention
from ldm.util import Unfilled, instantiate_network

KINDS = ("sd1", "sd2")
# Outputs are of order 1 and pass through some twenty layers; a different order of sums moves them by a few 1e-7 each.
ROUNDING = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny(request.param)


@pytest.fixture
def adapted(model):
    """(the model, its adapters at all kinds of layers); afterwards they are taken off."""
    adapters = learned(model)
    yield model, adapters
    lora.detach(adapters)


def test_a_linear_layer_and_convolutions_of_every_kind_by_the_equation():
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 3, 2, padding=1))
    for layer in layers:
        network = nn.Sequential(layer).double()
        adapter = lora.attach(network, rank=2, alpha=3.0, targets=["0"])["0"].double()
        adapter.up.data.normal_()
        adapter.strength = 0.7
        x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 8, 8)
        change = torch.einsum("or,r...->o...", adapter.up.flatten(1), adapter.down)  # Hu et al. 2021, section 4.1
        weight = layer.weight + 0.7 * 3.0 / 2 * change
        if isinstance(layer, nn.Linear):
            wanted = F.linear(x.double(), weight, layer.bias)
        else:
            wanted = F.conv2d(x.double(), weight, layer.bias, layer.stride, layer.padding)
        assert torch.allclose(network(x.double()), wanted, atol=1e-12)
        assert torch.allclose(layer.weight + adapter.delta(), weight, atol=1e-6)  # which is in float32


def test_it_begins_as_nothing_as_in_the_paper_and_by_a_seed(model):
    plain = outputs(model)
    adapters, again, other = (lora.attach(model, 4, seed=seed) for seed in (0, 0, 1))
    assert distance(outputs(model), plain) == 0
    for name, adapter in adapters.items():
        assert torch.equal(adapter.down, again[name].down) and not torch.equal(adapter.down, other[name].down)
        assert not adapter.up.any() and adapter.alpha == adapter.rank == 4
    values = torch.cat([adapter.down.detach().flatten() for adapter in adapters.values()])
    assert abs(values.std().item() - 1 / 4) < 5 * 0.25 / (2 * len(values)) ** 0.5 and values.mean().abs() < 0.02
    for each in (adapters, again, other):
        lora.detach(each)


def test_the_default_is_the_attention_of_unet_and_text_encoder(model):
    adapters = lora.attach(model, 1)
    lora.detach(adapters)
    blocks = ("input_blocks.1.1", "input_blocks.3.1", "middle_block.1")
    blocks += ("output_blocks.2.1", "output_blocks.3.1", "output_blocks.4.1", "output_blocks.5.1")
    wanted = {
        f"model.diffusion_model.{block}.transformer_blocks.0.{attention}.{layer}"
        for block in blocks
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }
    attention = "transformer.text_model.encoder.layers.{}.self_attn"
    if model.cond_stage_model.layout == "openclip":  # of its three blocks, the last is not read
        attention = "model.transformer.resblocks.{}.attn"
    wanted |= {f"cond_stage_model.{attention.format(i)}.{part}_proj" for i in (0, 1) for part in ("q", "k", "v", "out")}
    assert adapters.keys() == wanted


def test_further_layers_are_chosen_by_group_or_pattern(model):
    names = list(lora.places(model))
    assert not any(name.startswith("first_stage_model") for name in names)
    feed_forward = lora.select(names, ["feed_forward"])
    assert len(feed_forward) == 14 and all(n.endswith((".ff.net.0.proj", ".ff.net.2")) for n in feed_forward)
    convolutions = lora.select(names, ["convolution"])
    assert sum(name.endswith((".op", ".conv")) for name in convolutions) == 4
    assert sum(name.endswith("in_layers.2") for name in convolutions) == 3 + 2 + 6
    assert len(lora.select(names, [r"attn2\.to_[kv]$"])) == 14  # Custom Diffusion's
    assert len(lora.select(names, ["projection"])) == 14
    assert len(lora.select(names, ["text_feed_forward"])) == 4
    assert lora.select(names, ["attention", r"to_q$"]) == lora.select(names, ["attention"])  # each once


@pytest.mark.parametrize("version, text", [("v1", 72), ("v2", 138)])
def test_stable_diffusion_has_as_many_layers_as_sd_scripts_counts(version, text):
    """It prints "create LoRA for U-Net: 192 modules" and 72 or (23 blocks of six) 138 for the text encoder."""
    config = from_compvis(read_yaml(Path(__file__).parents[1] / f"configs/stable-diffusion/{version}-inference.yaml"))
    with Unfilled():
        model = instantiate_network(config)
    names = list(layers_of(model))
    unet = lora.select([n for n in names if n.startswith("unet")], ["attention", "feed_forward", "projection"])
    assert len(unet) == 192
    assert len(lora.select(names, ["text", "text_feed_forward"])) == text
    convolutions = lora.select([ours for ours in layers_of(model).values()], ["convolution"])
    # two convolutions in each of 22 residual blocks, 12 + 2 shortcuts where widths change, 3 + 3 between the levels
    assert len(convolutions) == 2 * 22 + 14 + 6


def test_a_network_alone_can_be_adapted():
    unet = tiny("sd1").model.diffusion_model
    adapters = lora.attach(unet, 2)
    assert len(adapters) == 56 and "input_blocks.1.1.transformer_blocks.0.attn1.to_q" in adapters
    encoder = tiny("sd2").cond_stage_model
    assert len(lora.attach(encoder, 2)) == 8


def test_merged_is_as_applied(adapted):
    model, adapters = adapted
    applied = outputs(model)
    lora.detach(adapters)
    plain = outputs(model)
    kept = lora.merge(model, adapters)
    merged = outputs(model)
    lora.restore(model, kept)
    assert distance(applied, plain) > 0.1
    assert distance(applied, merged) < ROUNDING
    assert distance(outputs(model), plain) == 0


def test_several_add_up_and_strengths_are_linear(model):
    first, second = learned(model, seed=0), learned(model, rank=2, seed=7)
    before = {name: place.weight.clone() for name, place in lora.places(model).items()}
    for adapter in first.values():
        adapter.strength = 0.8
    for adapter in second.values():
        adapter.strength = -0.5
    both = outputs(model)
    kept = lora.merge(model, first)
    kept_later = lora.merge(model, second)
    assert distance(outputs(model), both) < ROUNDING
    for name, place in lora.places(model).items():
        if name in first:
            change = 0.8 * (2 / 3) * product(first[name]) - 0.5 * (2 / 2) * product(second[name])
            assert torch.allclose(place.weight, before[name] + change, atol=1e-6), name
    lora.restore(model, kept_later)
    lora.restore(model, kept)
    assert all(torch.equal(place.weight, before[name]) for name, place in lora.places(model).items())


def product(adapter):
    return torch.einsum("or,r...->o...", adapter.up.detach().flatten(1), adapter.down.detach())


def test_strength_nought_is_nothing(adapted):
    model, adapters = adapted
    for adapter in adapters.values():
        adapter.strength = 0.0
    with_nothing = outputs(model)
    lora.detach(adapters)
    assert distance(outputs(model), with_nothing) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_rounds_once_and_is_undone_bit_for_bit(dtype):
    model = tiny("sd2").to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = learned(model)
    kept = lora.merge(model, adapters)
    after = model.state_dict()
    for name, place in lora.places(model).items():
        if name in adapters and place.part is None:
            exact = before[place.parameter].float() + adapters[name].delta()
            assert torch.equal(after[place.parameter], exact.to(dtype))
    stacked = "cond_stage_model.model.transformer.resblocks.0.attn"
    exact = torch.cat([adapters[f"{stacked}.{part}_proj"].delta() for part in "qkv"])
    assert torch.equal(after[f"{stacked}.in_proj_weight"], (before[f"{stacked}.in_proj_weight"] + exact).to(dtype))
    assert kept.keys() == {name for name in before if not torch.equal(before[name], after[name])}
    lora.restore(model, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    both = lora.merge(model, adapters)
    both = lora.merge(model, learned(model, seed=3)) | both
    lora.restore(model, both)  # of two, at once
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_network_keeps_names_modules_and_output_without_them(model):
    plain, state, kinds = outputs(model), model.state_dict(), [type(module) for module in model.modules()]
    adapters = learned(model)
    assert distance(outputs(model), plain) > 0.1
    assert model.state_dict().keys() == state.keys()
    assert [type(module) for module in model.modules()] == kinds
    lora.detach(adapters)
    assert distance(outputs(model), plain) == 0
    lora.detach(adapters)  # of what is off already
    lora.connect(model, adapters)
    assert distance(outputs(model), plain) > 0.1
    lora.detach(adapters)


def loss(model):
    x, t, _, tokens = inputs()
    return model.apply_model(x, t, model.cond_stage_model(tokens)).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_adapters_and_nothing_else(kind):
    model = tiny(kind)
    adapters = lora.attach(model, 3, targets=EVERY_TARGET)
    loss(model).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, adapter in adapters.items():
        assert adapter.up.grad.any(), name
        assert not adapter.down.grad.any(), name  # as long as up is nought
    before = loss(model).item()
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up -= 1e-3 * adapter.up.grad
    loss(model).backward()
    assert loss(model).item() < before
    assert all(adapter.down.grad.any() for adapter in adapters.values())


def test_gradients_are_the_same_with_gradient_checkpointing():
    gradients = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = LatentDiffusion(**changed(SD1, "unet", use_checkpoint=flag)).requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        adapters = learned(model)
        loss(model).backward()
        gradients.append([adapter.down.grad for adapter in adapters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


def test_a_replaced_attention_forward_still_sees_them(adapted, monkeypatch):
    """Research code replaces CrossAttention.forward, and calls to_q, to_k, to_v and to_out."""
    model, adapters = adapted
    wanted, seen = outputs(model), []

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.project(x, context))
        attended = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        seen.append(attended)
        return self.to_out((attended @ v).transpose(1, 2).flatten(2))

    def project(self, x, context):
        return self.to_q(x), self.to_k(context), self.to_v(context)

    monkeypatch.setattr(CrossAttention, "project", project, raising=False)
    monkeypatch.setattr(CrossAttention, "forward", forward)
    assert distance(outputs(model), wanted) < ROUNDING and len(seen) == 14
    lora.detach(adapters)
    assert distance(outputs(model), wanted) > 0.1


def test_half_precision_networks_keep_their_dtype():
    model = tiny("sd2").to(torch.bfloat16)
    adapters = learned(model)
    x, t, context, tokens = inputs()
    with torch.no_grad():
        unet = model.model.diffusion_model(x.bfloat16(), t, context=context)
        text = model.cond_stage_model(tokens)["c_crossattn"]
    assert unet.dtype == text.dtype == torch.bfloat16
    assert all(adapter.down.dtype == torch.float32 for adapter in adapters.values())


def test_under_autocast_adapters_compute_as_the_layers_do(adapted):
    model, adapters = adapted
    dtypes = set()
    hooks = [
        a.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype)) for a in adapters.values()
    ]
    wanted = outputs(model)
    assert dtypes == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model)
    assert dtypes == {torch.float32, torch.bfloat16}
    assert distance(found, wanted) < 0.1  # bfloat16 has eight bits, and the outputs are up to 3
    for hook in hooks:
        hook.remove()


def test_a_deep_copy_is_independent():
    """An average of the weights is kept in a deep copy; OpenCLIP's stacked projection is hooked by hand."""
    encoder = tiny("sd2").cond_stage_model
    adapters = learned(encoder, targets=["text"])
    tokens = inputs()[3]
    copy, wanted = deepcopy(encoder), encoder(tokens)["c_crossattn"]
    assert torch.equal(copy(tokens)["c_crossattn"], wanted)
    lora.detach(adapters)
    assert torch.equal(copy(tokens)["c_crossattn"], wanted)
    assert not torch.allclose(encoder(tokens)["c_crossattn"], wanted, atol=0.01)
    copy.model.transformer.resblocks[0].attn.in_proj_weight.data.zero_()
    assert not torch.allclose(copy(tokens)["c_crossattn"], wanted, atol=0.01)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_block_that_is_not_read_is_adapted_only_where_it_is(pooled):
    settings = {"layout": "openclip", "width": 32, "layers": 3, "heads": 2, "activation": "gelu", "vocab_size": 514}
    settings |= {"context_length": 8, "layer": "penultimate", "pooled": pooled, "tokenizer": {"merges": []}}
    encoder = TextEncoder(**settings)
    assert len(lora.select(list(lora.places(encoder)), ["text"])) == (12 if pooled else 8)


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_a_smaller_rank_is_the_truncated_singular_value_decomposition(kernel):
    torch.manual_seed(0)
    sizes = () if kernel is None else (kernel, kernel)
    down, up = torch.randn(8, 12, *sizes), torch.randn(10, 8, *[1] * len(sizes))
    adapter = lora.Adapter(down, up, alpha=4.0, strength=0.9)
    u, s, vh = torch.linalg.svd(adapter.delta().double().flatten(1), full_matrices=False)
    smaller, kept, total = lora.resized(adapter, 3)
    assert smaller.rank == 3 and smaller.alpha == 1.5 and smaller.strength == 0.9
    nearest = (u[:, :3] * s[:3]) @ vh[:3]
    assert torch.allclose(smaller.delta().flatten(1).double(), nearest, atol=1e-5)
    assert kept == pytest.approx(s[:3].square().sum().item(), rel=1e-5)
    assert total == pytest.approx(s.square().sum().item(), rel=1e-5)
    same = lora.resized(adapter, 8)
    assert same.adapter is adapter and same.kept == same.total


def test_a_rank_above_what_the_layer_can_have_is_cut_to_it():
    adapter = lora.Adapter(torch.randn(6, 3), torch.randn(4, 6), alpha=6)
    smaller = lora.resized(adapter, 5).adapter
    assert smaller.rank == 3 and smaller.scale == adapter.scale
    assert torch.allclose(smaller.delta(), adapter.delta(), atol=1e-5)


def test_mistakes_are_named(model):
    for rank in (0, 10**5):
        refused(f"rank {rank} must be at least 1 and at most 8192", lora.attach, model, rank)
    with pytest.raises(ValueError, match=r"'to_x' fits no layer: it is one of attention, .* names such as model\."):
        lora.attach(model, 4, targets=["attention", "to_x"])
    refused(r"'to_\(q' is not a regular expression", lora.attach, model, 4, targets=["to_(q"])
    refused("no layers to adapt among text", lora.attach, model.model, 4, targets=["text"])
    with pytest.raises(ValueError, match=r"down \(2, 3\) and up \(4, 3\) are not two matrices of one rank"):
        lora.Adapter(torch.ones(2, 3), torch.ones(4, 3), alpha=1)
