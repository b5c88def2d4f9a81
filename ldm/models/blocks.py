"""The parts of the UNet, under CompVis's names: residual block, attention block, resampling, time embedding."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ldm.models.kernels import attention

COORDINATES = 10  # channels of `coordinate_channels`


def coordinate_channels(height: int, width: int) -> Tensor:
    """Return features of the position (10, h, w): u, sin and cos of pi u and 2 pi u, for u = x and y from -1 to 1.

    Liu et al. 2018 (CoordConv, arXiv:1807.03247) give convolutions x and y themselves.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    u = torch.stack([x, y])
    angles = torch.cat([u, 2 * u]) * torch.pi
    return torch.cat([u, angles.sin(), angles.cos()])


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    max_period: float = 10000,
    repeat_only: bool = False,
    sines_first: bool = False,
    shift: float = 0,
) -> Tensor:
    """Return sinusoidal features of the timestep (Vaswani et al. 2017, section 3.5; Ho et al. 2020).

    Feature k of each half has the frequency max_period^(-k / (dim / 2 - shift)). Conventions differ: guided diffusion,
    latent diffusion and diffusers' Stable Diffusion have cosines first and shift 0; Ho et al.'s code and most written
    after it have `sines_first` and shift 1, with which the last frequency is exactly 1 / max_period.

    Args:
        timesteps: (b,), may be fractional.
        repeat_only: return the timestep itself in every column.

    Returns:
        (b, dim) in float32, with a zero column at the end when dim is odd.
    """
    if repeat_only:
        return repeat(timesteps, "b -> b d", d=dim)
    half = dim // 2
    rate = -math.log(max_period) / max(half - shift, 1)  # the bound: a single frequency is 1 whatever the shift
    frequencies = torch.arange(half, dtype=torch.float32, device=timesteps.device).mul_(rate).exp_()
    angles = timesteps[:, None].float() * frequencies  # (b, dim / 2)
    parts = (angles.sin(), angles.cos()) if sines_first else (angles.cos(), angles.sin())
    embedding = torch.cat(parts, dim=1)  # (b, dim)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def normalization(channels: int, groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """Return a group normalisation (Wu & He 2018), or raise ValueError when the groups do not divide the channels.

    torch's kernels sum half-precision inputs in float32, so nothing is cast.
    """
    if groups < 1 or channels % groups:
        raise ValueError(
            f"{channels} channels do not split into {groups} groups: use widths in multiples of {groups}, "
            "or set norm_groups to a divisor of every width"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter to zero, so that the branch that ends here starts at zero, and return the module."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def checkpoint(func: Callable, inputs: Sequence, params: Iterable[nn.Parameter], flag: bool) -> Tensor:
    """Return func(*inputs); with `flag`, recompute func in the backward pass instead of keeping its activations.

    `params` belongs to CompVis's signature; torch finds the parameters by itself, frozen ones included.
    """
    if flag and torch.is_grad_enabled():
        return recompute(func, *inputs, use_reentrant=False)
    return func(*inputs)


def require_two_dims(dims: int) -> None:
    """Raise ValueError unless dims, an argument of CompVis's constructors, is 2."""
    if dims != 2:
        raise ValueError(f"dims is {dims!r}: these networks are for images, dims must be 2")


class TimestepBlock(nn.Module):
    """A module called as module(x, emb), emb (b, e) being the embedded time (and class)."""


class ContextBlock(nn.Module):
    """A module called as module(x, context), context (b, n, d) being what it cross-attends to."""


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that passes to each child, what its kind takes: the time embedding, the context, or x alone."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, ContextBlock):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    """Nearest neighbour, with `use_conv` then a 3x3 convolution: (b, channels, h, w) -> (b, out_channels, 2h, 2w)."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        require_two_dims(dims)
        out_channels = channels if out_channels is None else out_channels
        assert use_conv or out_channels == channels, "only a convolution can change the number of channels"
        self.channels, self.out_channels, self.use_conv, self.dims = channels, out_channels, use_conv, dims
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=padding) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (b, c, 2h, 2w)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """A strided 3x3 convolution, or the mean of 2x2: (b, channels, h, w) -> (b, out_channels, h / 2, w / 2)."""

    def __init__(
        self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        require_two_dims(dims)
        out_channels = channels if out_channels is None else out_channels
        assert use_conv or out_channels == channels, "only a convolution can change the number of channels"
        self.channels, self.out_channels, self.use_conv, self.dims = channels, out_channels, use_conv, dims
        self.op = nn.Conv2d(channels, out_channels, 3, stride=2, padding=padding) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (b, c, h / 2, w / 2)


class ResBlock(TimestepBlock):
    """The residual block of Dhariwal & Nichol 2021: x (b, c, h, w) and emb (b, e) -> (b, out_channels, h, w).

    The last convolution starts at zero, so that the block starts as its skip connection.

    Args:
        use_conv: a 3x3, not 1x1, convolution as skip connection where the width changes.
        use_scale_shift_norm: the time scales and shifts the second normalisation (AdaGN, their section 3) instead of
            being added.
        up, down: resample both branches after the first normalisation.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        require_two_dims(dims)
        assert not (up and down), "a block resamples in one direction"
        out_channels = channels if out_channels is None else out_channels
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out_channels
        self.dropout, self.use_conv, self.updown = dropout, use_conv, up or down
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            normalization(channels, norm_groups), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        resample = Upsample if up else Downsample
        self.h_upd = resample(channels, use_conv=False) if up or down else None
        self.x_upd = resample(channels, use_conv=False) if up or down else None
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels, norm_groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            size = 3 if use_conv else 1
            self.skip_connection = nn.Conv2d(channels, out_channels, size, padding=size // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.h_upd is None or self.x_upd is None:
            h = self.in_layers(x)  # (b, out_channels, h, w)
        else:
            norm, silu, conv = self.in_layers
            h = conv(self.h_upd(silu(norm(x))))  # (b, out_channels, 2h or h / 2, 2w or w / 2)
            x = self.x_upd(x)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]  # (b, out_channels or twice that, 1, 1)
        if self.use_scale_shift_norm:
            norm, silu, dropout, conv = self.out_layers
            scale, shift = emb.chunk(2, dim=1)
            h = conv(dropout(silu(norm(h) * (1 + scale) + shift)))
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Return the number of heads: `num_heads`, or as many as have the width `num_head_channels`, unless that is -1."""
    name, divisor = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", num_head_channels)
    if divisor < 1 or channels % divisor:
        raise ValueError(f"{channels} channels do not split into heads: {name} is {divisor} and must divide them")
    return num_heads if num_head_channels == -1 else channels // num_head_channels


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map (b, c, h, w), added to it (Dhariwal & Nichol 2021).

    Args:
        num_heads, num_head_channels: as in `count_heads`.
        use_new_attention_order: `qkv` has its 3c channels laid out (3, heads, d), not (heads, 3, d).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels, norm_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        order = "three h" if self.use_new_attention_order else "h three"
        tokens = rearrange(self.norm(x), "b c h w -> b c (h w)")
        qkv = self.qkv(tokens)  # (b, 3c, n)
        q, k, v = rearrange(qkv, f"b ({order} d) n -> three b h n d", three=3, h=self.num_heads)
        h = rearrange(attention(q, k, v), "b h n d -> b (h d) n")
        return x + self.proj_out(h).view(x.shape)  # (b, c, h, w)
