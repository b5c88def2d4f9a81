"""Condition on images, which the UNet takes as additional input channels at the size of its latents."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Range, Width

METHODS = ("nearest", "bilinear", "bicubic", "area")


class SpatialRescaler(nn.Module):
    """Resize an image or a map of one-hot labels, as in latent diffusion's semantic synthesis.

    Args:
        n_stages: how often to resize by the factor `multiplier`.
        method: interpolation mode.
        out_channels: of a 1x1 convolution at the end, `channel_mapper`; None: no convolution.
    """

    null = None  # there is no null condition

    def __init__(
        self,
        n_stages: Annotated[int, Range(0, 32)] = 1,
        method: str = "bilinear",
        multiplier: Annotated[float, Range(2**-10, 2**10)] = 0.5,
        in_channels: Width = 3,
        out_channels: Width | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in METHODS or n_stages < 0:
            raise ValueError(
                f"method {method!r} and n_stages {n_stages} do not make a rescaler: the method is one of "
                f"{', '.join(METHODS)}, the stages are counted from 0"
            )
        self.n_stages = n_stages
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return {"c_concat": encode(x)}."""
        return {"c_concat": self.encode(x)}

    def encode(self, x: Tensor) -> Tensor:
        """Resize x (b, in_channels, h, w) to (b, out_channels, h', w')."""
        x = _checked(x)
        if self.channel_mapper is not None:
            x = x.to(self.channel_mapper.weight)
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)  # (b, c, h', w')
        return x if self.channel_mapper is None else self.channel_mapper(x)


class ConcatImage(nn.Module):
    """Condition on an image as it is, as latent diffusion's super-resolution does on the small image."""

    null = None  # there is no null condition

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return {"c_concat": x} of x (b, c, h, w) in [-1, 1], which has the latents' height and width."""
        return {"c_concat": _checked(x)}


Picture = ConcatImage  # its name in checkpoints of version 0.1


def _checked(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        what = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"this model is conditioned on images, floats (b, c, h, w), got {what}: call "
            "model.generate(images) from Python, since the scripts only take texts and numbers"
        )
    return x
