"""The noisy classifier of classifier guidance: the UNet's encoder with a head (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checks import Count, Levels, Probability, Width
from ldm.models.blocks import count_heads, normalization, require_two_dims, timestep_embedding, zero_module
from ldm.models.kernels import attention
from ldm.models.levels import plan_levels
from ldm.models.unet import UNetEncoder, time_mlp

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
HIDDEN = 2048  # width of the spatial heads' hidden layer


class AttentionPool2d(nn.Module):
    """Feature map (b, embed_dim, s, s) -> (b, output_dim), by attention from its mean, as in CLIP's image tower.

    spacial_dim is s; num_heads_channels is the width of a head and must divide embed_dim.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads = count_heads(embed_dim, -1, num_heads_channels)
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, embed_dim if output_dim is None else output_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)  # (b, c, 1 + s * s)
        if tokens.shape[-1] != self.positional_embedding.shape[-1]:
            side = int((self.positional_embedding.shape[-1] - 1) ** 0.5)
            raise ValueError(
                f"attention pooling takes feature maps of {side} x {side}, and got {x.shape[-2]} x {x.shape[-1]}: "
                "give images of image_size"
            )
        tokens = tokens + self.positional_embedding
        layout = "b (three h d) n -> three b h n d"
        q, k, v = rearrange(self.qkv_proj(tokens), layout, three=3, h=self.num_heads)  # each (b, h, n, d)
        pooled = attention(q[:, :, :1], k, v)  # only the mean's query is used: (b, h, 1, d)
        return self.c_proj(rearrange(pooled, "b h n d -> b (h d) n"))[:, :, 0]


@dataclass(eq=False, repr=False)
class EncoderUNetModel(UNetEncoder):
    """p(y | x_t): logits of classes for a noisy image x_t at timestep t; the first half of `unet.UNetModel`.

    The fields are the constructor's arguments, in CompVis's order; those without a comment are as in UNetModel.
    """

    image_size: Width  # only `pool` "attention" is bound to it
    in_channels: Width
    model_channels: Width
    out_channels: Width  # number of classes
    num_res_blocks: Count
    attention_resolutions: Sequence[int]
    dropout: Probability = 0.0
    channel_mult: Levels = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    use_checkpoint: bool = False
    use_fp16: bool = False
    num_heads: Literal[-1] | Count = 1
    num_head_channels: Literal[-1] | Width = -1
    num_heads_upsample: int = -1  # no effect: there is no decoder
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    # The head. "adaptive": the mean of the lowest features, then a linear layer that starts at zero. "attention":
    # AttentionPool2d, as in ADM's published classifiers; needs num_head_channels. "spatial", "spatial_v2": the means of
    # every layer's features, then a hidden layer with ReLU, or with normalisation and SiLU.
    pool: str = "adaptive"
    norm_groups: Count = 32

    def __post_init__(self) -> None:
        super().__init__()
        require_two_dims(self.dims)
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown: it is one of {', '.join(POOLS)}")
        if self.pool == "attention" and self.num_head_channels == -1:
            raise ValueError('pool "attention" needs num_head_channels, the width of its heads')
        levels = plan_levels(self.model_channels, self.channel_mult, self.num_res_blocks, self.attention_resolutions)
        self.time_embed = time_mlp(self.model_channels, 4 * self.model_channels)
        self.input_blocks, widths = self.encoder(self.in_channels, levels)
        width = levels[-1].width
        self.middle_block = self.middle(levels[-1])
        if self.pool.startswith("spatial"):
            self.out = _spatial_head(sum(widths) + width, self.out_channels, self.pool)
            return
        if self.pool == "adaptive":
            pooling = [nn.AdaptiveAvgPool2d(1), zero_module(nn.Conv2d(width, self.out_channels, 1)), nn.Flatten()]
        else:
            side = self.image_size // 2 ** (len(levels) - 1)
            pooling = [AttentionPool2d(side, width, self.num_head_channels, self.out_channels)]
        self.out = nn.Sequential(normalization(width, self.norm_groups), nn.SiLU(), *pooling)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Map variance-preserving x (b, in_channels, h, w) at timesteps (b,) in 0..T-1 to logits (b, out_channels)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))  # (b, 4 c)
        h, means = x.to(self.dtype), []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)  # (b, width of the level, h / 2^level, w / 2^level)
            if self.pool.startswith("spatial"):
                means.append(h.mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if means else h).to(x.dtype)


def _spatial_head(features: int, classes: int, pool: str) -> nn.Sequential:
    """Return a head for the means of every layer, (b, features) -> (b, classes)."""
    middle = [nn.ReLU()] if pool == "spatial" else [normalization(HIDDEN), nn.SiLU()]
    return nn.Sequential(nn.Linear(features, HIDDEN), *middle, nn.Linear(HIDDEN, classes))
