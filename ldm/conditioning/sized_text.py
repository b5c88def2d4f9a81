"""Encode prompts with several text towers, and facts about an image (Podell et al. 2023, arXiv:2307.01952)."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.xl import BASE_SIZES
from ldm.checks import Width
from ldm.conditioning.sizes import Sizes
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer
from ldm.models.blocks import timestep_embedding
from ldm.util import call_with


class SizedTextEncoder(nn.Module):
    """CLIP text towers, whose hidden states stand side by side, and sinusoids of numbers: Stable Diffusion XL.

    Args:
        embedders: the arguments of a `TextEncoder` for each tower. They share one vocabulary; the last is `pooled`.
        sizes: which fields of `Sizes` the UNet takes.
        size_width: features of each of their numbers.
        zeros_for_empty: the empty negative prompt is zeros, and not what the towers make of it; diffusers calls it
            force_zeros_for_empty_prompt.
    """

    null = ""  # the null condition
    reads = "caption"  # which part of a data set's sample it encodes

    def __init__(
        self,
        embedders: Sequence[Mapping[str, Any]],
        sizes: Sequence[str] = BASE_SIZES,
        size_width: Width = 256,
        zeros_for_empty: bool = True,
    ) -> None:
        super().__init__()
        if unknown := [name for name in sizes if name not in Sizes._fields]:
            raise ValueError(f"sizes {unknown} is unknown: choose among {', '.join(Sizes._fields)}")
        towers: list[Any] = [call_with("text encoder", TextEncoder, params) for params in embedders]
        if not towers or not towers[-1].pooled:
            raise ValueError(f"of {len(towers)} text towers the last must be pooled: the sizes join its pooled text")
        if len({(tower.tokenizer.merges, tower.tokenizer.context_length) for tower in towers}) > 1:
            raise ValueError("the text towers have different vocabularies or context lengths; they must be equal")
        self.embedders = nn.ModuleList(towers)
        self.sizes, self.size_width, self.zeros_for_empty = tuple(sizes), size_width, zeros_for_empty

    @property
    def tokenizer(self) -> Tokenizer:
        """The first tower's, which reads prompts for all of them, as in diffusers; they differ in padding alone."""
        first: Any = self.embedders[0]
        return first.tokenizer

    def forward(self, prompts: Any, clip_skip: int = 1) -> dict[str, Tensor]:
        """Encode prompts, read literally, or tokens int64 (b, n), of torch or numpy, padded by any of the tokenizers.

        Returns:
            {"c_crossattn": (b, n, sum of d), "c_adm": (b, p)}, to which `with_sizes` adds.
        """
        device, towers = next(self.parameters()).device, list[Any](self.embedders)
        tokens = self.tokenizer(prompts) if isinstance(prompts, list | tuple) else torch.as_tensor(prompts)
        tokens = tokens.to(device)
        fill = torch.tensor([self.tokenizer.eos, *(tower.tokenizer.pad for tower in towers)], device=device)
        last = torch.isin(tokens, fill).flip(-1).cumprod(dim=-1).flip(-1).bool()  # (b, n), the end and what fills up
        ends = last & (tokens == self.tokenizer.eos)
        padding = last & (ends.cumsum(dim=-1) - ends.long() > 0)  # behind the end: a prompt may name the token, too
        conds = [tower(tokens.masked_fill(padding, tower.tokenizer.pad), clip_skip) for tower in towers]
        return conds[-1] | {"c_crossattn": torch.cat([cond["c_crossattn"] for cond in conds], dim=-1)}

    def completed(
        self,
        cond: Mapping[str, Tensor],
        prompts: Sequence[str],
        sizes: Sizes | None,
        negative: bool,
        defaults: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the conditioning of prompts as the UNet takes it: see `LatentDiffusion.condition`.

        defaults: with the model's own height and width, which are the sizes where None are given.
        """
        own = defaults["height"], defaults["width"]
        cond = self.emptied(cond, prompts) if negative else cond
        return self.with_sizes(cond, Sizes(own, (0, 0), own) if sizes is None else sizes)

    def emptied(self, cond: Mapping[str, Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of negative prompts with zeros for the empty ones, unless this model encodes them."""
        empty = [i for i, prompt in enumerate(prompts) if self.zeros_for_empty and prompt == ""]
        rows = {key: torch.tensor(empty, dtype=torch.long, device=value.device) for key, value in cond.items()}
        return {key: value.index_fill(0, rows[key], 0) for key, value in cond.items()}

    def with_sizes(self, cond: Mapping[str, Tensor], sizes: Sizes | Tensor) -> dict[str, Tensor]:
        """Return the conditioning with these numbers behind the pooled text: "c_adm" (b, p + n size_width).

        sizes: of all images, or the numbers (b, n) of each.
        """
        pooled = cond["c_adm"]
        if not isinstance(sizes, Tensor):
            values = [getattr(sizes, name) for name in self.sizes]
            sizes = torch.tensor([[*chain(*(value if isinstance(value, tuple) else (value,) for value in values))]])
        features = timestep_embedding(sizes.flatten(), self.size_width).reshape(len(sizes), -1).to(pooled)
        return {**cond, "c_adm": torch.cat([pooled, features.expand(len(pooled), -1)], dim=-1)}
