"""Class numbers -> the conditioning dict, as in latent diffusion's class-conditional ImageNet model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """One learned vector of width `embed_dim` for each of `n_classes` classes; parameters `embedding.weight`.

    The last class is the one that says nothing (Ho & Salimans 2022): models trained for guidance were shown it in place
    of a fraction of the labels, as number 1000 of ImageNet's 1001.
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
        """Class numbers (b,) from 0 -> (b, 1, d). Raises ValueError for what is no number of a class.

        They may be texts, as a script's --prompt gives them; the empty text is the class that says nothing.
        """
        numbers = classes.tolist() if isinstance(classes, Tensor) else [self._number(one) for one in classes]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.n_classes:
                raise ValueError(f"class {number!r} does not exist: this model's are 0 to {self.n_classes - 1}")
        return self.embedding(torch.tensor(numbers, device=self.embedding.weight.device))[:, None]

    def _number(self, given: int | str) -> int | str:
        """The number that a text says; what says none stays as it is."""
        if given == "":
            return self.null
        return int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given
