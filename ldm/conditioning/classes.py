"""Condition on classes: as a token for cross-attention (latent diffusion), or added to the timestep (ADM)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checks import Entries, Width, few, shorten


class ClassLabels(nn.Module):
    """Pass class numbers to networks that embed them, such as a UNetModel with `num_classes: n_classes`.

    Args:
        n_classes: number of classes, the null class included: 11 for ten digits.
        null: whether the last class is the null condition (Ho & Salimans 2022), which replaced a fraction of the labels
            in training.
        names: of all classes but the null class, in order, by which they may be given.
    """

    reads = "label"  # which part of a data set's sample it takes

    def __init__(self, n_classes: Entries, null: bool = True, names: Sequence[str] | None = None) -> None:
        super().__init__()
        if n_classes < 1 + null:
            beside = " besides the null class: count it too, or set null: false" if null else ""
            raise ValueError(f"n_classes {n_classes} leaves no class{beside}")
        self.n_classes = n_classes
        self.null = n_classes - 1 if null else None
        self.names = _checked(names, n_classes - null)

    def forward(self, classes: Sequence[int | str] | Tensor) -> dict[str, Tensor]:
        """Return {"c_adm": class numbers, int64 (b,)} on the CPU."""
        return {"c_adm": class_numbers(classes, self.n_classes, self.null, self.names)}


class ClassEmbedder(nn.Module):
    """Embed each of `n_classes` classes as a learned vector of width `embed_dim`.

    The last class is the null condition: number 1000 of ImageNet's 1001 in latent diffusion's model. `names` are of the
    others, in order, by which they may be given.
    """

    reads = "label"  # which part of a data set's sample it embeds

    def __init__(self, embed_dim: Width, n_classes: Entries = 1000, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.null = n_classes - 1
        self.names = _checked(names, n_classes - 1)
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, classes: Sequence[int | str] | Tensor) -> dict[str, Tensor]:
        """Return {"c_crossattn": encode(classes)}."""
        return {"c_crossattn": self.encode(classes)}

    def encode(self, classes: Sequence[int | str] | Tensor) -> Tensor:
        """Embed classes (b,) as (b, 1, d)."""
        numbers = class_numbers(classes, self.n_classes, self.null, self.names)
        return self.embedding(numbers.to(self.embedding.weight.device))[:, None]


def class_numbers(
    classes: Sequence[int | str] | Tensor, n_classes: int, null: int | None, names: Sequence[str] | None = None
) -> Tensor:
    """Convert class numbers from 0, as int or text, or names, to int64 (b,) on the CPU.

    Args:
        classes: the classes; the empty text is the null class, and a text is a name before it is a number.
        null: number of the null class, which may be -1; None if there is none.
        names: of the other classes, in order, if they have any.
    """
    named = {name: number for number, name in enumerate(names or ())}
    numbers = classes.tolist() if isinstance(classes, Tensor) else [_number(one, null, named) for one in classes]
    known = f"0 to {n_classes - 1}{': ' * bool(named)}{few(named, 50)}{', and the null class' * bool(named)}"
    for number in numbers:
        if number == "":
            raise ValueError(f"this model has no null class: name a class, {known}")
        if isinstance(number, bool) or not isinstance(number, int) or not (0 <= number < n_classes or number == null):
            raise ValueError(f"class {number!r} does not exist: this model's are {known}")
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _checked(names: Sequence[str] | None, count: int) -> list[str] | None:
    """Return the names of `count` classes. ValueError for another number of them, or two that are the same."""
    if names is not None and not len(set(names)) == len(names) == count:
        raise ValueError(
            f"{count} classes besides the null class need as many different names, not {shorten(repr(names))}"
        )
    return None if names is None else list(names)


def _number(given: int | str, null: int | None, named: Mapping[str, int]) -> int | str:
    """Convert a text, or an integer of numpy's, to the number that it is; anything else stays as it is."""
    if isinstance(given, np.integer):
        return int(given)
    if isinstance(given, str) and given in named:
        return named[given]
    if given == "" and null is not None:
        return null
    return int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given
