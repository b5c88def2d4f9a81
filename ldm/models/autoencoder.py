"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1; Esser et al. 2021), in CompVis's names."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu as nonlinearity  # CompVis's name, under which research code replaces it

from ldm.checks import Count, Levels, Probability, Width
from ldm.legacy_paths import elsewhere
from ldm.models.blocks import checkpoint, normalization
from ldm.models.distributions import DiagonalGaussianDistribution
from ldm.models.kernels import AttentionOp, attention
from ldm.util import call_with

__getattr__ = elsewhere(__name__)  # the other names of CompVis's file

EPS = 1e-6  # of every group normalisation here; 1e-5 in the UNet's residual blocks


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions, added to x: (b, in_channels, h, w) -> (b, out_channels, h, w).

    Args:
        conv_shortcut: where the width changes, add x by a 3x3, not a 1x1, convolution.
        temb_channels: width of an embedded time; 0, as in the autoencoders, for none.
    """

    use_checkpoint = False  # as of the UNet's blocks: recompute activations in the backward pass

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 512,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = normalization(in_channels, norm_groups, EPS)
        self.conv1 = nn.Conv2d(in_channels, self.out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, self.out_channels)
        self.norm2 = normalization(self.out_channels, norm_groups, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1)
        if self.in_channels != self.out_channels and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, self.out_channels, 3, padding=1)
        elif self.in_channels != self.out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, self.out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return checkpoint(self._forward, (x, temb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))  # (b, out_channels, h, w)
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions of (b, c, h, w), added to it."""

    use_checkpoint = False
    attention_op = AttentionOp()

    def __init__(self, in_channels: int, norm_groups: int = 32) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = normalization(in_channels, norm_groups, EPS)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


def make_attn(
    in_channels: int, attn_type: str = "vanilla", attn_kwargs: None = None, norm_groups: int = 32
) -> nn.Module:
    """Return the attention of that type, by CompVis's name and arguments: an AttnBlock, or nothing for "none"."""
    if attn_type not in ("vanilla", "vanilla-xformers", "none"):  # the second named a kernel, as kernels.py does now
        raise ValueError(f'attn_type is {attn_type!r}: it must be "vanilla", "vanilla-xformers" or "none"')
    if attn_kwargs is not None:
        raise ValueError(f"attn_kwargs is {attn_kwargs!r}: no type of attention that is here takes any")
    return nn.Identity() if attn_type == "none" else AttnBlock(in_channels, norm_groups)


class Downsample(nn.Module):
    """Halves (b, c, h, w): a strided 3x3 convolution padded on the right and at the bottom, or the mean of 2x2."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # (b, c, h / 2, w / 2)
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Doubles (b, c, h, w): nearest neighbour, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # (b, c, 2h, 2w)
        return self.conv(x) if self.with_conv else x


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by its attention, if the level has any, then resampling."""

    def __init__(self, blocks: list[ResnetBlock], attention: list[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)

    def forward(self, h: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            h = block(h)
            if len(self.attn) > 0:
                h = self.attn[j](h)
        return h


@dataclass(kw_only=True, eq=False, repr=False)
class _Half(nn.Module):
    """What `Encoder` and `Decoder` share: the constructor's arguments, which are a CompVis `ddconfig`, and the parts.

    One ddconfig serves both, so each takes some arguments that only the other uses.
    """

    ch: Width  # width of the first level
    out_ch: Width  # channels of the decoded image
    num_res_blocks: Count  # per level; the decoder has one more
    attn_resolutions: Sequence[int]  # heights of the feature maps with attention, for images of height `resolution`
    in_channels: Width  # channels of the image
    resolution: Width  # height of the images, for attn_resolutions
    z_channels: Width  # channels between encoder and decoder
    ch_mult: Levels = (1, 2, 4, 8)  # width of each level in units of ch
    dropout: Probability = 0.0  # in the residual blocks
    resamp_with_conv: bool = True  # resample with convolutions
    double_z: bool = True  # the encoder gives means and log variances
    attn_type: str = "vanilla"  # or "none": no attention anywhere
    tanh_out: bool = False  # bound the decoder's output to [-1, 1]
    give_pre_end: bool = False  # the decoder's output is its features before the last norm
    use_linear_attn: bool = False  # must be False: CompVis's attn_type "linear"
    norm_groups: Count = 32  # must divide every width
    patch: Count = 1  # side of the squares whose pixels are channels of one position of the first level

    def __post_init__(self) -> None:
        super().__init__()
        if self.use_linear_attn:
            raise ValueError("use_linear_attn is not supported: leave it out")
        self.num_resolutions, self.temb_ch = len(self.ch_mult), 0
        self.downsampling = self.patch * 2 ** (len(self.ch_mult) - 1)  # f, pixels per latent
        self.tiling: Any = None  # `ldm.inference.tiling.Tiling`, to compute in less memory

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.tiling is None else self.tiling.apply(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output for the whole batch, computed at once."""
        raise NotImplementedError

    def residual(self, channels: int, out_channels: int) -> ResnetBlock:
        widths: dict[str, Any] = {"in_channels": channels, "out_channels": out_channels, "temb_channels": self.temb_ch}
        return ResnetBlock(**widths, dropout=self.dropout, norm_groups=self.norm_groups)

    def attend(self, channels: int) -> nn.Module:
        return make_attn(channels, self.attn_type, norm_groups=self.norm_groups)

    def level(self, i: int, channels: int, count: int) -> _Level:
        """Return level i with `count` residual blocks, the first of which takes `channels`."""
        width = self.ch * self.ch_mult[i]
        blocks = [self.residual(channels if j == 0 else width, width) for j in range(count)]
        has_attention = self.resolution // (self.patch * 2**i) in self.attn_resolutions
        return _Level(blocks, [self.attend(width) for _ in blocks] if has_attention else [])

    def middle(self, width: int) -> nn.Sequential:
        blocks = {"block_1": self.residual(width, width), "attn_1": self.attend(width)}
        return nn.Sequential(OrderedDict(blocks, block_2=self.residual(width, width)))


class Encoder(_Half):
    """Pixels (b, in_channels, h, w) -> (b, 2 z_channels, h / f, w / f) with f = patch 2^(len(ch_mult) - 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_ch_mult = (1, *self.ch_mult)
        self.conv_in = nn.Conv2d(self.in_channels * self.patch**2, self.ch, 3, padding=1)
        self.down: Any = nn.ModuleList()
        width = self.ch
        for i, mult in enumerate(self.ch_mult):
            level = self.level(i, width, self.num_res_blocks)
            width = self.ch * mult
            if i < len(self.ch_mult) - 1:
                level.downsample = Downsample(width, self.resamp_with_conv)
            self.down.append(level)
        self.mid = self.middle(width)
        self.norm_out = normalization(width, self.norm_groups, EPS)
        self.conv_out = nn.Conv2d(width, 2 * self.z_channels if self.double_z else self.z_channels, 3, padding=1)

    def compute(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for i, level in enumerate(self.down):
            h = level(h)  # (b, ch * ch_mult[i], h / (patch 2^i), w / (patch 2^i))
            if i < len(self.down) - 1:
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))  # (b, 2 z_channels, h / f, w / f)


class Decoder(_Half):
    """(b, z_channels, h / f, w / f) -> pixels (b, out_ch, h, w); `up[0]`, the highest resolution, runs last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.resolution // self.downsampling
        self.z_shape = (1, self.z_channels, size, size)  # of images of height `resolution`, for callers that read it
        width = self.ch * self.ch_mult[-1]
        self.conv_in = nn.Conv2d(self.z_channels, width, 3, padding=1)
        self.mid = self.middle(width)
        levels = []
        for i, mult in reversed(list(enumerate(self.ch_mult))):
            level = self.level(i, width, self.num_res_blocks + 1)
            width = self.ch * mult
            if i > 0:
                level.upsample = Upsample(width, self.resamp_with_conv)
            levels.append(level)
        self.up: Any = nn.ModuleList(reversed(levels))
        self.norm_out = normalization(width, self.norm_groups, EPS)
        self.conv_out = nn.Conv2d(width, self.out_ch * self.patch**2, 3, padding=1)

    def compute(self, x: Tensor) -> Tensor:
        self.last_z_shape = x.shape  # for callers that read it
        h = self.mid(self.conv_in(x))
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h)  # (b, ch * ch_mult[i], h / (patch 2^i), w / (patch 2^i))
            if i > 0:
                h = level.upsample(h)
        if self.give_pre_end:
            return h  # (b, ch * ch_mult[0], h / patch, w / patch)
        h = F.pixel_shuffle(self.conv_out(nonlinearity(self.norm_out(h))), self.patch)  # (b, out_ch, h, w)
        return torch.tanh(h) if self.tanh_out else h


def require_unset(**settings: Any) -> None:
    """Raise ValueError for an argument of CompVis's autoencoders that has no counterpart here, if it is set."""
    for name, value in settings.items():
        if value:
            raise ValueError(f"{name} {value!r} has no counterpart here: leave it out (ldm.load reads checkpoints)")


class Autoencoder(nn.Module):
    """What the KL and the VQ autoencoder share."""

    post_quant_conv: nn.Conv2d

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: Width) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        part = f"{type(self).__name__}: ddconfig"
        self.encoder, self.decoder = call_with(part, Encoder, ddconfig), call_with(part, Decoder, ddconfig)
        self.image_channels, self.downsampling = self.encoder.in_channels, self.encoder.downsampling

    def decode(self, z: Tensor) -> Tensor:
        """Return pixels (b, c, h, w), not clamped to [-1, 1], in the parameters' dtype, of z (b, embed_dim, ...)."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))

    def get_last_layer(self) -> Tensor:
        """Return the decoder's last weight, at which the gradients of the losses are compared."""
        return self.decoder.conv_out.weight


class AutoencoderKL(Autoencoder):
    """Pixels in [-1, 1] <-> raw (unscaled) latents, with a Gaussian posterior.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        embed_dim: number of latent channels.
        others: of CompVis's configs, not used: losses and averages belong to training, `ldm.load` reads checkpoints.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: dict | None = None,
        embed_dim: Width | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
    ) -> None:
        require_unset(ckpt_path=ckpt_path, colorize_nlabels=colorize_nlabels)
        if embed_dim is None:
            raise ValueError("embed_dim is missing: it is the number of latent channels")
        if not ddconfig.get("double_z", True):
            raise ValueError("ddconfig has double_z false: a KL autoencoder needs it true, for means and log variances")
        super().__init__(ddconfig, embed_dim)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Map pixels (b, c, h, w) to the posterior over latents (b, embed_dim, h / f, w / f), in float32 or wider."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x.to(self.quant_conv.weight.dtype))))

    def forward(
        self, input: Tensor, sample_posterior: bool = True, noise: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstruction (b, c, h, w) from a sample of the posterior, or its mode, and the posterior.

        noise: what makes the sample's noise of the posterior's mean.
        """
        posterior = self.encode(input)
        z = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make (z - mean) / std the latents, in the two 1x1 convolutions around them; decode(encode(x)) stays the same.

        Args:
            mean, std: of the present latents, (embed_dim,) each.
        """
        if mean.shape != (self.embed_dim,) or std.shape != (self.embed_dim,):
            raise ValueError(
                f"mean has shape {tuple(mean.shape)} and std {tuple(std.shape)}: both need one entry for each of the "
                f"{self.embed_dim} latent channels"
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"mean {mean.tolist()} and std {std.tolist()} must be finite, and std positive")
        quant, post = self.quant_conv, self.post_quant_conv
        mean, std = mean.cpu().double(), std.cpu().double()  # on the CPU: not every device has float64
        # a mean W h + b becomes (W h + b - mean) / std; a log variance loses 2 log std
        scale = torch.cat([1 / std, torch.ones_like(std)])
        shift = torch.cat([-mean / std, -2 * std.log()])
        quant.weight.copy_(quant.weight.cpu().double() * scale[:, None, None, None])
        quant.bias.copy_(quant.bias.cpu().double() * scale + shift)
        # and W z + b becomes W (z std + mean) + b
        post.bias.copy_(post.bias.cpu().double() + post.weight.cpu().double()[:, :, 0, 0] @ mean)
        post.weight.copy_(post.weight.cpu().double() * std[:, None, None])
