"""A BERT-style transformer over tokens (Devlin et al. 2018, arXiv:1810.04805, with pre-norm blocks), under the
parameter names of CompVis's x_transformer. It is the text encoder of LDM's own text-to-image model."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.attention import FeedForward
from ldm.models.blocks import zero_module
from ldm.models.kernels import attention

HEADS = 8
HEAD_WIDTH = 64  # of every published model, whatever its width
FIRST_NORM = 4.0  # the weight of the last norm at the start, and so the deviation of the vectors


class BERTAttention(nn.Module):
    """Attention with 8 heads of width 64 over all tokens, padding included: (b, n, dim) -> (b, n, dim).

    With a window of w tokens, three heads see only a token and the w after it, and three it and the w before it: what
    belongs to a word is mostly near it, and need not be found among all the words of a prompt.
    """

    def __init__(self, dim: int, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        inner = HEADS * HEAD_WIDTH
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=HEADS) for to in (self.to_q, self.to_k, self.to_v))
        mask = None if self.window is None else window_mask(x.shape[1], self.window).to(x.device)
        return self.to_out(rearrange(attention(q, k, v, mask=mask), "b h n d -> b n (h d)"))


def window_mask(n: int, window: int) -> Tensor:
    """Return which of n tokens each token sees in each head, bool (8, n, n): see `BERTAttention`."""
    steps = torch.arange(n) - torch.arange(n)[:, None]  # from a token, row by row, to all others
    after, before = (steps >= 0) & (steps <= window), (steps <= 0) & (steps >= -window)
    return torch.stack([after] * 3 + [before] * 3 + [torch.ones_like(after)] * 2)


class Encoder(nn.Module):
    """`depth` pairs of attention and feed-forward layers (exact GELU), each added to x (b, n, dim) after a norm.

    What is added begins with zero, so that each token is first its own word (docs/results/scenes.md).
    window: of the attention.
    """

    def __init__(self, dim: int, depth: int, window: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        layers = [layer for _ in range(depth) for layer in (BERTAttention(dim, window), FeedForward(dim))]
        self.layers: Any = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), layer]) for layer in layers)
        for layer in layers:
            zero_module(layer.to_out if isinstance(layer, BERTAttention) else layer.net[-1])

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TransformerWrapper(nn.Module):
    """Learned token and position embeddings, `attn_layers`, a final norm, and a projection to logits over tokens."""

    def __init__(self, num_tokens: int, max_seq_len: int, attn_layers: Encoder, emb_dropout: float = 0.0) -> None:
        super().__init__()
        dim = attn_layers.dim
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb: Any = nn.ModuleDict({"emb": nn.Embedding(max_seq_len, dim)})
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        # A UNet's attention to tokens of deviation 1 begins nearly uniform, and a word is lost among the others.
        nn.init.constant_(self.norm.weight, FIRST_NORM)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, tokens: Tensor, return_embeddings: bool = False) -> Tensor:
        """Map tokens int64 (b, n), n <= max_seq_len, to logits (b, n, num_tokens) or normed embeddings (b, n, dim)."""
        x = self.token_emb(tokens) + self.pos_emb.emb.weight[: tokens.shape[1]]  # (b, n, dim)
        x = self.norm(self.attn_layers(self.emb_dropout(x)))
        return x if return_embeddings else self.to_logits(x)


def pool(vectors: Tensor, read: Tensor) -> Tensor:
    """Sum the vectors (b, m, d) that are read (bool, (b, m)), over the root of their number: (b, d); 0 for none."""
    chosen = read[..., None].to(vectors)
    return (chosen * vectors).sum(1) / chosen.sum(1).clamp(min=1).sqrt()
