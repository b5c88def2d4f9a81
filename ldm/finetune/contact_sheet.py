"""A contact sheet: labelled rows of images, one image to look at after a run."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.checkpoint.atomic import atomic
from ldm.labels import Row, labelled_rows


def save_contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write rows of images, each under its label, as a PNG file, atomically."""
    with atomic(path) as temporary:
        labelled_rows([Row(*row) for row in rows]).save(temporary, format="PNG")
