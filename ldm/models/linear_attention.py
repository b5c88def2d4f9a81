"""Self-attention whose cost grows with the number of positions, not with its square (Shen et al. 2018, 1812.01243)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.blocks import checkpoint, count_heads, normalization, zero_module


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax_d(q) / sqrt(d) (softmax_m(k)^T v): "efficient attention" in their section 3.2, scaled as in most code.

    q is (b, h, n, d); k and v are (b, h, m, d); the result is (b, h, n, d). Keys are normalised over positions and each
    query over its features, so that k^T v, (d, d), can be summed once for all queries: 2 (n + m) d^2 products a head in
    place of attention's 2 n m d.
    """
    context = k.softmax(dim=-2).transpose(-2, -1) @ v  # (b, h, d, d)
    return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ context


class LinearAttentionBlock(nn.Module):
    """Linear self-attention over the positions of a feature map (b, c, h, w), added to it; otherwise `AttentionBlock`.

    num_head_channels: the width of one head, or -1 for `num_heads` of them. memory: learned keys and values that every
    image has besides its own positions. What the heads found, which is small, is brought to unit mean square at each
    position before the projection out, which starts at zero.
    Raises ValueError when the heads do not divide the channels, or for a memory below 0.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        memory: int = 0,
        use_checkpoint: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        heads = self.num_heads = count_heads(channels, num_heads, num_head_channels)
        if memory < 0:
            raise ValueError(f"attention_memory {memory} must not be below 0")
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels, norm_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.memory = nn.Parameter(torch.randn(2, heads, memory, channels // heads)) if memory else None
        self.norm_out = nn.RMSNorm(channels)
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (b, 3c, n)
        q, k, v = rearrange(qkv, "b (three h d) n -> three b h n d", three=3, h=self.num_heads)
        if self.memory is not None:
            k, v = (
                torch.cat([m.expand(len(x), -1, -1, -1), own], 2) for m, own in zip(self.memory, (k, v), strict=True)
            )
        h = rearrange(linear_attention(q, k, v), "b h n d -> b n (h d)")
        return x + self.proj_out(self.norm_out(h)).transpose(1, 2).reshape(x.shape)  # (b, c, h, w)
