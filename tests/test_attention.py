import pytest
import torch
from conftest import refused
from golden_fill import fill, randn
from torch import nn

from ldm.models import blocks
from ldm.models.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer


def test_cross_attention_equals_torchs_multihead_attention():
    ours = CrossAttention(12, context_dim=8, heads=3, dim_head=4)
    theirs = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    theirs.q_proj_weight, theirs.k_proj_weight = ours.to_q.weight, ours.to_k.weight
    theirs.v_proj_weight, theirs.out_proj = ours.to_v.weight, ours.to_out[0]
    x, context = randn(2, 5, 12), randn(2, 7, 8, seed=1)
    mask = torch.arange(7) < torch.tensor([[4], [7]])  # the last three tokens of the first row are hidden
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0], atol=1e-6, rtol=0)
    expected = theirs(x, context, context, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(x, context, mask=mask), expected, atol=1e-6, rtol=0)


def test_projections_are_called_on_every_forward():
    block = SpatialTransformer(32, 2, 16, context_dim=8)
    called = []
    for name, module in block.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out")):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    block(randn(1, 32, 4, 4), randn(1, 3, 8))
    assert len(called) == 8


def test_forward_of_the_class_can_be_replaced(monkeypatch):
    block = SpatialTransformer(32, 2, 16, context_dim=8)
    seen = []

    def forward(self, x, context=None, mask=None):
        seen.append((self.heads, self.scale, None if context is None else context.shape[-1], mask))
        return x

    monkeypatch.setattr(CrossAttention, "forward", forward)
    block(randn(1, 32, 4, 4), randn(1, 3, 8))
    assert seen == [(2, 0.25, None, None), (2, 0.25, 8, None)]


def test_checkpoint_is_called_through_its_home(monkeypatch):
    calls = []

    def fake(func, inputs, params, flag):
        calls.append((len(list(params)), flag))
        return func(*inputs)

    monkeypatch.setattr(blocks, "checkpoint", fake)
    SpatialTransformer(32, 2, 16, context_dim=8, use_checkpoint=True)(randn(1, 32, 4, 4), randn(1, 3, 8))
    blocks.AttentionBlock(32)(randn(1, 32, 4, 4))
    blocks.ResBlock(32, 8, 0.0)(randn(1, 32, 4, 4), randn(1, 8))
    assert calls == [(20, True), (6, False), (10, False)]


def test_feed_forward_forms():
    x = randn(2, 3, 8)
    gated = fill(FeedForward(8, glu=True), 1)
    hidden, gate = gated.net[0].proj(x).split(32, dim=-1)
    expected = gated.net[2](hidden * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)))  # the exact GELU
    torch.testing.assert_close(gated(x), expected, atol=1e-6, rtol=0)
    assert isinstance(gated.net[0], GEGLU)
    plain = FeedForward(8, mult=2)
    assert plain.net[0][0].weight.shape == (16, 8) and plain(x).shape == x.shape
    assert not isinstance(BasicTransformerBlock(8, 2, 4, gated_ff=False).ff.net[0], GEGLU)


def test_transformer_block_order_and_disabled_self_attention():
    x, context = randn(2, 5, 12), randn(2, 7, 8, seed=1)
    block = fill(BasicTransformerBlock(12, 3, 4, context_dim=8, disable_self_attn=True), 1)
    h = x + block.attn1(block.norm1(x), context)
    h = h + block.attn2(block.norm2(h), context)
    torch.testing.assert_close(block(x, context), h + block.ff(block.norm3(h)))
    assert block.attn1.to_k.in_features == 8
    assert BasicTransformerBlock(12, 3, 4, context_dim=8).attn1.to_k.in_features == 12


@pytest.mark.parametrize("use_linear", [False, True])
def test_spatial_transformer_starts_as_identity(use_linear):
    block = SpatialTransformer(32, 2, 8, context_dim=8, use_linear=use_linear)  # 16 inner channels
    x = randn(2, 32, 4, 6)
    assert torch.equal(block(x, randn(2, 3, 8)), x)


def test_linear_and_convolutional_projections_agree():
    conv = fill(SpatialTransformer(32, 2, 8, context_dim=8), 1)
    linear = SpatialTransformer(32, 2, 8, context_dim=8, use_linear=True)
    linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in conv.state_dict().items()})
    x, context = randn(2, 32, 4, 6), randn(2, 3, 8)
    torch.testing.assert_close(linear(x, context), conv(x, context), atol=2e-6, rtol=0)


def test_depth_takes_one_context_or_one_per_block():
    x, context = randn(2, 32, 4, 4), randn(2, 3, 8)
    shared = fill(SpatialTransformer(32, 2, 16, depth=2, context_dim=8), 1)
    listed = fill(SpatialTransformer(32, 2, 16, depth=2, context_dim=[8, 8]), 1)
    expected = shared(x, context)
    for value in (context, [context], [context, context]):
        assert torch.equal(listed(x, value), expected)
    other = listed(x, [context, randn(2, 5, 8, seed=2)])
    assert (other - expected).abs().max() > 1e-3
    widths = SpatialTransformer(32, 2, 16, depth=2, context_dim=[8, 6])
    assert [block.attn2.to_k.in_features for block in widths.transformer_blocks] == [8, 6]
    refused(r"\[8, 6\] for 3 transformer blocks", SpatialTransformer, 32, 2, 16, depth=3, context_dim=[8, 6])


def test_epsilons():
    block = SpatialTransformer(32, 2, 16, context_dim=8)
    assert block.norm.eps == 1e-6
    inner = block.transformer_blocks[0]
    assert {inner.norm1.eps, inner.norm2.eps, inner.norm3.eps} == {1e-5}
