"""Linear attention against its definition, and what it costs."""

import pytest
import torch
from conftest import refused
from golden_fill import unet_params, untrained
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.blocks import AttentionBlock
from ldm.models.kernels import set_attention
from ldm.models.linear_attention import LinearAttentionBlock, linear_attention
from ldm.models.unet import UNetModel

TEXT = {"use_spatial_transformer": True, "context_dim": 4}
SMALL = unet_params(in_channels=1, model_channels=8, out_channels=1, num_heads=2, norm_groups=4)


def test_against_the_definition():
    """Each query's weights of the keys, written out as an (n, m) matrix, which here is a product of two."""
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = linear_attention(q, k[..., :5, :], v[..., :5, :])
    of_queries = q.exp() / q.exp().sum(-1, keepdim=True) / 2  # over the 4 features, and their root
    of_keys = k[..., :5, :].exp() / k[..., :5, :].exp().sum(-2, keepdim=True)
    weights = torch.einsum("b h n d, b h m d -> b h n m", of_queries, of_keys)
    torch.testing.assert_close(found, weights @ v[..., :5, :])
    # each query's weights add up to 1 / sqrt(d): features' share out 1, and each feature's over the keys 1
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 3, 7), 0.5, dtype=torch.float64))


@pytest.fixture
def products():
    """Attention as matrix products, which torch counts; whether it counts its fused kernels depends on its version."""
    set_attention("math")
    yield
    set_attention("auto")


def flops(block: torch.nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.zeros(1, 32, side, side))
    return counter.get_total_flops()


@pytest.mark.usefixtures("products")
def test_four_times_the_positions_cost_four_times_as_much():
    """Where full attention's cost tends to 16 times. Both by their formulas, for 32 channels in 2 heads of d = 16."""
    linear, full = LinearAttentionBlock(32, 2), AttentionBlock(32, 2)
    for n in (16**2, 32**2):
        projections = 2 * n * 4 * 32**2  # to q, k and v, and out; a product and a sum are 2
        assert flops(linear, round(n**0.5)) == projections + 2 * (n + n) * 2 * 16**2  # n + n positions, 2 heads of d^2
        # n^2 scores, 2 heads of d, and their mean of v
        assert flops(full, round(n**0.5)) == projections + 2 * 2 * n * n * 32
    assert flops(linear, 32) == 4 * flops(linear, 16)
    assert flops(full, 64) / flops(full, 32) > 14
    assert flops(linear, 64) < flops(full, 64) / 50


def test_the_block_begins_as_nothing_and_then_learns():
    torch.manual_seed(0)
    block, x = LinearAttentionBlock(8, num_head_channels=4, memory=3, norm_groups=4), torch.randn(2, 8, 3, 5)
    assert torch.equal(block(x), x) and block.num_heads == 2 and block.memory.shape == (2, 2, 3, 4)
    torch.nn.init.normal_(block.proj_out.weight)
    (block(x) ** 2).sum().backward()
    assert untrained(block) == [] and all(p.grad.isfinite().all() for p in block.parameters())


def test_memory_is_more_keys_and_values():
    """One that outweighs all positions decides alone: what the heads find is its value, the same everywhere."""
    torch.manual_seed(0)
    block, x = LinearAttentionBlock(8, 2, memory=1, norm_groups=4), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        block.memory[0] = 1e4
        block.proj_out.weight.copy_(torch.eye(8))
        added = (block(x) - x).flatten(2)[0]  # (c, n)
        value = block.memory[1].flatten()
    expected = value / value.square().mean().sqrt()
    torch.testing.assert_close(added, expected[:, None].expand(8, 16), rtol=1e-4, atol=1e-4)


def test_a_unet_has_it_in_its_levels():
    unet = UNetModel(**SMALL, attention_type="linear", attention_memory=2)
    kinds = {LinearAttentionBlock: [], AttentionBlock: []}
    for name, module in unet.named_modules():
        if type(module) in kinds:
            kinds[type(module)].append(name.split(".")[0])
    assert kinds[AttentionBlock] == ["middle_block"] and len(kinds[LinearAttentionBlock]) == 6  # 2 down, 4 up
    x = torch.randn(2, 1, 16, 16)
    assert unet(x, torch.tensor([3, 900])).shape == x.shape
    assert not any(isinstance(module, LinearAttentionBlock) for module in UNetModel(**SMALL).modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNetModel(**SMALL, attention_type="fast"), "attention_type 'fast': use full, or linear without"),
        (
            lambda: UNetModel(**SMALL, attention_type="linear", **TEXT),
            "'linear': use full, or linear without use_spatial",
        ),
        (lambda: UNetModel(**SMALL, attention_type="linear", attention_memory=-1), "attention_memory is -1"),
        (lambda: LinearAttentionBlock(8, num_heads=3, norm_groups=4), "8 channels do not split into heads"),
        (lambda: LinearAttentionBlock(8, num_head_channels=16, norm_groups=4), "8 channels do not split into heads"),
        (lambda: LinearAttentionBlock(8, num_heads=0, norm_groups=4), "8 channels .*: num_heads is 0 and must"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    refused(message, build)
