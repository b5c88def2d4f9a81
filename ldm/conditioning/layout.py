"""Condition on a layout: objects in boxes, as tokens of a transformer (after Rombach et al. 2022, section 4.3.2)."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checks import Count, Width, few, shorten
from ldm.models.transformer import FIRST_NORM, Encoder, pool

EXAMPLE = '[{"class": NAME, "box": [LEFT, TOP, RIGHT, BOTTOM]}, ...], boxes in pixels'
ROW = 5  # numbers of an object: the edges of its box, and its class
OCTAVES = 4  # of the sines and cosines of an edge, from half a period across the image


class LayoutEncoder(nn.Module):
    """Encode layouts for cross-attention.

    An object is one token: the embedding of its class, plus a linear layer of its box's edges as sines and cosines (as
    GLIGEN, Li et al. 2023, arXiv:2301.07093). Latent diffusion's own model has three tokens, a class and two of 90 x 90
    corners, and has to learn which of them belong together. Absent objects are a class of their own.

    Args:
        names: of the classes of objects, in the order of their numbers.
        size: the side of the images in pixels, in which boxes are given.
        width: features d per token.
        layers: of the transformer.
        objects: maximum number in a layout.
        pooled: also return the `pool` of the present objects' vectors (b, d), as "c_adm".
    """

    null = ""  # the layout without objects
    reads = "boxes"  # which part of a data set's sample it encodes

    def __init__(
        self, names: Sequence[str], size: Width, width: Width, layers: Count, objects: Width = 3, pooled: bool = False
    ) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a layout needs different names of classes, not {few(names)}")
        self.names, self.size, self.objects, self.pooled = list(names), size, objects, pooled
        self.class_emb = nn.Embedding(len(names) + 1, width)  # the last one is the absent object
        self.box_emb = nn.Linear(4 * 2 * OCTAVES, width)
        nn.init.normal_(self.box_emb.weight, std=(4 * OCTAVES) ** -0.5)  # a box begins with as much weight as a class
        self.transformer = Encoder(width, layers)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, FIRST_NORM)

    def forward(self, layouts: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        """Return the layouts' vectors (b, objects, d) as "c_crossattn" and, if pooled, "c_adm".

        A layout is a list of {"class": name, "box": (left, top, right, bottom)}, the JSON text of one, "" for none, or
        a tensor (n, 5) of left, top, right, bottom and class number, whose rows of -1 stand for no object.
        """
        weight = self.box_emb.weight
        rows = torch.stack([self.rows(layout) for layout in layouts]).to(weight.device)  # (b, objects, 5)
        classes = rows[..., 4].long()  # rows are not in the weights' dtype: bfloat16 has no 257
        angles = math.pi / self.size * 2.0 ** torch.arange(OCTAVES, device=rows.device) * rows[..., :4, None]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2).to(weight)  # (b, objects, 4 * 2 * octaves)
        vectors = self.norm(self.transformer(self.class_emb(classes) + self.box_emb(waves)))
        return {"c_crossattn": vectors} | ({"c_adm": pool(vectors, classes < len(self.names))} if self.pooled else {})

    def rows(self, layout: Any) -> Tensor:
        """Return a layout as a tensor (objects, 5). ValueError for what is not a layout of this model."""
        rows = self._rows_of_tensor(layout) if isinstance(layout, Tensor) else self._rows(layout)
        if len(rows) > self.objects:
            raise ValueError(f"the layout has {len(rows)} objects, and this model's maximum is {self.objects}")
        return torch.tensor(rows + [[0.0] * 4 + [len(self.names)]] * (self.objects - len(rows)))

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
        if layout.ndim != 2 or layout.shape[1] != ROW:
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
