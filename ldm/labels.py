"""Rows of images with labels and captions."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ldm.images import enlarge

GAP, LINE = 4, 17  # pixels between labelled images, and of a line of text


class Row(NamedTuple):
    """A row of images, the label above it, and the caption of each image, of one or several lines."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


def labelled_rows(rows: Sequence[Row], side: int = 64, factor: int | None = None) -> Image.Image:
    """Paste rows of images on white, each under its label.

    factor: the images are enlarged by it. None: as is needed for a height of at least `side`.
    """
    font = ImageFont.load_default(13)
    lines = [[enlarge(image, factor or max(1, -(-side // image.height))) for image in row.images] for row in rows]
    lead = [LINE * (1 + max((caption.count("\n") + 1 for caption in row.captions), default=0)) for row in rows]
    heights = [max(image.height for image in images) + top + GAP for images, top in zip(lines, lead, strict=True)]
    spaced = str.maketrans({" ": "  "})  # the font's own spaces are 2 pixels wide
    labels = [row.label.translate(spaced) for row in rows]
    texts = [text.translate(spaced) for row in rows for caption in row.captions for text in caption.split("\n")]
    room = round(max(map(font.getlength, texts), default=0))  # of each caption
    widths: list[float] = [sum(max(room, image.width) + GAP for image in images) for images in lines]
    widths += [font.getlength(label) for label in labels]
    sheet = Image.new("RGB", (round(max(widths)) + 2 * GAP, sum(heights) + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for row, label, images, above, height in zip(rows, labels, lines, lead, heights, strict=True):
        pen.text((GAP, top), label, fill="black", font=font)
        left = GAP
        for i, image in enumerate(images):
            sheet.paste(image, (left, top + above))
            for line, text in enumerate(row.captions[i].split("\n") if row.captions else ()):
                pen.text((left, top + LINE * (1 + line)), text.translate(spaced), fill="dimgrey", font=font)
            left += max(room, image.width) + GAP
        top += height
    return sheet
