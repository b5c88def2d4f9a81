"""The init image of a script and its mask: read, identified by their hashes, and resized. Imports no torch."""

import argparse
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ldm.data.image_files import open_image, over
from ldm.settings import check_size

if TYPE_CHECKING:  # one imports torch
    from ldm.inference.recipe import Recipe
    from ldm.latent_diffusion import LatentDiffusion


class InitImage:
    """An image in mode "L", "RGB" or "RGBA", and the mask ("L", of its size) of what to generate anew, or None."""

    conditions = False  # whether the model is conditioned on it, and it takes the place of a prompt

    def __init__(self, image: Image.Image, mask: Image.Image | None = None) -> None:
        self.image, self.mask = image, mask

    @classmethod
    def read(cls, path: Path, mask_path: Path | None = None, invert: bool = False) -> "InitImage":
        """Read both from files, upright. White in the mask is generated anew (black with `invert`)."""
        image = open_image(path)
        if mask_path is None:
            return cls(image)
        mask = over(open_image(mask_path), "white" if invert else "black").convert("L")
        if mask.size != image.size:
            raise ValueError(
                f"the mask {mask_path} is {mask.width} x {mask.height} pixels and the image {path} "
                f"{image.width} x {image.height}: they must have one size"
            )
        return cls(image, ImageOps.invert(mask) if invert else mask)

    @cached_property
    def init_hash(self) -> str:
        """Return ten hexadecimal digits of the image's pixels, however a file stores them."""
        return _hash(self.image)

    @cached_property
    def mask_hash(self) -> str:
        """Return the hash of the mask; "" if there is none."""
        return "" if self.mask is None else _hash(self.mask)

    def size(self, own: tuple[int, int], width: int | None, height: int | None, resize: bool) -> tuple[int, int]:
        """Return the (width, height) to generate at, in pixels.

        Args:
            own: the model's (width, height).
            width, height: as asked for; if one is None, it follows from the other in the image's proportions.
            resize: bring the shorter side to the shorter one of the model's.

        With none of these it is the image's own size; ValueError if that is too far from the model's.
        """
        own_width, own_height = self.image.size
        if resize and (width, height) != (None, None):
            raise ValueError("--resize sets the size, and so do --W and --H: leave one of them out")
        if resize:
            width, height = (round(side * min(own) / min(self.image.size)) for side in self.image.size)
        elif height is not None:
            width = max(1, round(own_width * height / own_height)) if width is None else width
        elif width is not None:
            height = max(1, round(own_height * width / own_width))
        else:
            if min(self.image.size) * 4 < min(own) or max(self.image.size) > 4 * max(own):
                raise ValueError(
                    f"the image is {own_width} x {own_height} pixels and the model's size is {own[0]} x {own[1]}: "
                    "--resize brings it to the model's size, --W and --H to one of your own"
                )
            width, height = self.image.size
        check_size(width, height, *own)
        return width, height

    def settings(
        self, args: argparse.Namespace, model: "LatentDiffusion", made: "Recipe | None" = None
    ) -> dict[str, Any]:
        """Return the settings of what is generated from it by a script's options.

        made: the recipe of an image that is made again, whose size and strength are kept if the options give none.
        """
        strength, size = args.strength, (args.width, args.height)
        if made is None and strength is None:
            strength = model.default_strength(self.mask is not None)
        if made is None or args.resize or size != (None, None):
            size = self.size((model.defaults["width"], model.defaults["height"]), *size, args.resize)
        hashes = {"init_hash": self.init_hash, "mask_hash": self.mask_hash}
        return {"strength": strength, "width": size[0], "height": size[1], **hashes}

    def resized(self, width: int, height: int) -> "InitImage":
        """Scale it to fill that size, and cut off two sides evenly; return it as it is if it has the size."""
        if self.image.size == (width, height):
            return self
        images = [self.image] if self.mask is None else [self.image, self.mask]
        return InitImage(*(ImageOps.fit(one, (width, height), Image.Resampling.LANCZOS) for one in images))

    def prompts(self, model: "LatentDiffusion", texts: Sequence[Any]) -> Any:
        """Return what is generated from, beside the image: the texts."""
        return texts

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate` that it is."""
        return {"image": self.image, "mask": self.mask}


def _hash(image: Image.Image) -> str:
    head = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:10]
