"""PNG files that carry a text: written whole or not at all, and read back."""

import os
from pathlib import Path

from PIL import Image, PngImagePlugin

CHUNK = "parameters"  # the text chunk that AUTOMATIC1111's web UI writes and that its users' tools read


def save_png(image: Image.Image, path: Path, text: str) -> None:
    """Write the image with the text in its chunk `parameters`.

    It is written under a temporary name and renamed, so that an interruption or a full disk leaves no half image.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_png_text(path: Path) -> str:
    """The text in the chunk `parameters`. ValueError for no PNG or one without; OSError if it cannot be read."""
    with open(path, "rb") as file:
        try:
            text = Image.open(file, formats=["PNG"]).info.get(CHUNK)
        except (OSError, SyntaxError, ValueError, EOFError):  # what Pillow raises for files that are no whole PNG
            raise ValueError(f"{path} is not a PNG image, or is damaged") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no text chunk {CHUNK!r}, so nothing says how it was made")
    return str(text)
