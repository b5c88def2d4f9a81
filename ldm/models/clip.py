"""CLIP's text tower: a causal transformer over tokens (Radford et al. 2021, arXiv:2103.00020, section 2.4).

`OpenCLIPTextModel` has open_clip's parameter names, as Stable Diffusion 2; `CLIPTextModel` of `clip_transformers.py`,
which computes the same, has those of transformers, as Stable Diffusion 1. Padding is not masked: both models were
trained without a mask, and the tokens after the end of text are part of the conditioning.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.kernels import attention


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class CausalSelfAttention(nn.Module):
    """Causal attention with `heads` heads; the layouts store the projection to q, k and v differently."""

    heads: int
    out_proj: nn.Linear

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within x (b, n, d); mask: boolean, broadcastable to (b, heads, n, n), in place of the causal one."""
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in self.qkv(x))
        x = rearrange(attention(q, k, v, causal=mask is None, mask=mask), "b h n d -> b n (h d)")
        return self.out_proj(x)


class StackedAttention(CausalSelfAttention):
    """open_clip's layout, which is torch.nn.MultiheadAttention's: q, k and v stacked in one matrix."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.projection = StackedProjection()
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.projection(x, self.in_proj_weight, self.in_proj_bias)


class StackedProjection(nn.Module):
    """Compute q, k and v by one matrix; a module without weights, so that hooks can change each of the three."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.linear(x, weight, bias).chunk(3, dim=-1)


class OpenCLIPBlock(nn.Module):
    """open_clip's ResidualAttentionBlock, which computes the same as CLIPBlock."""

    def __init__(self, width: int, heads: int, activation: str, mlp_width: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = StackedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = two_layers(width, activation, mlp_width, "c_fc", "c_proj")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


@dataclass(eq=False, repr=False)
class TextTower(nn.Module):
    """What the two layouts share; the fields are the constructor's arguments.

    Every size is an argument: the number of heads cannot be read from the weights.
    """

    vocab_size: int  # rows of the token embedding
    width: int  # features d per token
    layers: int  # number of blocks
    heads: int  # number of attention heads
    context_length: int  # maximum number of tokens per prompt
    activation: str  # "quick_gelu" (OpenAI's CLIP, Stable Diffusion 1) or "gelu" (exact; open_clip, Stable Diffusion 2)
    projection_dim: int | None = None  # features p of the pooled text; None: no projection, or width (open_clip)
    mlp_width: int | None = None  # features between the two layers of a block's MLP; None: 4 width

    def __post_init__(self) -> None:
        super().__init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown: it is one of {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} does not split into {self.heads} heads: heads must divide it")
        self.block_sizes = self.width, self.heads, self.activation, self.mlp_width or 4 * self.width

    def embed(self, tokens: Tensor) -> Tensor:
        """Return token plus position embeddings, (b, n) -> (b, n, d)."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    def final_norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """Apply the text projection, (b, d) -> (b, p)."""
        raise NotImplementedError

    def hidden_states(self, tokens: Tensor, depth: int | None = None) -> list[Tensor]:
        """Return the embeddings of tokens (b, n) int64 and the output of each of the first `depth` blocks, or of all.

        These are depth + 1 tensors (b, n, d), without the last layer norm; n is at most the context length.
        """
        states = [self.embed(tokens)]
        for block in self.blocks()[:depth]:
            states.append(block(states[-1]))
        return states

    def pool(self, x: Tensor, tokens: Tensor, eos: int) -> Tensor:
        """Return the text embedding (b, p): the normed last state (b, n, d) at the first end of text, projected."""
        first = (tokens == eos).int().argmax(dim=-1)  # (b,)
        return self.project(x[torch.arange(len(x), device=x.device), first])


class OpenCLIPTextModel(TextTower):
    """The tower with open_clip's parameter names, which are those of its CLIP class without `visual.*`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = nn.ModuleList(OpenCLIPBlock(*self.block_sizes) for _ in range(self.layers))
        projection_dim = self.width if self.projection_dim is None else self.projection_dim
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, self.width))
        self.text_projection = nn.Parameter(torch.empty(self.width, projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))  # not used by the tower, but in every public file
        self.transformer: Any = nn.ModuleDict({"resblocks": blocks})
        self.token_embedding = nn.Embedding(self.vocab_size, self.width)
        self.ln_final = nn.LayerNorm(self.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.width**-0.5)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def blocks(self) -> nn.ModuleList:
        return self.transformer.resblocks

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_final(x)

    def project(self, x: Tensor) -> Tensor:
        return x @ self.text_projection


def two_layers(width: int, activation: str, inner: int, first: str, second: str) -> nn.Sequential:
    """Return width -> inner -> width, with the layout's names for the two layers."""
    layers = [(first, nn.Linear(width, inner)), ("gelu", ACTIVATIONS[activation]()), (second, nn.Linear(inner, width))]
    return nn.Sequential(OrderedDict(layers))
