"""Decode and encode large images in little memory, with the result of computing them at once.

Tiles that are decoded separately show seams however far they overlap, because each group normalisation takes its mean
and variance from its tile, and no blending hides that. Here the layers run one by one, each band by band (full-width
strips of rows): a convolution sees the rows of its neighbours that its kernel reaches, a group normalisation the
statistics of all bands. Every value is then that of the whole image up to the order of sums, and there is nothing to
blend. What has the latents' size, such as attention over all positions, is computed at once.

The band bounds the activations on the device that computes, whatever the size of the image. The feature maps that wait
between two layers, at most two of the image's size, are kept on the CPU. If the CPU computes as well, the peak falls by
about half (Stable Diffusion's decoder at 512 x 512: from 0.9 to 0.44 GiB above the weights, in the same time).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import Decoder, Encoder, ResnetBlock


def slice_vae(model: LatentDiffusion) -> ExitStack:
    """Encode and decode one image at a time, in the memory that one image needs, until the result is closed."""
    return _set_tiling(model, Tiling())


def tile_vae(model: LatentDiffusion, side: int = 128, store: str | torch.device = "cpu") -> ExitStack:
    """Encode and decode one image at a time, and large ones in bands, until the result is closed.

    Args:
        side: a band has at most about side^2 pixels.
        store: the device on which feature maps wait. Stable Diffusion's decoder needs 1 KiB there for each pixel of the
            image (two maps of 128 channels, or one of 256, in float32): 0.25 GiB at 512 x 512.
    """
    if side < model.downsampling:
        raise ValueError(f"tiles of {side} pixels are too small: a latent of this model has {model.downsampling}")
    return _set_tiling(model, Tiling(model.downsampling, side, torch.device(store)))


@dataclass(frozen=True)
class Tiling:
    """How an Encoder or Decoder computes in less memory: one image at a time, and in bands where a side is given."""

    downsampling: int = 1  # pixels per latent
    side: int | None = None
    store: torch.device = torch.device("cpu")

    def apply(self, coder: Encoder | Decoder, x: Tensor) -> Tensor:
        """Return `coder.compute(x)` for x (b, c, h, w), up to rounding."""
        f, encodes = self.downsampling, isinstance(coder, Encoder)
        height, width = (size if encodes else size * f for size in x.shape[-2:])  # pixels
        if self.side is None or height * width <= self.side**2 or height % f or width % f:
            return torch.cat([coder.compute(image) for image in x.split(1)])
        rows = max(1, self.side**2 // (width * f))  # of latents, in a band
        if isinstance(coder, Encoder):
            return torch.cat([_encode(coder, image, rows * f, self.store) for image in x.split(1)])
        return torch.cat([_decode(coder, z, rows, self.store) for z in x.split(1)])


def _set_tiling(model: LatentDiffusion, tiling: Tiling) -> ExitStack:
    """Let the first stage compute so, until the result is closed. The identity (pixels) stays as it is."""
    undo = ExitStack()
    for coder in (model.first_stage_model.encoder, model.first_stage_model.decoder):
        if isinstance(coder, Encoder | Decoder):
            undo.callback(setattr, coder, "tiling", coder.tiling)
            coder.tiling = tiling
    return undo


def _decode(decoder: Decoder, z: Tensor, rows: int, store: torch.device) -> Tensor:
    """Return `decoder.compute(z)` for one z (1, c, h, w), in bands of this number of its rows."""
    bands = _Bands.of(decoder.mid(decoder.conv_in(z)), rows, store)
    for i, level in reversed(list(enumerate(decoder.up))):
        _level(bands, level)
        if i > 0:
            bands.apply(level.upsample, halo=1, scale=2)
    norm = bands.norm(decoder.norm_out)
    bands.apply(lambda h: decoder.conv_out(F.silu(norm(h))), halo=1)
    h = F.pixel_shuffle(bands.joined(), decoder.patch)
    return torch.tanh(h) if decoder.tanh_out else h


def _encode(encoder: Encoder, x: Tensor, rows: int, store: torch.device) -> Tensor:
    """Return `encoder.compute(x)` for one x (1, c, h, w), in bands of this number of its rows, a multiple of patch."""
    bands = _Bands.of(F.pixel_unshuffle(x, encoder.patch), rows // encoder.patch, store)
    bands.apply(encoder.conv_in, halo=1)
    for i, level in enumerate(encoder.down):
        _level(bands, level)
        if i < len(encoder.down) - 1:
            bands.apply(level.downsample, halo=2, scale=0.5)  # an even halo keeps the strides in step
    h = encoder.mid(bands.joined())
    return encoder.conv_out(F.silu(encoder.norm_out(h)))


def _level(x: "_Bands", level: Any) -> None:
    """Apply the residual blocks of a level, and its attention, which sees all positions and is for small maps."""
    for j, block in enumerate(level.block):
        _residual(x, block)
        if len(level.attn) > 0:
            x.apply_untiled(level.attn[j])


def _residual(x: "_Bands", block: ResnetBlock) -> None:
    """Apply a ResnetBlock without dropout. To save memory, bands of x are replaced once nothing needs them."""
    norm, h = x.norm(block.norm1), _Bands(x.device, x.store)
    for i, window, cut in x.windows(halo=1):
        h.append(cut(block.conv1(F.silu(norm(window)))))
        if block.in_channels != block.out_channels:
            x[i] = block.nin_shortcut(x[i])
    norm = h.norm(block.norm2)
    for i, window, cut in h.windows(halo=1):
        x[i] = x[i] + cut(block.conv2(F.silu(norm(window))))


class _Bands:
    """A feature map (1, c, h, w) in bands from the top. They wait on `store`; indexing returns them on `device`."""

    def __init__(self, device: torch.device, store: torch.device) -> None:
        self.device, self.store = device, store
        self.bands: list[Tensor] = []

    @classmethod
    def of(cls, h: Tensor, rows: int, store: torch.device) -> "_Bands":
        """Cut the map h into bands of this number of rows, the last with the remaining ones."""
        self = cls(h.device, store)
        for band in h.split(rows, dim=2):
            self.append(band.clone())  # not a view, which would keep all of h
        return self

    def __getitem__(self, i: int) -> Tensor:
        return self.bands[i].to(self.device)

    def __setitem__(self, i: int, band: Tensor) -> None:
        self.bands[i] = band.to(self.store)

    def append(self, band: Tensor) -> None:
        self.bands.append(band.to(self.store))

    def joined(self) -> Tensor:
        return torch.cat(self.bands, dim=2).to(self.device)

    def windows(self, halo: int, scale: float = 1) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
        """Yield each band with `halo` rows of its neighbours, none at the edges of the image, where layers pad.

        Beside its number comes what cuts the neighbours' rows from the output of a layer that changes sizes by `scale`.
        A band may be replaced as soon as it was yielded: the rows that the next one needs are kept.
        """
        above = self.bands[0][:, :, :0]
        for i, band in enumerate(self.bands):
            below = self.bands[i + 1][:, :, :halo] if i + 1 < len(self.bands) else band[:, :, :0]
            rows = torch.cat([above, band, below], dim=2).to(self.device)
            first, last = int(above.shape[2] * scale), int(below.shape[2] * scale)
            above = band[:, :, -halo:].clone()
            # a copy, not a view, which would keep the neighbours' rows too
            yield i, rows, lambda y, first=first, last=last: y[:, :, first : y.shape[2] - last].clone()

    def apply(self, layer: Callable[[Tensor], Tensor], halo: int, scale: float = 1) -> None:
        """Replace the map by layer(map), for a layer whose kernel reaches at most `halo` rows up and down."""
        for i, window, cut in self.windows(halo, scale):
            self[i] = cut(layer(window))

    def apply_untiled(self, layer: Callable[[Tensor], Tensor]) -> None:
        """Replace the map by layer(map), computed at once."""
        self.bands = type(self).of(layer(self.joined()), self.bands[0].shape[2], self.store).bands

    def norm(self, layer: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """Return `layer` with the statistics of the whole map: then it is a batch normalisation in eval mode."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for band in self.bands:
            band = band.to(self.device)
            wide = band.to(torch.promote_types(band.dtype, torch.float32))
            mean = wide.mean((0, 2, 3))  # (c,), of the band; torch.var_mean takes ten times as long
            var = (wide - mean[:, None, None]).square().mean((0, 2, 3))
            n, mean, var = band[0, 0].numel(), mean.cpu().double(), var.cpu().double()
            count, total, squares = count + n, total + n * mean, squares + n * (var + mean.square())
        total, squares = (sums.view(layer.num_groups, -1).mean(1) / count for sums in (total, squares))  # (g,)
        statistics = torch.stack([total, squares - total.square()]).to(wide.dtype).to(wide.device)  # (2, g)
        mean, var = statistics.repeat_interleave(layer.num_channels // layer.num_groups, dim=1)  # each (c,)
        weight, bias = layer.weight.to(wide.dtype), layer.bias.to(wide.dtype)
        return lambda h: F.batch_norm(h, mean, var, weight, bias, eps=layer.eps)
