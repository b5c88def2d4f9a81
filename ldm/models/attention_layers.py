"""The attention layers of a UNet, written out: their weights, which fused kernels do not show, and their output."""

from typing import Any, NamedTuple

from torch import Tensor

from ldm.models.attention import BasicTransformerBlock
from ldm.models.kernels import attention_weights


class Layer(NamedTuple):
    """A layer of attention."""

    name: str
    module: Any  # CrossAttention
    cross: bool  # to the conditioning, not to the image itself


def attention_layers(model: Any) -> list[Layer]:
    """Return the attention layers of a model's UNet; none if it has no cross-attention."""
    found = []
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            found += [Layer(f"{name}.attn1", module.attn1, module.disable_self_attn)]
            found += [Layer(f"{name}.attn2", module.attn2, True)]
    return found


def weights_of(layer: Layer, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a layer's attention weights (b, h, n, m) from x (b, n, d) to a context (b, m, d).

    mask: boolean (m,), True for the tokens that may be attended to.
    """
    q, k = _heads(layer, layer.module.to_q(x)), _heads(layer, layer.module.to_k(context))
    return attention_weights(q, k, mask=mask)


def output_of(layer: Layer, weights: Tensor, context: Tensor) -> Tensor:
    """Return the layer's output (b, n, d) for other weights (b, h, n, m) than its own."""
    out = weights @ _heads(layer, layer.module.to_v(context))  # (b, h, n, d / h)
    return layer.module.to_out(out.transpose(1, 2).flatten(2))


def _heads(layer: Layer, x: Tensor) -> Tensor:
    return x.unflatten(-1, (layer.module.heads, -1)).transpose(1, 2)  # (b, n, h d) -> (b, h, n, d)
