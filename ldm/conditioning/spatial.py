"""Condition on images, which the UNet takes as additional input channels at the size of its latents."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Range, Width

METHODS = ("nearest", "bilinear", "bicubic", "area")


class SpatialRescaler(nn.Module):
    """Resize an image or a map of classes, as in latent diffusion's semantic synthesis.

    Args:
        n_stages: how often to resize by the factor `multiplier`.
        method: interpolation mode.
        in_channels: of the image; of a map, the number of classes.
        out_channels: of a 1x1 convolution at the end, `channel_mapper`; None: no convolution.
    """

    null = None  # there is no null condition
    reads = "map"  # which part of a data set's sample it resizes

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
        self.n_stages, self.in_channels = n_stages, in_channels
        self.method = method
        self.multiplier = multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Return {"c_concat": encode(x)}."""
        return {"c_concat": self.encode(x)}

    def encode(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Resize images (b, in_channels, h, w), or maps of class numbers int64 (b, h, w), to (b, out_channels, h', w').

        A map's classes become channels, which are 1 where the map has the class and 0 elsewhere.
        """
        x = self._one_hot(stacked) if _is_map(stacked := _stacked(x)) else _checked(stacked)
        if self.channel_mapper is not None:
            x = x.to(self.channel_mapper.weight)
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)  # (b, c, h', w')
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def _one_hot(self, classes: Tensor) -> Tensor:
        low, high = classes.min().item(), classes.max().item()
        if not 0 <= low <= high < self.in_channels:
            raise ValueError(
                f"the map has the classes {low} to {high}, and this model's are 0 to {self.in_channels - 1}"
            )
        return F.one_hot(classes, self.in_channels).movedim(-1, 1).float()  # (b, in_channels, h, w)


class ConcatImage(nn.Module):
    """Condition on an image as it is, as latent diffusion's super-resolution does on the small image."""

    null = None  # there is no null condition
    reads = "image"  # which part of a data set's sample it takes; training makes it as small as its latents

    def forward(self, x: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Return {"c_concat": x} of x (b, c, h, w) in [-1, 1], which has the latents' height and width."""
        return {"c_concat": _checked(_stacked(x))}


Picture = ConcatImage  # its name in checkpoints of version 0.1


def _stacked(x: Any) -> Any:
    """Return a list of tensors of one shape as one; anything else as it is."""
    alike = isinstance(x, Sequence) and all(isinstance(one, Tensor) and one.shape == x[0].shape for one in x)
    return torch.stack(list(x)) if alike and len(x) > 0 else x


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.dtype == torch.int64


def _checked(x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        what = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"this model is conditioned on images, floats (b, c, h, w), got {what}: call model.generate(images) from "
            "Python, or the commands img2img --upscale (small images) and sample --map (maps of classes)"
        )
    return x
