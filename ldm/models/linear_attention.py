"""Self-attention whose cost grows with the number of positions, not with its square (Shen et al. 2018, 1812.01243)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.blocks import checkpoint, count_heads, normalization, zero_module


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax_d(q) / sqrt(d) (softmax_m(k)^T v), their section 3.2's "efficient attention", scaled as usual.

    Keys are normalised over positions and each query over its features, so that k^T v, (d, d), is summed once for all
    queries: 2 (n + m) d^2 products per head instead of attention's 2 n m d. q is (b, h, n, d), k and v are
    (b, h, m, d).
    """
    context = k.softmax(dim=-2).transpose(-2, -1) @ v  # (b, h, d, d)
    return (q.softmax(dim=-1) * q.shape[-1] ** -0.5) @ context


class LinearAttentionBlock(nn.Module):
    """`AttentionBlock` with linear attention: over the positions of a feature map (b, c, h, w), added to it.

    The heads' output, which is small, is normalised to unit mean square at each position before the projection out.

    Args:
        num_heads, num_head_channels: as in `count_heads`.
        memory: number of learned keys and values beside those of the image's positions.
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
            raise ValueError(f"attention_memory is {memory}: it must be at least 0")
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
            memory = self.memory[:, None].expand(-1, len(x), -1, -1, -1)  # (2, b, h, memory, d)
            k, v = torch.cat([memory, torch.stack([k, v])], dim=3)
        h = rearrange(linear_attention(q, k, v), "b h n d -> b n (h d)")
        return x + self.proj_out(self.norm_out(h)).transpose(1, 2).reshape(x.shape)  # (b, c, h, w)
