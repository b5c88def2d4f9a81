"""The BERT-style transformer against torch's own layers; see test_published.py too."""

import torch
from golden_fill import fill
from torch import nn

from ldm.models.transformer import Encoder, TransformerWrapper


@torch.no_grad()
def test_the_layers_are_those_of_torch():
    """At width 512, that of 8 heads together, torch's pre-norm encoder is the same, but for biases on q, k and v."""
    ours = fill(Encoder(512, 2), 5)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, activation="gelu", norm_first=True, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for i, block in enumerate(theirs.layers):
        (norm1, attention), (norm2, feed) = ours.layers[2 * i], ours.layers[2 * i + 1]
        block.norm1, block.norm2 = norm1, norm2
        block.linear1, block.linear2 = feed.net[0][0], feed.net[2]
        weights = [attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        block.self_attn.in_proj_weight.copy_(torch.cat(weights))
        block.self_attn.in_proj_bias.zero_()
        block.self_attn.out_proj.weight.copy_(attention.to_out.weight)
        block.self_attn.out_proj.bias.copy_(attention.to_out.bias)
    x = torch.randn(2, 7, 512, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_shorter_texts_have_the_first_positions():
    """Every token sees every other, so that only the embeddings, at depth 0, can be compared position by position."""
    model = fill(TransformerWrapper(100, 16, Encoder(64, 0)), 3)
    tokens = torch.arange(32).view(2, 16)
    embeddings = model(tokens, return_embeddings=True)
    torch.testing.assert_close(model(tokens[:, :5], return_embeddings=True), embeddings[:, :5])
    logits = model(tokens)
    assert logits.shape == (2, 16, 100) and torch.equal(logits, model.to_logits(embeddings))


def test_epsilons_and_dropout():
    model = TransformerWrapper(100, 16, Encoder(64, 2), emb_dropout=0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {1e-5}
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
