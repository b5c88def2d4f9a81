"""A contact sheet: labelled rows of images, one image to look at after a run."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ldm.checkpoint.atomic import atomic

MINIMUM = 64  # pixels of height; smaller images are enlarged by an integer factor
GAP, LINE = 4, 16  # pixels between images, and of a label's line


def save_contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write rows of images, each under its label, on white, as a PNG file, atomically."""
    lines = [[_enlarged(image) for image in images] for _, images in rows]
    heights = [max(image.height for image in images) for images in lines]
    width = max(sum(image.width + GAP for image in images) for images in lines) + GAP
    sheet = Image.new("RGB", (max(width, 320), sum(heights) + len(rows) * (LINE + GAP) + GAP), "white")
    top, pen = 0, ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)  # at the default 10 pixels the spaces between words disappear
    for (label, _), images, height in zip(rows, lines, heights, strict=True):
        pen.text((GAP, top), label, fill="black", font=font)
        left, top = GAP, top + LINE
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + GAP
        top += height + GAP
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _enlarged(image: Image.Image) -> Image.Image:
    return ImageOps.scale(image, max(1, -(-MINIMUM // image.height)), Image.Resampling.NEAREST)
