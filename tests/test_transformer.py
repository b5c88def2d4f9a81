"""The BERT-style transformer: the original's numbers, names and shapes, and torch's own layers as a second opinion."""

import pytest
import torch
from golden_fill import fill, load_golden, published_shapes, shapes
from torch import nn

from ldm.models.transformer import Encoder, TransformerWrapper


@pytest.mark.parametrize(
    ("model", "dim", "depth", "tokens", "length"),
    [("ldm-text2img-large", 1280, 32, 30522, 77), ("ldm-layout2img", 512, 16, 8192, 92)],
)
def test_names_and_shapes_of_published_models(model, dim, depth, tokens, length):
    with torch.device("meta"):
        network = TransformerWrapper(tokens, length, Encoder(dim, depth))
    assert shapes(network) == published_shapes(model, "cond_stage_model.transformer.")


@torch.no_grad()
def test_golden():
    params, seed, tensors = load_golden("bert_embedder")
    model = TransformerWrapper(
        params["vocab_size"], params["max_seq_len"], Encoder(params["n_embed"], params["n_layer"])
    )
    # the reference fills the embedder around it, whose one child adds the same prefix to every name: the order stays
    fill(model, seed)
    out = model(tensors["in/tokens"], return_embeddings=True)
    torch.testing.assert_close(out, tensors["out/embedding"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tensors["in/tokens"]), model.to_logits(out))
    assert model(tensors["in/tokens"]).shape == (2, 16, 100)


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
    whole = model(tokens, return_embeddings=True)
    torch.testing.assert_close(model(tokens[:, :5], return_embeddings=True), whole[:, :5])


def test_epsilons_and_dropout():
    model = TransformerWrapper(100, 16, Encoder(64, 2), emb_dropout=0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {1e-5}
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))
