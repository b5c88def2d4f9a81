"""Transformers over feature maps that attend to themselves and to a context (Rombach et al. 2022, section 3.3)."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

# `blocks.checkpoint` is called through its module, where research code replaces it.
from ldm.models import blocks
from ldm.models.blocks import ContextBlock, normalization, zero_module
from ldm.models.kernels import AttentionOp, attention


class GEGLU(nn.Module):
    """x W1 * gelu(x W2) (Shazeer 2020), W1 and W2 in one matrix: (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)  # each (..., dim_out)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with `mult` times the width and GELU, or GEGLU with `glu`, between.

    (b, n, dim) -> (b, n, dim_out), by default dim.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        project_in = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner, dim if dim_out is None else dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context, or to itself.

    Research code replaces `forward` and reads `heads`, `scale`, `to_q`, `to_k`, `to_v`, `to_out`: all four
    projections are modules, called on every forward.
    """

    attention_op = AttentionOp()

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        inner = heads * dim_head
        self.heads, self.dim_head = heads, dim_head
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x (b, n, query_dim) to a context (b, m, context_dim), by default x itself: (b, n, query_dim).

        mask: boolean (b, m), True for the tokens that may be attended to.
        """
        context = x if context is None else context
        b, n, _ = x.shape
        # views take a third of einops' time, and this is called thousands of times per image
        q = self.to_q(x).view(b, n, self.heads, -1).transpose(1, 2)  # (b, h, n, d)
        k = self.to_k(context).view(b, context.shape[1], self.heads, -1).transpose(1, 2)  # (b, h, m, d)
        v = self.to_v(context).view(b, context.shape[1], self.heads, -1).transpose(1, 2)  # (b, h, m, d)
        if mask is not None:
            mask = mask.reshape(b, 1, 1, -1)
        out = attention(q, k, v, mask=mask)  # (b, h, n, d)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))  # (b, n, query_dim)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each normalised first and added to x (b, n, dim).

    Args:
        checkpoint: recompute activations in the backward pass.
        disable_self_attn: the first attention attends to the context too.
    """

    ATTENTION_MODES = {"softmax": CrossAttention}  # research code puts its own class there

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.checkpoint = checkpoint
        first_context = context_dim if disable_self_attn else None
        attend = partial(self.ATTENTION_MODES["softmax"], heads=n_heads, dim_head=d_head, dropout=dropout)
        self.attn1 = attend(query_dim=dim, context_dim=first_context)
        self.attn2 = attend(query_dim=dim, context_dim=context_dim)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return blocks.checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context=context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(ContextBlock):
    """`depth` transformer blocks over the positions of a feature map: x (b, c, h, w) -> (b, c, h, w), added to x.

    The context is a tensor (b, n, context_dim) for all blocks, or a list with one per block. The projection out starts
    at zero.

    Args:
        context_dim: width of the context, or a list with one per block; a single entry serves all.
        use_linear: linear layers around the blocks (SD 2), not 1x1 convolutions (SD 1).
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        widths = [context_dim] if context_dim is None or isinstance(context_dim, int) else list(context_dim)
        if len(widths) not in (1, depth):
            raise ValueError(
                f"context_dim is {widths} for {depth} transformer blocks: give one width, or one per block"
            )
        widths = widths * depth if len(widths) == 1 else widths
        inner = n_heads * d_head
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = normalization(in_channels, norm_groups, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout, width, checkpoint=use_checkpoint, disable_self_attn=disable_self_attn
            )
            for width in widths
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        b, _, height, width = x.shape
        contexts = context if isinstance(context, list | tuple) else [context]
        if len(contexts) == 1:
            contexts = [*contexts] * len(self.transformer_blocks)
        tokens = self.norm(x)
        if self.use_linear:
            tokens = self.proj_in(tokens.flatten(2).transpose(1, 2))  # (b, n, d)
        else:
            tokens = self.proj_in(tokens).flatten(2).transpose(1, 2).contiguous()  # (b, n, d); or every norm copies
        for block, own_context in zip(self.transformer_blocks, contexts, strict=True):
            tokens = block(tokens, own_context)
        if self.use_linear:
            tokens = self.proj_out(tokens)  # (b, n, c)
        h = tokens.transpose(1, 2).view(b, -1, height, width)  # (b, c or d, h, w)
        return x + (h if self.use_linear else self.proj_out(h))
