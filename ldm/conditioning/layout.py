"""Condition on a layout: objects in boxes, as tokens of a transformer (Rombach et al. 2022, section 4.3.2)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checks import Count, Width, few, shorten
from ldm.models.transformer import Encoder, TransformerWrapper

EXAMPLE = '[{"class": NAME, "box": [LEFT, TOP, RIGHT, BOTTOM]}, ...], boxes in pixels'
PER_OBJECT = 5  # tokens: the class, and the edges of the box


class LayoutEncoder(nn.Module):
    """Encode layouts for cross-attention; parameters `transformer.*`.

    An object is five tokens, its class and the four edges of its box. (Latent diffusion's own model has three: the
    class and two corners, each one of 90 x 90 places. Edges are few, and alike in all places, so that a few thousand
    images teach them.) The places of absent objects are filled with a token of their own.

    Args:
        names: of the classes of objects, in the order of their numbers.
        size: the side of the images in pixels, in which boxes are given.
        width: features d per token.
        layers: of the transformer.
        objects: maximum number in a layout.
        places: how many different edges there are from 0 to `size`.
    """

    null = ""  # the layout without objects
    reads = "boxes"  # which part of a data set's sample it encodes

    def __init__(
        self, names: Sequence[str], size: Width, width: Width, layers: Count, objects: Width = 3, places: Width = 65
    ) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names) or places < 2:
            raise ValueError(
                f"a layout needs at least 2 places ({places}) and different names of classes ({few(names)})"
            )
        self.names, self.size, self.objects, self.places = list(names), size, objects, places
        vocabulary = places + len(self.names) + 1  # edges, classes, the absent object
        self.transformer = TransformerWrapper(vocabulary, PER_OBJECT * objects, Encoder(width, layers))
        self.transformer.to_logits.requires_grad_(False)  # not used: several processes expect gradients of all others

    def forward(self, layouts: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        """Return {"c_crossattn": encode(layouts)}."""
        return {"c_crossattn": self.encode(layouts)}

    def encode(self, layouts: Sequence[Any] | Tensor) -> Tensor:
        """Encode layouts as (b, 5 objects, d).

        A layout is a list of {"class": name, "box": (left, top, right, bottom)}, the JSON text of one, "" for none, or
        a tensor (n, 5) of left, top, right, bottom and class number, whose rows of -1 stand for no object.
        """
        tokens = torch.stack([self.tokens(layout) for layout in layouts])
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def tokens(self, layout: Any) -> Tensor:
        """Return the tokens of a layout, int64 (5 objects,). ValueError for what is not a layout of this model."""
        rows = self._rows_of_tensor(layout) if isinstance(layout, Tensor) else self._rows(layout)
        if len(rows) > self.objects:
            raise ValueError(f"the layout has {len(rows)} objects, and this model's maximum is {self.objects}")
        tokens = torch.full((self.objects, PER_OBJECT), self.places + len(self.names))
        for i, (*box, number) in enumerate(rows):
            edges = [round(edge / self.size * (self.places - 1)) for edge in box]
            tokens[i] = torch.tensor([self.places + int(number), *edges])
        return tokens.flatten()

    def _rows(self, layout: Any) -> list[list[float]]:
        if isinstance(layout, str):
            try:
                layout = json.loads(layout) if layout else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{shorten(repr(layout))} is not a layout ({error}): write {EXAMPLE}") from None
        if not isinstance(layout, Sequence) or not all(isinstance(one, Mapping) for one in layout):
            raise ValueError(f"{shorten(repr(layout))} is not a layout: write {EXAMPLE}")
        return [self._row(one) for one in layout]

    def _row(self, one: Mapping[str, Any]) -> list[float]:
        if one.keys() != {"class", "box"}:
            raise ValueError(f"an object has class and box, not {few(one)}: write {EXAMPLE}")
        if (name := one["class"]) not in self.names:
            raise ValueError(f"class {shorten(repr(name))} does not exist: this model's are {few(self.names, 50)}")
        return [*self._checked(one["box"]), self.names.index(name)]

    def _rows_of_tensor(self, layout: Tensor) -> list[list[float]]:
        if layout.ndim != 2 or layout.shape[1] != PER_OBJECT:
            raise ValueError(f"{tuple(layout.shape)} is not a layout, rows of left, top, right, bottom and class")
        rows = [row for row in layout.tolist() if row[-1] != -1]
        for *box, number in rows:
            if number not in range(len(self.names)):
                raise ValueError(f"class {number} does not exist: this model's are 0 to {len(self.names) - 1}")
            self._checked(box)
        return rows

    def _checked(self, box: Any) -> Sequence[float]:
        """Return the box. ValueError for what is none in an image of this model."""
        numbers = isinstance(box, Sequence) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
        if not (numbers and 0 <= box[0] < box[2] <= self.size and 0 <= box[1] < box[3] <= self.size):
            raise ValueError(
                f"box {shorten(repr(box))} is not left, top, right and bottom in pixels, from 0 to {self.size}"
            )
        return box
