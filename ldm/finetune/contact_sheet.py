"""A contact sheet: labelled rows of images, one image to look at after a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from ldm.checkpoint.file import atomic

MINIMUM = 64  # pixels of height; smaller images are enlarged by an integer factor
GAP, LINE = 4, 16  # pixels between images, and of a label's line


class Row(NamedTuple):
    """Images under a label."""

    label: str
    images: Sequence[Image.Image]


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Return all rows below each other, each under its label, on white."""
    shown = [Row(row.label, [_enlarged(image) for image in row.images]) for row in rows]
    width = max(sum(image.width + GAP for image in row.images) for row in shown) + GAP
    height = sum(LINE + GAP + max(image.height for image in row.images) for row in shown) + GAP
    sheet = Image.new("RGB", (max(width, 320), height), "white")
    top, pen = 0, ImageDraw.Draw(sheet)
    for row in shown:
        pen.text((GAP, top + 2), row.label, fill="black")
        left, top = GAP, top + LINE
        for image in row.images:
            sheet.paste(image, (left, top))
            left += image.width + GAP
        top += max(image.height for image in row.images) + GAP
    return sheet


def save_contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write the contact sheet as a PNG file, atomically."""
    with atomic(path) as temporary:
        contact_sheet(rows).save(temporary, format="PNG")


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, -(-MINIMUM // image.height))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
