"""The fast form of a model computes the same, over the same weights or in their place, and leaves nothing changed."""

import argparse
import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from compvis_models import built, clip_folder, config
from conftest import pixels, refused
from lora_models import learned
from PIL import Image
from torch import nn

import ldm
from ldm.cli import Parser
from ldm.commands import edit
from ldm.compvis.ema import LitEma
from ldm.editing import attention_maps
from ldm.finetune import lora
from ldm.inference import optimize as fast_forms
from ldm.inference import precision
from ldm.inference.compile import compile_unet
from ldm.inference.guiders import make_guide
from ldm.inference.optimize import (
    PackedConv2d,
    PackedLinear,
    gains,
    optimize,
    packs,
    routed,
    routing_pays,
    to_packed,
)
from ldm.inference.options import add_model_options, load_model
from ldm.inference.precision import set_precision
from ldm.inference.tiling import tile_vae

AGREE = 1e-5  # relative, in float32; measured: 1e-6


@pytest.fixture(autouse=True)
def tiny_layers_are_large(monkeypatch):
    monkeypatch.setattr(fast_forms, "PACKED_FROM", 300)
    monkeypatch.setattr(fast_forms, "WORTH_PACKING", 1000)


@pytest.fixture
def packed_here():
    if not packs(torch.float32):
        pytest.skip("this torch lacks oneDNN's operations on packed weights")


def outputs(model) -> list[torch.Tensor]:
    """What the UNet, the decoder and the encoder return."""
    generator = torch.Generator().manual_seed(0)
    x, image = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(1, 1, 32, 32, generator=generator)
    with torch.inference_mode():
        cond = model.condition(["a one", "a two"])
        return [
            model.apply_model(x, torch.tensor([10.0, 700.0]), cond),
            model.decode(x),
            model.encode(image, mode=True),
        ]


def off(model, expected) -> float:
    """The largest relative difference of the outputs."""
    return max(float((y - z).norm() / z.norm()) for y, z in zip(outputs(model), expected, strict=True))


def packed(model) -> list:
    return [m for m in model.modules() if isinstance(m, PackedConv2d | PackedLinear) and m.held is not None]


@pytest.mark.parametrize("consume", [False, True])
def test_it_computes_the_same(model, consume, packed_here):
    expected, kept = outputs(model), copy.deepcopy(model)
    fast = optimize(model, consume)
    assert off(fast, expected) < AGREE and off(fast, expected) < AGREE  # at the first call, and packed
    assert {type(m) for m in packed(fast)} == {PackedConv2d, PackedLinear} and len(packed(fast)) > 30
    assert type(fast) is type(kept)
    assert f"{len(fast_forms.large_layers(kept))} layers of 0 M weights are packed" in fast.notes[-1]
    if not consume:  # the plain model is what it was, to the bit, and can be trained
        assert not packed(model) and all(map(torch.equal, outputs(model), expected))
        assert model.state_dict().keys() == fast.state_dict().keys() == kept.state_dict().keys()


def test_images_of_the_model_that_ships(packed_here):
    model, prompts = ldm.load(device="cpu"), ["a handwritten digit five", "a bold seven leaning right"]
    fast = optimize(model)
    expected, found = (pixels(m.generate(prompts, steps=5)) for m in (model, fast))
    assert np.abs(found - expected).max() <= 1 and np.ptp(expected) > 200 and packed(fast)


def test_bfloat16(model, packed_here):
    expected = outputs(model)
    set_precision(model, "bf16")
    error, plain = off(optimize(model), expected), off(model, expected)
    assert 1e-4 < plain < 0.05 and error < 1.5 * plain  # its rounding is that of bfloat16, no more


def test_small_and_other_layers_stay_plain(model, monkeypatch):
    block = model.model.diffusion_model.input_blocks[1][0]
    conv, linear, patched = block.in_layers[2], block.emb_layers[1], block.out_layers[3]
    conv.padding_mode, patched.forward = "reflect", lambda x: nn.Conv2d.forward(patched, x)
    linear.register_forward_pre_hook(lambda *_: None)
    layers = fast_forms.large_layers(model)
    assert not {conv, linear, patched} & set(layers) and block.out_layers[0] not in layers
    monkeypatch.setattr(fast_forms, "PACKED_FROM", 10**9)
    assert not fast_forms.large_layers(model) and not gains(model)
    assert optimize(model).notes[-1] == "fast form: as it was, no layer gains by packing"


def test_a_weight_that_changes_is_packed_again(model, packed_here):
    """A LoRA that is merged into the plain model, a weight set anew, and another size of images."""
    fast = optimize(model)
    before = outputs(fast)
    learned(model)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
    model.model.diffusion_model.out[2].weight.data = torch.ones_like(model.model.diffusion_model.out[2].weight)
    for adapter in model.changes[-1].adapters.values():
        adapter.disconnect()  # it was beside the plain model's weights only
    assert off(fast, outputs(model)) < AGREE and off(fast, before) > 0.1
    for consumed in (False, True):
        fast, cond = optimize(copy.deepcopy(model), consume=consumed), model.condition(["a one"])
        for side in (8, 4, 8):
            x, t = torch.randn(1, 4, side, 2 * side), torch.tensor([500.0])
            with torch.no_grad():
                found, expected = (m.apply_model(x, t, cond) for m in (fast, model))
            assert (found - expected).norm() < AGREE * expected.norm()


def test_adapters_beside_the_weights(model, packed_here):
    """LoRAs that were there before work in the fast form, and so do those that are added to it, at any strength."""
    plain = outputs(model)
    adapters = learned(model)
    fast = optimize(model)
    assert off(fast, outputs(model)) < AGREE and off(fast, plain) > 0.01
    for adapter in adapters.values():
        adapter.strength = -0.5
    assert off(fast, outputs(model)) < AGREE
    for adapter in adapters.values():
        adapter.strength = 0.0
    own = optimize(model)
    more = learned(own, seed=3)
    assert off(own, plain) > 0.01 and off(model, plain) < AGREE
    for adapter in more.values():
        adapter.disconnect()
    assert off(own, plain) < AGREE


def test_gradients_are_those_of_the_plain_layers(model, packed_here):
    fast = optimize(model)
    found = []
    for m in (model, fast):
        cond = {key: value.clone().requires_grad_() for key, value in m.condition(["a one"]).items()}
        m.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([5.0]), cond).square().sum().backward()
        found.append(cond["c_crossattn"].grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_gradients_through_weights_that_were_freed(model, packed_here):
    found, x, t = [], torch.ones(1, 4, 8, 8, requires_grad=True), torch.tensor([5.0])
    for m in (copy.deepcopy(model), optimize(model, consume=True)):
        outputs(m)
        found += torch.autograd.grad(m.apply_model(x, t, m.condition(["a one"])).square().sum(), x)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-4)  # sums in another order: channels-last


def test_the_bias_alone_gets_its_gradient(model, packed_here):
    fast, found = optimize(model), []
    outputs(fast)
    for m in (model, fast):
        m.requires_grad_(False)
        biases = {name: p.requires_grad_() for name, p in m.model.named_parameters() if name.endswith("bias")}
        m.apply_model(torch.ones(1, 4, 8, 8), torch.tensor([5.0]), m.condition(["a one"])).square().sum().backward()
        found.append({name: bias.grad.clone() for name, bias in biases.items()})
        m.zero_grad()
    assert len(found[0]) > 30 and max(float(grad.abs().max()) for grad in found[0].values()) > 0
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-4)  # sums in another order: channels-last


def test_another_precision_is_computed_plainly(model, packed_here):
    """float64 and float16, which oneDNN does not pack everywhere, and back."""
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    fast = optimize(model)
    with torch.no_grad():
        expected = model.apply_model(x, t, model.condition(["a one"]))
        assert fast.apply_model(x, t, fast.condition(["a one"])).dtype == torch.float32 and packed(fast)
        for dtype, tolerance in ((torch.float64, AGREE), (torch.float16, 0.05), (torch.float32, 0.05)):
            fast.to(dtype)
            found = fast.apply_model(x.to(dtype), t, fast.condition(["a one"]))
            assert found.dtype == dtype and (found - expected).norm() < tolerance * expected.norm()


def test_copies(model, packed_here):
    """A copy has weights of its own, which it packs itself; a fast form of a fast form computes the same."""
    expected, fast = outputs(model), optimize(model)
    outputs(fast)
    copied, again = copy.deepcopy(fast), optimize(fast)
    assert not packed(copied) and off(copied, expected) < AGREE and off(again, expected) < AGREE and packed(copied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert off(copied, expected) < AGREE and off(again, outputs(model)) < AGREE and off(again, expected) > 0.01


def test_a_weight_that_lies_where_another_did_is_packed_again(packed_here):
    plain = nn.Linear(64, 64)
    x, fast = torch.randn(2, 64), nn.Linear(64, 64)
    fast.weight, fast.bias = plain.weight, plain.bias
    to_packed(fast, False)
    for _ in range(5):
        with torch.no_grad():
            fast(x)
            plain.weight.data = plain.weight.data + 1  # what was there is freed,
            plain.weight.data = plain.weight.data + 1  # and this would take its place
            torch.testing.assert_close(fast(x), plain(x), atol=1e-4, rtol=1e-5)  # the weights grow to 10


def test_a_consumed_model_is_refused(model, packed_here):
    expected, own = outputs(model), model.model.diffusion_model.middle_block[0].in_layers[2]
    fast, weight = optimize(model, consume=True), weakref.ref(own.weight)
    assert weight() is not None and off(fast, expected) < AGREE
    gc.collect()
    assert weight() is None and len(packed(fast)) > 30
    for use in (
        lambda: model.generate(["a one"], steps=1),
        lambda: model.state_dict(),
        lambda: model.half(),
        lambda: copy.deepcopy(model),
        lambda: optimize(model),
    ):
        refused("^this model gave its networks to ldm.optimize.*load the model again$", use)


def test_weights_that_were_freed_come_back_where_they_are_needed(model, tmp_path, packed_here):
    kept, state = copy.deepcopy(model), {name: t.clone() for name, t in model.state_dict().items()}
    expected, fast = outputs(model), optimize(model, consume=True)

    def freed():
        """The fast form, once it has packed its weights."""
        assert off(fast, expected) < AGREE and len(packed(fast)) > 30
        return fast

    ldm.save(freed(), tmp_path / "x.safetensors")
    for found in (freed().state_dict(), ldm.load(tmp_path / "x.safetensors", device="cpu").state_dict()):
        assert list(found) == list(state) and all(torch.equal(found[name], t) for name, t in state.items())
    for other in (copy.deepcopy(freed()), pickle.loads(pickle.dumps(freed())), optimize(freed())):
        assert off(other, expected) < AGREE and packed(other)
    assert off(freed().double().float(), expected) < AGREE
    undo = lora.merge(freed(), learned(fast))
    merged = lora.merge(kept, learned(kept))
    assert off(fast, outputs(kept)) < AGREE and off(fast, expected) > 0.01
    lora.restore(fast, undo)
    lora.restore(kept, merged)
    set_precision(freed(), "bf16")
    set_precision(kept, "bf16")
    assert off(fast, outputs(kept)) < 0.02


def test_models_without_a_fast_form(model):
    meta = copy.deepcopy(model).to("meta")
    refused("is for a CPU, and this model is on meta", optimize, meta)
    with set_precision(model, "autocast"):
        refused("has no use for precision autocast", optimize, model)
    with compile_unet(model, "eager"):
        refused("this model is compiled", optimize, model)
    assert optimize(model).notes


@pytest.mark.parametrize("fault", ["missing", "other arguments", "wrong"])
def test_without_the_private_operations_nothing_is_packed(model, monkeypatch, fault, packed_here):
    def broken(layer, *args):
        if fault == "wrong":
            return nn.Linear.forward(layer, *args) * 1.001
        raise {"missing": AttributeError, "other arguments": RuntimeError}[fault]

    monkeypatch.setattr(PackedLinear, "forward", broken)
    packs.cache_clear()
    state = torch.get_rng_state()
    try:
        assert not packs(torch.float32) and torch.equal(torch.get_rng_state(), state) and not gains(model)
        expected = outputs(model)
        assert all(map(torch.equal, outputs(optimize(model)), expected))
    finally:
        packs.cache_clear()
    assert not packs(torch.float16) and not packs(torch.float64)


def test_maps_are_channels_last_within_the_unet_alone(model, packed_here):
    fast, seen = optimize(model), []
    fast.model.diffusion_model.middle_block.register_forward_hook(lambda module, args, out: seen.append(out))
    found = outputs(fast)[0]
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    assert found.is_contiguous()


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no choice of its products")
def test_the_route_of_products_is_set_in_calls_alone(model, monkeypatch, packed_here):
    setting = torch.backends.mkldnn.matmul
    before, seen = setting.fp32_precision, []
    assert routing_pays() in (True, False) and setting.fp32_precision == before
    monkeypatch.setattr(fast_forms, "routing_pays", lambda: True)
    expected = outputs(model)
    fast = optimize(model)
    assert "computes the UNet's other products in float32, too" in fast.notes[-1]
    assert off(pickle.loads(pickle.dumps(fast)), expected) < AGREE
    fast.model.diffusion_model.register_forward_hook(lambda *_: seen.append(setting.fp32_precision))
    assert len(outputs(fast)) == 3 and seen == ["bf16"] and setting.fp32_precision == before
    if routing_pays.__wrapped__() or torch.backends.cpu.get_cpu_capability() == "AVX512":  # without AMX it is exact
        assert off(fast, expected) < AGREE
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault), routed():
            assert setting.fp32_precision == "bf16"
            with routed():
                pass
            assert setting.fp32_precision == "bf16"
            raise fault
        assert setting.fp32_precision == before


def test_features_that_hook_into_modules(model, packed_here):
    """Attention maps, perturbed attention, and bands of the first stage, on the fast form and on the plain one."""
    fast, found = optimize(model), []
    for m in (model, fast):
        with attention_maps(m, ["a one"]) as maps:
            images = m.generate(["a one"], steps=2)
        guide = make_guide(m, pag=1.0)
        images += m.generate(["a one"], steps=2, guide=guide)
        with tile_vae(m, 16):
            images += m.generate(["a one"], steps=2)
        found.append((pixels(images), np.stack([pixels([maps.sheet(images[:1])])])))
    for plain, own in zip(*found, strict=True):
        assert np.abs(plain - own).max() <= 1 and np.ptp(plain) > 20
    assert packed(fast)


def test_compvis_models(tmp_path, packed_here):
    from ldm.models.diffusion.ddim import DDIMSampler

    model = built(config(clip_folder(tmp_path)))
    fast, found = optimize(model), []
    for m in (model, fast):
        cond = m.get_learned_conditioning(["a cat"])
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        samples, _ = DDIMSampler(m).sample(2, 1, (4, 8, 8), cond, verbose=False, x_T=start)
        found.append(m.decode_first_stage(samples))
    assert packed(fast) and isinstance(fast, type(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    averaged, x, t = LitEma(model.model.requires_grad_()), torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        before = model.apply_model(x, t, cond)
        for parameter in model.model.parameters():
            parameter.mul_(1.1)
        changed = fast.apply_model(x, t, cond)
        averaged.copy_to(fast.model)  # which is packed again
        assert (changed - before).norm() > 0.01 * before.norm()
        torch.testing.assert_close(fast.apply_model(x, t, cond), before, rtol=1e-4, atol=1e-5)


def parse(*options: object) -> argparse.Namespace:
    parser = Parser()
    add_model_options(parser)
    return parser.parse_args([str(option) for option in ("--device", "cpu", *options)])


def test_scripts_use_it_unless_told_otherwise(tiny_checkpoint, monkeypatch, capsys, packed_here):
    draw = lambda *options: load_model(parse("--ckpt", tiny_checkpoint, *options))  # noqa: E731
    plain, fast = draw("--no-optimize"), draw()
    images = [pixels(m.generate(["a one"], steps=2)) for m in (plain, fast)]
    with monkeypatch.context() as patch:
        patch.setattr(fast_forms, "WORTH_PACKING", 10**6)
        assert not gains(plain)
    assert gains(plain) and np.abs(images[0] - images[1]).max() <= 1 and len(packed(fast)) > 30 and not packed(plain)
    half = draw("--precision", "bf16")
    half.generate(["a one"], steps=1)
    assert {m.held.packed.dtype for m in packed(half.model)} == {torch.bfloat16}
    with monkeypatch.context() as patch:  # half-precision weights that stay as they are, in the memory of their file
        patch.setattr(precision, "weights_wait", lambda *_: True)
        assert not any(isinstance(m, PackedLinear) for m in draw().modules())
    for options in (["--compile"], ["--precision", "autocast"]):
        assert not any(isinstance(m, PackedLinear) for m in draw(*options).modules())
    few, more = (load_model(parse("--ckpt", tiny_checkpoint), batches=n) for n in (1, 2))  # its own 4 steps
    assert [any(isinstance(m, PackedLinear) for m in model.modules()) for model in (few, more)] == [False, True]
    assert [gains(plain, 1, 7), gains(plain, 1, 8), gains(plain, 2, 4)] == [False, True, True]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(fast_forms, "WORTH_PACKING", 10**6)
    draw("--no-optimize")
    assert capsys.readouterr().err == "--no-optimize has no effect: this model is computed plainly as it is\n"
    monkeypatch.setattr(fast_forms, "WORTH_PACKING", 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: argparse.Namespace(available=10**5))
    assert not any(isinstance(m, PackedLinear) for m in draw().modules())
    assert "note: the weights are not packed for this CPU, as by default: they take" in capsys.readouterr().err


def test_null_text_is_optimised_through_plain_layers(tmp_path, tiny_checkpoint, monkeypatch, packed_here):
    def stop(args, gradients):
        raise ValueError(f"gradients is {gradients}")

    fast, plain = (load_model(parse("--ckpt", tiny_checkpoint), gradients=gradients) for gradients in (False, True))
    assert [any(isinstance(m, PackedLinear) for m in model.modules()) for model in (fast, plain)] == [True, False]
    monkeypatch.setattr(edit, "load_model", stop)
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    options = ["--init-img", f"{tmp_path}/a.png", "--prompt", "a one", "--to", "a two", "--outdir", str(tmp_path)]
    refused("gradients is False", edit.main, options)
    refused("gradients is True", edit.main, [*options, "--null-text"])
