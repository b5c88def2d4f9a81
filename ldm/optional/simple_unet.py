"""The UNet of a widely read annotated DDPM: no attention, no residual blocks, batch normalisation after the ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Width, Widths
from ldm.models.blocks import timestep_embedding


class SimpleUNet(nn.Module):
    """Predicts eps (or x0, v) from a noisy image x and its timestep. Sides must be multiples of `downsampling`.

    Args:
        channels: of the images, in and out.
        widths: at full size and after each halving. As published, 62,438,883 parameters for 3 channels.
        time_channels: width of the embedded time, even.
        shared_norm: one batch normalisation, statistics included, for both convolutions of a block. This has the
            62,433,123 parameters that the text beside the published code counts.
    """

    def __init__(
        self,
        channels: Width = 3,
        widths: Widths = (64, 128, 256, 512, 1024),
        time_channels: Width = 32,
        shared_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths is {list(widths)}: give one for full size and one for each halving, at least two")
        if time_channels < 2 or time_channels % 2:
            raise ValueError(f"time_channels is {time_channels}: it must be even, half of them sines and half cosines")
        self.time_channels = time_channels
        self.downsampling = 2 ** (len(widths) - 1)
        self.time_embed = nn.Sequential(nn.Linear(time_channels, time_channels), nn.ReLU())
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        steps = list(zip(widths[:-1], widths[1:], strict=True))
        self.down_blocks = nn.ModuleList(
            Block(before, after, nn.Conv2d(after, after, 4, stride=2, padding=1), time_channels, shared_norm)
            for before, after in steps
        )
        self.up_blocks = nn.ModuleList(  # each also takes the encoder's map of the same size
            Block(2 * after, before, nn.ConvTranspose2d(before, before, 4, 2, 1), time_channels, shared_norm)
            for before, after in reversed(steps)
        )
        self.conv_out = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Map x (b, channels, h, w) and timesteps (b,) in 0..T-1 to (b, channels, h, w)."""
        features = timestep_embedding(timesteps, self.time_channels, sines_first=True, shift=1)
        emb = self.time_embed(features.to(x.dtype))  # (b, time_channels)
        h = self.conv_in(x)  # (b, widths[0], h, w)
        skips = []
        for block in self.down_blocks:
            h = block(h, emb)  # (b, widths[i + 1], h / 2^(i + 1), w / 2^(i + 1))
            skips.append(h)
        for block in self.up_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)  # the lowest map is joined with itself
        return self.conv_out(h)


class Block(nn.Module):
    """Two convolutions with the time added between them, then `resample`: (b, c, h, w) -> (b, out_channels, ...)."""

    def __init__(
        self, in_channels: int, out_channels: int, resample: nn.Module, time_channels: int, shared_norm: bool
    ) -> None:
        super().__init__()
        self.time = nn.Linear(time_channels, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(1 if shared_norm else 2))
        self.resample = resample

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norms[0](F.relu(self.conv1(x)))  # (b, out_channels, h, w)
        h = h + F.relu(self.time(emb))[:, :, None, None]
        h = self.norms[-1](F.relu(self.conv2(h)))
        return self.resample(h)
