"""A UNet that also returns what its input attends to in the text, as `ldm.editing.maps` defines it."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import SpatialTransformer
from ldm.models.attention_layers import Layer, attention_layers, output_of, weights_of


class WithAttention(nn.Module):
    """The UNet, and its attention to each token: the mean over heads and layers, in the size of the largest layer's.

    The layers' attention is written out, so that the output and the maps are made from the same weights.

    Args:
        model: a LatentDiffusion whose UNet has cross-attention.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.network = model.model
        self.layers = [layer for layer in attention_layers(model) if layer.cross]

    def forward(self, x: Tensor, t: Tensor, c_crossattn: Tensor, c_adm: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output (b, z, h, w) and the attention (b, m, h, w) to m tokens."""
        maps: list[Tensor] = []
        sizes: list[tuple[int, ...]] = []

        def enter(module: nn.Module, args: tuple) -> None:
            sizes.append(args[0].shape[2:])

        def write_out(layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            context = args[1] if len(args) > 1 else kwargs["context"]
            weights = weights_of(layer, args[0], context)  # (b, heads, h w, m)
            maps.append(weights.mean(1).transpose(1, 2).unflatten(-1, sizes[-1]))
            return output_of(layer, weights, context)

        with ExitStack() as undo:
            for module in self.network.modules():
                if isinstance(module, SpatialTransformer):
                    undo.callback(module.register_forward_pre_hook(enter).remove)
            for layer in self.layers:
                undo.callback(layer.module.register_forward_hook(partial(write_out, layer), with_kwargs=True).remove)
            output = self.network(x=x, t=t, c_crossattn=c_crossattn, c_adm=c_adm)
        largest = maps[0].shape[2:]  # a UNet begins with its largest layer
        return output, torch.stack([_resized(one, largest) for one in maps]).mean(0)


def _resized(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, list(size), mode="bilinear", align_corners=False)
