"""A small class-conditional UNet for images of any size, odd ones too, as in a course that writes it in NumPy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Count, Entries, Width, Widths
from ldm.models.blocks import count_heads, normalization, timestep_embedding, zero_module
from ldm.models.kernels import attention


class UNet2D(nn.Module):
    """Predicts eps (or x0, v) from a noisy image x, its timestep t and its class y.

    Each width is a level of `blocks` residual blocks in the encoder, one more in the decoder, at half the size of the
    previous one. As in the course (10 classes, order "post", attention "bare"): 991,201 parameters in 231 tensors.

    Args:
        channels: of the images, in and out.
        widths: of the levels, in multiples of norm_groups.
        blocks: residual blocks per level.
        num_classes: None for an unconditional network.
        order: of the residual blocks, "pre" or "post"; see `ResidualBlock`.
        attention: in the middle: "residual" (of the normalised input, added to it), or "bare" (neither, as in the
            course).
        upsample: "interpolate" (nearest neighbour, then a convolution) or "transpose" (a transposed convolution).
        head_channels: width of an attention head; it must divide the last width.
    """

    downsampling = 1  # any size: the decoder returns to the encoder's sizes

    def __init__(
        self,
        channels: Width = 1,
        widths: Widths = (32, 64, 32),
        blocks: Count = 2,
        num_classes: Entries | None = None,
        order: str = "pre",
        attention: str = "residual",
        upsample: str = "interpolate",
        head_channels: Width = 8,
        norm_groups: Count = 32,
    ) -> None:
        super().__init__()
        self.time_channels, emb_channels = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(
            nn.Linear(self.time_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.class_embed = None if num_classes is None else nn.Embedding(num_classes, emb_channels)

        def residual(before: int, after: int) -> ResidualBlock:
            return ResidualBlock(before, after, emb_channels, order, norm_groups)

        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        encoder, skips = [], [widths[0]]  # widths of the encoder's outputs, which the decoder takes
        for level, width in enumerate(widths):
            for _ in range(blocks):
                encoder.append(residual(skips[-1], width))
                skips.append(width)
            if level < len(widths) - 1:
                encoder.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.encoder = nn.ModuleList(encoder)
        width = widths[-1]
        middle = SelfAttention(width, head_channels, attention, norm_groups)
        self.middle = nn.ModuleList([residual(width, width), middle, residual(width, width)])
        decoder = []
        for level, out_width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                decoder.append(residual(width + skips.pop(), out_width))
                width = out_width
            if level > 0:
                decoder.append(UpsampleTo(width, upsample))
        self.decoder = nn.ModuleList(decoder)
        self.out = nn.Sequential(normalization(width, norm_groups), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Map x (b, channels, h, w), timesteps (b,) in 0..T-1 and class numbers y (b,) to (b, channels, h, w)."""
        assert (y is None) == (self.class_embed is None), "give y if and only if the network has classes"
        features = timestep_embedding(timesteps, self.time_channels, sines_first=True)
        emb = self.time_embed(features.to(x.dtype))  # (b, 4 widths[0])
        if self.class_embed is not None:
            emb = emb + self.class_embed(y)
        h = self.conv_in(x)  # (b, widths[0], h, w)
        skips = [h]
        for layer in self.encoder:
            h = layer(h, emb) if isinstance(layer, ResidualBlock) else layer(h)  # halving rounds up: 14, 7, 4
            skips.append(h)
        first, attend, second = self.middle
        h = second(attend(first(h, emb)), emb)
        for layer in self.decoder:
            if isinstance(layer, UpsampleTo):
                h = layer(h, skips[-1].shape[-2:])
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection: x (b, c, h, w), emb (b, e) -> (b, out_channels, h, w).

    order "pre": normalisation, SiLU, convolution, twice; the skip is a 1x1 convolution only where the width changes,
    and the last convolution starts at zero, so that the block starts as its skip (Dhariwal & Nichol 2021).
    order "post": convolution, normalisation, SiLU, twice; the skip is always a 1x1 convolution.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int, order: str, norm_groups: int) -> None:
        super().__init__()
        if order not in ("pre", "post"):
            raise ValueError(f"order {order!r} is unknown: it is pre or post")
        self.order = order
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm1 = normalization(channels if order == "pre" else out_channels, norm_groups)
        self.emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, norm_groups)
        if order == "pre":
            zero_module(self.conv2)
        same = order == "pre" and channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        emb = self.emb(emb)[:, :, None, None]  # (b, out_channels, 1, 1)
        if self.order == "pre":
            h = self.conv1(F.silu(self.norm1(x))) + emb
            h = self.conv2(F.silu(self.norm2(h)))
        else:
            h = F.silu(self.norm1(self.conv1(x))) + emb
            h = F.silu(self.norm2(self.conv2(h)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Self-attention over the positions of x (b, c, h, w); mode "residual" or "bare", see `UNet2D`."""

    def __init__(self, channels: int, head_channels: int, mode: str, norm_groups: int) -> None:
        super().__init__()
        if mode not in ("residual", "bare"):
            raise ValueError(f"attention {mode!r} is unknown: it is residual or bare")
        self.heads = count_heads(channels, -1, head_channels)
        self.norm = normalization(channels, norm_groups) if mode == "residual" else None
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x if self.norm is None else self.norm(x)).flatten(2).transpose(1, 2)  # (b, h * w, c)
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (b, heads, h * w, d)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        attended = attention(q, k, v).transpose(1, 2).flatten(2)  # (b, h * w, c)
        out = self.to_out(attended).transpose(1, 2).unflatten(2, x.shape[-2:])  # (b, c, h, w)
        return out if self.norm is None else x + out


class UpsampleTo(nn.Module):
    """Doubles the size, or one less: (b, c, h, w) -> (b, c, H, W), H being 2h - 1 or 2h, and W likewise.

    mode "interpolate": output i is input floor(i h / H), then a 3x3 convolution. mode "transpose": a transposed 4x4
    convolution of stride 2, which doubles, without its last row or column where the size is odd.
    """

    def __init__(self, channels: int, mode: str) -> None:
        super().__init__()
        if mode not in ("interpolate", "transpose"):
            raise ValueError(f"upsample {mode!r} is unknown: it is interpolate or transpose")
        if mode == "transpose":
            self.conv: nn.Module = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.transpose = mode == "transpose"

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.transpose:
            return self.conv(x)[..., : size[0], : size[1]]
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))
