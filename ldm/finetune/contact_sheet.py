"""A contact sheet: labelled rows of pictures, one picture to look at after a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from ldm.checkpoint.file import atomic

LEAST = 64  # pixels: smaller pictures are magnified by whole numbers
GAP, LINE = 4, 16  # pixels between pictures, and of a label's line


class Row(NamedTuple):
    """Pictures under a label."""

    label: str
    pictures: Sequence[Image.Image]


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """All rows below each other, each under its label, on white."""
    shown = [Row(row.label, [_magnified(picture) for picture in row.pictures]) for row in rows]
    width = max(sum(picture.width + GAP for picture in row.pictures) for row in shown) + GAP
    height = sum(LINE + GAP + max(picture.height for picture in row.pictures) for row in shown) + GAP
    sheet = Image.new("RGB", (max(width, 320), height), "white")
    top, pen = 0, ImageDraw.Draw(sheet)
    for row in shown:
        pen.text((GAP, top + 2), row.label, fill="black")
        left, top = GAP, top + LINE
        for picture in row.pictures:
            sheet.paste(picture, (left, top))
            left += picture.width + GAP
        top += max(picture.height for picture in row.pictures) + GAP
    return sheet


def save_contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write it as a PNG file, whole or not at all."""
    with atomic(path) as temporary:
        contact_sheet(rows).save(temporary, format="PNG")


def _magnified(picture: Image.Image) -> Image.Image:
    factor = max(1, -(-LEAST // picture.height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
