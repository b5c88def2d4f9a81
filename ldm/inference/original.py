"""The picture that is drawn over, and its mask: read, told from others, and brought to size. Imports no torch."""

import hashlib
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from ldm.data.image_files import open_image, over
from ldm.inference.recipe import Recipe


class Original:
    """A picture in mode "L", "RGB" or "RGBA", and the mask of what to draw anew, "L" and of its size, or None."""

    def __init__(self, image: Image.Image, mask: Image.Image | None = None) -> None:
        self.image, self.mask = image, mask

    @classmethod
    def read(cls, path: Path, mask_path: Path | None = None, invert: bool = False) -> "Original":
        """From files, upright. In the mask white is what is drawn anew (with `invert` black); transparent is kept.

        Raises FileNotFoundError, and ValueError naming the file for what is no picture or damaged, or a mask of another
        size.
        """
        image = open_image(path)
        if mask_path is None:
            return cls(image)
        mask = over(open_image(mask_path), "white" if invert else "black").convert("L")
        if mask.size != image.size:
            raise ValueError(
                f"the mask {mask_path} is {mask.width} x {mask.height} pixels and the picture {path} "
                f"{image.width} x {image.height}: they must have one size"
            )
        return cls(image, ImageOps.invert(mask) if invert else mask)

    @cached_property
    def init_hash(self) -> str:
        """Ten hexadecimal digits that tell the picture from others: by its pixels, not by how the file stores them."""
        return _hash(self.image)

    @cached_property
    def mask_hash(self) -> str:
        """The same of the mask; "" if there is none."""
        return "" if self.mask is None else _hash(self.mask)

    def size(self, own: tuple[int, int], width: int | None, height: int | None, resize: bool) -> tuple[int, int]:
        """(width, height) to draw at, in pixels.

        width, height: as asked; one of them brings the other along in the picture's proportions. resize: the shorter
        side becomes the shorter one of the model's `own` (width, height). With none of these it is the picture's own
        size; ValueError if that is too far from the model's for anything good to come out.
        """
        now_wide, now_high = self.image.size
        if resize and (width, height) != (None, None):
            raise ValueError("--resize says the size, and so do --W and --H: leave one of them out")
        if resize:
            width, height = (round(side * min(own) / min(self.image.size)) for side in self.image.size)
        elif width is None and height is None:
            if min(self.image.size) * 4 < min(own) or max(self.image.size) > 4 * max(own):
                raise ValueError(
                    f"the picture is {now_wide} x {now_high} pixels and the model draws at {own[0]} x {own[1]}: "
                    "--resize brings it to the model's size, --W and --H to one of your own"
                )
            width, height = self.image.size
        elif width is None:
            width = max(1, round(now_wide * height / now_high))
        elif height is None:
            height = max(1, round(now_high * width / now_wide))
        return width, height

    def at(self, width: int, height: int) -> "Original":
        """Scaled to fill that size, what is then too much on two sides cut off; as it is if it has the size."""
        if self.image.size == (width, height):
            return self
        pictures = [self.image] if self.mask is None else [self.image, self.mask]
        return Original(*(ImageOps.fit(one, (width, height), Image.Resampling.LANCZOS) for one in pictures))

    def give_profile(self, drawn: Image.Image) -> None:
        """Give the picture's colour profile to one drawn over it, so that equal pixels look equal."""
        profile = self.image.info.get("icc_profile")
        if profile is not None and drawn.mode == self.image.mode:
            drawn.info["icc_profile"] = profile


def check_original(recipe: Recipe, original: Original | None, path: Path) -> None:
    """ValueError unless `recipe`, which the PNG at `path` carries, is of a picture drawn over this original.

    Recipes of other programs name no hashes and are taken at their word.
    """
    script = "inpaint.py" if recipe.mask_hash else "img2img.py"
    if original is None and recipe.strength is not None:
        raise ValueError(f"{path} was drawn over another picture, which has to be given again: use scripts/{script}")
    if original is None:
        return
    if recipe.strength is None:
        raise ValueError(f"{path} was drawn from text alone: use scripts/txt2img.py")
    if recipe.init_hash == "":
        return
    if (recipe.mask_hash == "") != (original.mask is None):
        raise ValueError(f"{path} was drawn {'with' if recipe.mask_hash else 'without'} a mask: use scripts/{script}")
    if recipe.init_hash != original.init_hash:
        raise ValueError(
            f"{path} was drawn over a picture with hash {recipe.init_hash}, but the one given has "
            f"{original.init_hash}: give the same one again by --init-img"
        )
    if recipe.mask_hash != original.mask_hash:
        raise ValueError(
            f"{path} was drawn with a mask with hash {recipe.mask_hash}, but the one given has {original.mask_hash}: "
            "give the same one again by --mask, with --invert-mask if it was given then"
        )


def _hash(picture: Image.Image) -> str:
    head = f"{picture.mode} {picture.width} {picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()[:10]
