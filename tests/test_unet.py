import math

import pytest
import torch
from conftest import refused
from golden_fill import count, fill, randn, shapes, unet_params, untrained
from torch import nn

from ldm.models.attention import SpatialTransformer
from ldm.models.blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    checkpoint,
    timestep_embedding,
    zero_module,
)
from ldm.models.levels import Level, plan_levels
from ldm.models.unet import UNetModel

SMALL = unet_params(num_heads=2)
TEXT = {"use_spatial_transformer": True, "context_dim": 12, "legacy": False}


def small(**changes) -> UNetModel:
    return fill(UNetModel(**SMALL | changes), 1)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return randn(2, 4, 8, 8), torch.tensor([3.0, 700.5]), randn(2, 5, 12, seed=1)


def kinds(model: UNetModel, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def test_epsilons():
    model = UNetModel(**SMALL | TEXT)
    transformers = kinds(model, SpatialTransformer)
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            in_transformer = name.removesuffix(".norm") in transformers
            assert module.eps == (1e-6 if in_transformer else 1e-5), name
    assert len(transformers) == 7
    norms = [module for module in small().modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-5} and {norm.num_groups for norm in norms} == {32}


def test_the_network_starts_at_zero():
    x, t, context = inputs()
    assert torch.equal(UNetModel(**SMALL | TEXT)(x, t, context), torch.zeros_like(x))


def test_blocks_start_as_their_skip_connection():
    x, emb = randn(2, 32, 8, 8), randn(2, 16)
    assert torch.equal(ResBlock(32, 16, 0.0)(x, emb), x)
    wider = ResBlock(32, 16, 0.0, out_channels=64, use_scale_shift_norm=True)
    assert torch.equal(wider(x, emb), wider.skip_connection(x))
    assert wider.skip_connection.kernel_size == (1, 1)
    assert ResBlock(32, 16, 0.0, out_channels=64, use_conv=True).skip_connection.kernel_size == (3, 3)
    assert torch.equal(ResBlock(32, 16, 0.0, down=True)(x, emb), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(ResBlock(32, 16, 0.0, up=True)(x, emb), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(AttentionBlock(32, num_heads=4)(x), x)


def test_patches_are_channels_of_a_smaller_image():
    x, t, _ = inputs()
    model, inner = small(in_channels=1, out_channels=2, patch=2), small(in_channels=4, out_channels=8)
    assert model.downsampling == 2 * inner.downsampling and shapes(model) == shapes(inner)
    image = x.view(2, 2, 2, 8, 8).permute(0, 3, 1, 4, 2).reshape(2, 1, 16, 16)  # channel (i, j): pixel i, j of a square
    out = inner(x, t).view(2, 2, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 16, 16)
    assert torch.equal(model(image, t), out)


def test_coordinates_are_channels_of_the_first_layer():
    x, t, _ = inputs()
    model, inner = small(coordinates=True), small(in_channels=x.shape[1] + 10)
    assert shapes(model) == shapes(inner)
    waves = torch.zeros(10, *x.shape[-2:])
    for i, row in enumerate(torch.linspace(-1, 1, x.shape[2]).tolist()):
        for j, column in enumerate(torch.linspace(-1, 1, x.shape[3]).tolist()):
            angles = [math.pi * k * u for k in (1, 2) for u in (column, row)]
            waves[:, i, j] = torch.tensor([column, row, *map(math.sin, angles), *map(math.cos, angles)])
    torch.testing.assert_close(model(x, t), inner(torch.cat([x, waves.expand(len(x), -1, -1, -1)], 1), t))


def test_adm_sizes():
    """Dhariwal & Nichol 2021, their class-conditional models of 64 and 256 pixels, with learned variances."""
    adm = {"num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True, "num_classes": 1000}
    with torch.device("meta"):
        small = UNetModel(64, 3, 192, 6, 3, [2, 4, 8], channel_mult=[1, 2, 3, 4], **adm)
        large = UNetModel(256, 3, 256, 6, 2, [8, 16, 32], channel_mult=[1, 1, 2, 2, 4, 4], **adm)
    assert [count(small), count(large)] == [295_904_454, 553_838_086]


def test_adagn_scales_and_shifts_the_second_normalisation():
    block = fill(ResBlock(32, 16, 0.0, use_scale_shift_norm=True), 1)
    x, emb = randn(2, 32, 8, 8), randn(2, 16)
    norm, silu, _, conv = block.out_layers
    h = norm(block.in_layers(x))
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    assert torch.equal(block(x, emb), x + conv(silu(h * (1 + scale) + shift)))  # 1 +: ADM's code, not its equation 3
    zero_module(block.emb_layers)
    assert torch.equal(block(x, emb), x + conv(silu(h)))  # plain group normalisation


@pytest.mark.parametrize("direction", ["up", "down"])
def test_biggan_blocks_resample_both_branches_after_the_activation(direction):
    block = fill(ResBlock(32, 16, 0.0, **{direction: True}), 1)
    x, emb = randn(2, 32, 8, 8).requires_grad_(), randn(2, 16)
    resample = nn.Upsample(scale_factor=2, mode="nearest") if direction == "up" else nn.AvgPool2d(2)
    norm, silu, conv = block.in_layers
    h = conv(resample(silu(norm(x)))) + block.emb_layers(emb)[:, :, None, None]
    out = block(x, emb)
    assert torch.equal(out, resample(x) + block.out_layers(h))  # no 1 / sqrt(2): ADM tried that, and it hurt
    assert out.shape[-1] == (16 if direction == "up" else 4)
    assert count(block) == count(ResBlock(32, 16, 0.0))
    out.square().mean().backward()
    assert x.grad.abs().min() > 0 and untrained(block) == []


# name: (sines first, shift of the exponent's divisor), as each one's code has it
CONVENTIONS = {
    "compvis, guided diffusion": (False, 0),
    "ddpm, lucidrains, the annotated SimpleUnet": (True, 1),
    "diffusers' UNet2DModel with flip_sin_to_cos=False": (True, 0),
}


@pytest.mark.parametrize("sines_first, shift", CONVENTIONS.values(), ids=CONVENTIONS.keys())
@pytest.mark.parametrize("dim", [2, 32, 33])
def test_timestep_embeddings_of_all_conventions(dim, sines_first, shift):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 299.0, 12.5])
    got = timestep_embedding(t, dim, sines_first=sines_first, shift=shift)
    half = dim // 2
    frequencies = torch.tensor([10000.0 ** (-k / (half - shift or 1)) for k in range(half)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    torch.testing.assert_close(got[:, : 2 * half], torch.cat(parts, 1).float(), atol=3e-5, rtol=0)
    if half > shift:  # where it is not, theirs divides by zero
        theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=not sines_first, downscale_freq_shift=shift)
        torch.testing.assert_close(got, theirs, atol=3e-5, rtol=0)
        last = angles[:, -1] / t.double()
        assert last[1] == pytest.approx(1e-4 if shift == 1 else 10 ** (-4 * (half - 1) / half))
    assert dim % 2 == 0 or torch.equal(got[:, -1], torch.zeros(4))
    assert torch.equal(timestep_embedding(t.long(), dim), timestep_embedding(t.floor(), dim))
    assert torch.equal(timestep_embedding(t, dim, repeat_only=True), t[:, None].expand(4, dim))
    assert dim == 2 or not torch.equal(timestep_embedding(t, dim, max_period=100), timestep_embedding(t, dim))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_res_blocks": [1, 2]},
        {"channel_mult": [1, 1, 2], "attention_resolutions": [4]},
        {"conv_resample": False},
        {"resblock_updown": True, "use_scale_shift_norm": True},
        {"num_heads": -1, "num_head_channels": 16},
        {"num_heads": -1, "num_head_channels": 16, "use_new_attention_order": True},
        {"num_heads_upsample": 4},
        {"legacy": False},
        {"norm_groups": 8, "model_channels": 24, "num_heads": 3},
        {"num_classes": 10},
        {"num_classes": "continuous"},
        {"num_classes": "sequential", "adm_in_channels": 6},
        {"n_embed": 11},
        {"dropout": 0.1, "use_checkpoint": True, "use_fp16": True},
        TEXT | {"use_bf16": True},
        TEXT | {"use_linear_in_transformer": True, "transformer_depth": 2},
        TEXT | {"transformer_depth": [1, 2], "num_heads": -1, "num_head_channels": 16},
        TEXT | {"transformer_depth": 2, "context_dim": [12, 12]},
        TEXT | {"disable_self_attentions": [True, False], "disable_middle_self_attn": True},
        TEXT | {"num_attention_blocks": [0, 1]},
        TEXT | {"legacy": True, "num_heads": -1, "num_head_channels": 24},
    ],
    ids=lambda options: ",".join(k for k in options if k not in TEXT) or ("text" if options else "base"),
)
def test_every_argument_trains(options):
    params = SMALL | options
    model = fill(UNetModel(**params), 1).train()
    x, t, context = inputs()
    classes = {10: torch.tensor([1, 9]), "continuous": randn(2, 1), "sequential": randn(2, 6), None: None}
    y = classes[params.get("num_classes")]
    out = model(x, t, context if "context_dim" in params else None, y)
    assert out.shape == (2, params.get("n_embed", 4), 8, 8)
    out.square().mean().backward()
    unused = [name for name in shapes(model) if name.startswith("out.") and "n_embed" in params]
    assert untrained(model) == unused


def test_attention_lies_where_it_is_asked_for():
    def indices(**options):
        model = small(**options)
        kind = SpatialTransformer if "context_dim" in options else AttentionBlock
        return [name.removesuffix(".1") for name in kinds(model, kind)]

    everywhere = ["input_blocks.1", "input_blocks.3", "middle_block"] + [f"output_blocks.{i}" for i in range(4)]
    assert indices() == indices(**TEXT) == everywhere
    lower = ["input_blocks.3", "middle_block", "output_blocks.0", "output_blocks.1"]
    assert indices(attention_resolutions=[2]) == lower
    assert indices(num_attention_blocks=[1, 0]) == ["input_blocks.1", "middle_block", "output_blocks.2"]
    model = small(transformer_depth=[1, 3], **TEXT)
    depths = [len(m.transformer_blocks) for m in model.modules() if isinstance(m, SpatialTransformer)]
    assert depths == [1, 3, 3, 3, 3, 1, 1]
    model = small(disable_self_attentions=[True, False], disable_middle_self_attn=True, **TEXT)
    disabled = [m.transformer_blocks[0].disable_self_attn for m in model.modules() if isinstance(m, SpatialTransformer)]
    assert disabled == [True, False, True, False, False, True, True]


def test_levels():
    """Stable Diffusion 2 has attention at factors 1, 2 and 4, in the decoder's additional block too; not at 8."""
    found = plan_levels(320, [1, 2, 4, 4], 2, [4, 2, 1])
    assert found == [Level(320, 2, 3), Level(640, 2, 3), Level(1280, 2, 3), Level(1280, 2, 0)]
    found = plan_levels(8, (1, 2), [1, 3], [1, 2], [1, 10], [True, False], [0, 2])
    assert found == [Level(8, 1, 0, 1, True), Level(16, 3, 2, 10, False)]


def test_head_counts():
    def heads(**options):
        return [module.num_heads for module in small(**options).modules() if isinstance(module, AttentionBlock)]

    assert heads(num_heads=2) == [2] * 7
    assert heads(num_heads=-1, num_head_channels=16) == [2, 4, 4, 4, 4, 2, 2]
    assert heads(num_heads=2, num_heads_upsample=4) == [2, 2, 2, 4, 4, 4, 4]
    assert heads(num_heads=2, num_heads_upsample=4, legacy=False) == [2] * 7
    # a head width that does not divide 32 and 64: "legacy" widens the heads, the later models leave channels out
    for legacy, width in ((True, 32), (False, 24)):
        model = small(**TEXT | {"legacy": legacy, "num_heads": -1, "num_head_channels": 24})
        assert model.input_blocks[1][1].transformer_blocks[0].attn1.to_q.out_features == width


def test_attention_orders_are_a_permutation_of_each_other():
    legacy, new = AttentionBlock(32, num_heads=4), AttentionBlock(32, num_heads=4, use_new_attention_order=True)
    fill(legacy, 1)
    new.load_state_dict(legacy.state_dict())
    for tensor in (new.qkv.weight, new.qkv.bias):
        tensor.data = tensor.data.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2)
    x = randn(2, 32, 4, 4)
    torch.testing.assert_close(new(x), legacy(x), atol=1e-6, rtol=0)
    assert (fill(new, 1)(x) - legacy(x)).abs().max() > 1e-2


def test_class_embeddings_add_to_the_time():
    x, t, _ = inputs()
    model = small(num_classes="sequential", adm_in_channels=6)
    y = randn(2, 6)
    with torch.no_grad():
        out = model(x, t, y=y)
        assert (out - model(x, t, y=-y)).abs().max() > 1e-2
        model.label_emb[0][2].weight.zero_()
        model.label_emb[0][2].bias.zero_()
        assert torch.equal(model(x, t, y=y), model(x, t, y=-y))


@pytest.mark.parametrize("options", [TEXT, {"use_scale_shift_norm": True, "resblock_updown": True}])
def test_checkpointing_gives_equal_gradients(options):
    x, t, context = inputs()
    gradients = []
    for use_checkpoint in (False, True):
        model = small(use_checkpoint=use_checkpoint, **options)
        model.input_blocks[1].requires_grad_(False)  # CompVis's own checkpointing fails on frozen parameters
        model(x, t, context if "context_dim" in options else None).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_checkpoint_recomputes_only_when_asked_and_needed():
    calls = []
    weight = torch.ones(3, requires_grad=True)

    def double(x):
        calls.append(1)
        return (x * weight).sin()

    for flag, expected in ((True, 2), (False, 1)):
        calls.clear()
        checkpoint(double, (torch.ones(3),), (weight,), flag).sum().backward()
        assert len(calls) == expected
    with torch.no_grad():
        calls.clear()
        assert not checkpoint(double, (torch.ones(3),), (weight,), True).requires_grad
        assert len(calls) == 1


def test_contracts_that_research_code_relies_on():
    """ControlNet runs the parts by itself, with these names and calls."""
    x, t, context = inputs()
    model = small(**TEXT)
    emb = model.time_embed(timestep_embedding(t, model.model_channels, repeat_only=False))
    h, outputs = x.type(model.dtype), []
    for module in model.input_blocks:
        h = module(h, emb, context)
        outputs.append(h)
    h = model.middle_block(h, emb, context)
    for module in model.output_blocks:
        h = module(torch.cat([h, outputs.pop()], dim=1), emb, context)
    assert torch.equal(model.out(h), model(x, t, context=context))
    block = TimestepEmbedSequential(ResBlock(32, 128, 0, out_channels=32, dims=2), Downsample(32, True, dims=2))
    assert block(randn(2, 32, 8, 8), emb).shape == (2, 32, 4, 4)
    assert Upsample(32, True, dims=2, out_channels=16)(randn(1, 32, 4, 4)).shape == (1, 16, 8, 8)
    assert (model.image_size, model.in_channels, model.out_channels) == (8, 4, 4)
    assert model.num_res_blocks == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_its_parameters_dtype(dtype):
    x, t, context = inputs()
    model = small(**TEXT)
    with torch.no_grad():
        expected = model(x, t, context)
        model.to(dtype)
        out = model(x, t, [context])
    assert model.dtype == dtype and out.dtype == torch.float32
    error = (out - expected).abs().max() / expected.abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)  # 8 and 11 bits, over some 40 layers


def test_bf16_autocast_gives_float32_results_and_gradients():
    x, t, context = inputs()
    model = small(**TEXT)
    expected = model(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, context)
    out.square().mean().backward()
    assert out.dtype == torch.float32 and model.out[2].weight.grad.dtype == torch.float32
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_group_norm_keeps_float32_statistics(dtype, bits):
    x = (30 + randn(2, 32, 16, 16)).to(dtype)  # far from zero: half-width sums would lose the variance
    norm = small().out[0]
    expected = norm.double()(x.double())
    out = norm.to(dtype)(x)
    # nothing but the parameters' and the result's own rounding, half a step of 2^-bits each, on values below 6
    assert (out.double() - expected).abs().max() < 2 * 6 * 2.0**-bits


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dims": 3}, "dims is 3"),
        ({"num_heads": -1}, "both -1: set one of them"),
        ({"num_heads": 5}, "32 channels do not split into heads"),
        ({"num_heads": -1, "num_head_channels": 24}, "do not split into heads"),
        (TEXT | {"num_heads": -1, "num_head_channels": 48}, "no attention head at a width of 32"),
        ({"num_heads": 0}, "no attention head"),
        ({"context_dim": 12}, "spatial transformer needs a context_dim"),
        ({"use_spatial_transformer": True}, "spatial transformer needs a context_dim"),
        ({"model_channels": 48}, "48 channels do not split into 32 groups"),
        ({"num_res_blocks": [1, 1, 1]}, r"is \[1, 1, 1\]: give one number, or one per entry of channel_mult \(2\)"),
        ({"disable_self_attentions": []}, "disable_self_attentions is"),
        (TEXT | {"transformer_depth": [1]}, "transformer_depth is"),
        (TEXT | {"transformer_depth": 3, "context_dim": [12, 12]}, "3 transformer blocks"),
        ({"num_attention_blocks": [2, 1]}, "num_attention_blocks is 2 where num_res_blocks is 1"),
        ({"patch": 0}, "patch is 0"),
        ({"patch": 2, "n_embed": 5}, "1 with n_embed"),
        ({"num_classes": "text"}, "num_classes is 'text'"),
        ({"num_classes": "sequential"}, "adm_in_channels"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    refused(message, UNetModel, **SMALL | options)


def test_y_must_come_exactly_when_the_network_takes_one():
    x, t, _ = inputs()
    refused("takes no y", small(), x, t, y=torch.tensor([1, 2]))
    refused("num_classes 10 needs y", small(num_classes=10), x, t)
