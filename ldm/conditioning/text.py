"""Encode prompts with CLIP: its hidden states for cross-attention and, on request, its pooled text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.batching import distinct_prompts
from ldm.checks import Count, Entries, Width
from ldm.conditioning.tokenizer import Tokenizer
from ldm.models.clip import OpenCLIPTextModel, TextTower
from ldm.util import call_with

CONTEXT_LAYERS = ("last", "penultimate", "hidden")


class TextEncoder(nn.Module):
    """Tokenizer and CLIP text tower.

    Args:
        layout: "transformers": parameters `transformer.text_model.*`, as in Stable Diffusion 1's files; "openclip":
            `model.*`, as in Stable Diffusion 2's.
        width, layers, heads, vocab_size, context_length, projection_dim, activation, mlp_width: as in
            `ldm.models.clip.TextTower`.
        layer: which hidden state becomes the context. "last": after the last block and the final norm (Stable Diffusion
            1); "penultimate": before the last block, then the final norm (Stable Diffusion 2); "hidden": number
            `layer_index` of 0 (embedding) .. layers (last block), negative from the end, without the norm.
        pooled: also return the pooled, projected text (b, p) as "c_adm".
        tokenizer: arguments of `Tokenizer` besides context_length; its cleaning defaults to the layout's library.
    """

    null = ""  # the null condition
    reads = "caption"  # which part of a data set's sample it encodes

    def __init__(
        self,
        layout: str,
        width: Width,
        layers: Count,
        heads: Count,
        activation: str,
        vocab_size: Entries = 49408,
        context_length: Width = 77,
        projection_dim: Width | None = None,
        layer: str = "last",
        layer_index: int | None = None,
        pooled: bool = False,
        tokenizer: Mapping[str, Any] | None = None,
        mlp_width: int | None = None,
    ):
        super().__init__()
        sizes = (vocab_size, width, layers, heads, context_length, activation, projection_dim, mlp_width)
        if layout not in ("transformers", "openclip"):
            raise ValueError(f"text layout {layout!r} is unknown; it is transformers or openclip")
        if layout == "transformers":
            from ldm.models.clip_transformers import CLIPTextModel  # the digits have the other layout

            self.transformer = CLIPTextModel(*sizes)
        else:
            self.model = OpenCLIPTextModel(*sizes)
        self.layout = layout
        self.layer = layer
        self.state = _state_number(layer, layer_index, layers)
        self.layers = layers
        self.pooled = pooled
        cleaning = "clip" if layout == "transformers" else "openclip"
        own: dict[str, Any] = {"context_length": context_length, "cleaning": cleaning, **(tokenizer or {})}
        self.tokenizer = call_with("tokenizer", Tokenizer, own)
        if (self.tokenizer.vocab_size, self.tokenizer.context_length) != (vocab_size, context_length):
            raise ValueError(
                f"the text tower has {vocab_size} tokens and context {context_length}, its tokenizer "
                f"{self.tokenizer.vocab_size} and {self.tokenizer.context_length}; they must be equal"
            )

    @property
    def tower(self) -> TextTower:
        return self.transformer if self.layout == "transformers" else self.model

    def forward(self, prompts: Sequence[str] | Tensor, clip_skip: int = 1) -> dict[str, Tensor]:
        """Encode prompts; each distinct prompt of a list is encoded once.

        Prompts are read literally and cut at the context length, as in CompVis's code; `ldm.conditioning.prompt` reads
        weights and long prompts.

        Args:
            prompts: texts, or their tokens int64 (b, n), of torch or numpy.
            clip_skip: 1 takes the context from the encoder's own layer, 2 from one block before it, and so on, with the
                same final norm or none. This is A1111's "Clip skip" for Stable Diffusion 1 (A1111 ignores it for Stable
                Diffusion 2) and diffusers' clip_skip plus 1 for both.

        Returns:
            {"c_crossattn": (b, n, d)} and, if pooled, "c_adm": (b, p), always of the last layer.
        """
        device = next(self.parameters()).device
        if isinstance(prompts, Tensor | np.ndarray):
            return self._encode(torch.as_tensor(prompts, device=device), clip_skip)
        if isinstance(prompts, str):
            raise ValueError(f"the text encoder takes a list of prompts, not one string ({prompts[:40]!r})")
        distinct, which = distinct_prompts(prompts)
        cond = self._encode(self.tokenizer(distinct).to(device), clip_skip)
        return {key: value[which] for key, value in cond.items()}

    def _encode(self, tokens: Tensor, clip_skip: int) -> dict[str, Tensor]:
        if not 1 <= clip_skip <= max(self.state, 1):
            raise ValueError(
                f"clip_skip {clip_skip} does not exist: this text encoder has {self.state} blocks up to its own layer, "
                f"so it is 1 (that layer) to {max(self.state, 1)}"
            )
        number = self.state - (clip_skip - 1)
        states = self.tower.hidden_states(tokens, self.layers if self.pooled else number)
        context = states[number]
        cond = {"c_crossattn": context if self.layer == "hidden" else self.tower.final_norm(context)}  # (b, n, d)
        if self.pooled:
            cond["c_adm"] = self.tower.pool(self.tower.final_norm(states[-1]), tokens, self.tokenizer.eos)  # (b, p)
        return cond


def _state_number(layer: str, layer_index: int | None, layers: int) -> int:
    """Return which of the layers + 1 hidden states is the context, counted from 0."""
    if layer not in CONTEXT_LAYERS:
        raise ValueError(f"text layer {layer!r} is unknown; it is one of {', '.join(CONTEXT_LAYERS)}")
    if layer != "hidden":
        if layer_index is not None:
            raise ValueError(f"layer_index {layer_index} is only for layer 'hidden', not {layer!r}")
        return layers if layer == "last" else layers - 1
    if layer_index is None or not -layers - 1 <= layer_index <= layers:
        raise ValueError(f"layer_index {layer_index} must be one of {-layers - 1} .. {layers}")
    return layer_index % (layers + 1)
