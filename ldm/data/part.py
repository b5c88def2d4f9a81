"""Some samples of a data set, as a data set that is otherwise as it was."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset


class Part(Subset):
    """Samples of a data set by their indices, and otherwise what the data set has besides."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        super().__init__(dataset, indices)
        groups = getattr(dataset, "groups", None)
        self.groups = None if groups is None else [groups[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.dataset, name)
        if name in ("caption_of", "without_image", "content"):
            return lambda index: found(self.indices[index])
        if name == "shuffled":
            own = {index: i for i, index in enumerate(self.indices)}
            return lambda generator: (own[index] for index in found(generator) if index in own)
        return found

    def __reduce__(self) -> tuple:
        return part, (self.dataset, self.indices)


def part(dataset: Any, indices: Sequence[int]) -> Part:
    """Return a `Part`, whose class has the name of the data set's for messages."""
    return type(type(dataset).__name__, (Part,), {})(dataset, indices)


def first_images(dataset: Any, count: int) -> Part:
    """Return the first images of a data set."""
    return part(dataset, range(min(count, len(dataset))))
