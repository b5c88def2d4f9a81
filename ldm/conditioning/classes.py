"""Class numbers -> the conditioning dict: as a token of its own (latent diffusion), or added to the time (ADM)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassLabels(nn.Module):
    """Class numbers as they are, for networks that embed them, such as a UNetModel with `num_classes: n_classes`.

    The last class is the one that says nothing (Ho & Salimans 2022): what models trained for guidance were shown in
    place of a fraction of the labels. Ten digits and it make 11 `n_classes`. With `null` false there is none such.
    Raises ValueError where no class is left that says something.
    """

    def __init__(self, n_classes: int, null: bool = True) -> None:
        super().__init__()
        if n_classes < 1 + null:
            beside = " beside the one that says nothing: count it, too, or set null: false" if null else ""
            raise ValueError(f"n_classes {n_classes} leaves no class{beside}")
        self.n_classes = n_classes
        self.null = n_classes - 1 if null else None

    def forward(self, classes: Sequence[int | str] | Tensor) -> dict[str, Tensor]:
        """{"c_adm": class numbers, int64 (b,)} on the CPU. Errors as `class_numbers`."""
        return {"c_adm": class_numbers(classes, self.n_classes, self.null)}


class ClassEmbedder(nn.Module):
    """One learned vector of width `embed_dim` for each of `n_classes` classes; parameters `embedding.weight`.

    The last class is the one that says nothing, number 1000 of ImageNet's 1001 in latent diffusion's model.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.null = n_classes - 1
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, classes: Sequence[int | str] | Tensor) -> dict[str, Tensor]:
        """{"c_crossattn": encode(classes)}."""
        return {"c_crossattn": self.encode(classes)}

    def encode(self, classes: Sequence[int | str] | Tensor) -> Tensor:
        """Class numbers (b,) -> (b, 1, d). Errors as `class_numbers`."""
        return self.embedding(class_numbers(classes, self.n_classes, self.null).to(self.embedding.weight.device))[
            :, None
        ]


def class_numbers(classes: Sequence[int | str] | Tensor, n_classes: int, null: int | None) -> Tensor:
    """Numbers from 0, or texts that say such, as a script's --prompt gives them -> int64 (b,) on the CPU.

    The empty text is the class that says nothing, `null`, if there is one: one of them, or -1.
    Raises ValueError for what is no number of a class.
    """
    numbers = classes.tolist() if isinstance(classes, Tensor) else [_number(one, null) for one in classes]
    for number in numbers:
        if number == "":
            raise ValueError(f"no class is said, and this model has none for that: say which, 0 to {n_classes - 1}")
        if isinstance(number, bool) or not isinstance(number, int) or not (0 <= number < n_classes or number == null):
            raise ValueError(f"class {number!r} does not exist: this model's are 0 to {n_classes - 1}")
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _number(given: int | str, null: int | None) -> int | str:
    """The number that a text says; what says none stays as it is."""
    if given == "" and null is not None:
        return null
    return int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given
