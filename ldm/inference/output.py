"""The output folder of a run: samples/00000.png, grid-0000.png, strip-0000.png, numbered on from what is there."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.inference.png import save_png


class OutputFolder:
    """A folder that images are saved in; made, and tried for writing, before any work is done.

    Raises OSError with the folder and the reason if nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next: dict[str, int] = {}  # prefix -> next number
        for folder in (path, path / "samples"):
            make_writable(folder)

    def save_sample(self, image: Image.Image, text: str) -> Path:
        """samples/00000.png and on; returns the path."""
        return self._save(image, text, self.path / "samples", "", 5)

    def save_grid(self, images: Sequence[Image.Image], columns: int, text: str) -> Path:
        """grid-0000.png and on, carrying the text of its first image and its own size; returns the path."""
        from ldm.images import image_grid  # here, because it imports torch

        columns = min(columns, len(images))
        rows = -(-len(images) // columns)
        return self._save(image_grid(images, columns), f"{text}, Grid: {columns}x{rows}", self.path, "grid-", 4)

    def save_strip(self, image: Image.Image, text: str) -> Path:
        """strip-0000.png and on, carrying the text of the image it ends in; returns the path."""
        return self._save(image, text, self.path, "strip-", 4)

    def _save(self, image: Image.Image, text: str, folder: Path, prefix: str, digits: int) -> Path:
        """Save under the next free number: one more than the highest there, so that a gap is never filled."""
        number = self.next[prefix] if prefix in self.next else next_number(folder, prefix)
        while (path := folder / f"{prefix}{number:0{digits}}.png").exists():  # another run may write here too
            number += 1
        save_png(image, path, text)
        self.next[prefix] = number + 1
        return path


def make_writable(folder: Path) -> None:
    """Make the folder, and try to write there. OSError with the folder and the reason if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into the output folder {folder}: {error.strerror}") from None


def next_number(folder: Path, prefix: str) -> int:
    """One more than the highest number among the folder's `PREFIXnnn.png`, 0 if there is none."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.png")
    matches = (pattern.fullmatch(entry.name) for entry in folder.iterdir())
    return max((int(match[1]) for match in matches if match), default=-1) + 1
