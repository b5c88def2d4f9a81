"""Embedded colour profiles, by littlecms (PIL.ImageCms): what numbers a network sees must not depend on the camera."""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by ICC.1's signature of a profile's colour space


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image in mode L, RGB, RGBA or CMYK from its embedded profile, if any, to sRGB, without one.

    A profile that is damaged or of another colour space is ignored, and info["ignored"] says so.
    """
    profile = image.info.pop("icc_profile", None)
    if not profile:
        return image
    try:
        mode, transform = _transform(profile)
        if mode != image.mode.removesuffix("A") and (mode, image.mode) != ("RGB", "L"):
            raise ValueError(f"it is of mode {mode}, and the image of {image.mode}")
    except (OSError, ValueError, TypeError, ImportError) as error:  # the last without littlecms
        image.info["ignored"] = f"its colour profile ({error})"
        return image
    if transform is None:
        return image
    colours = image if image.mode == mode else image.convert(mode)
    result = transform.apply(colours)
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A"))
    result.info = image.info
    return result.convert("L") if image.mode == "L" else result


@lru_cache(64)
def _transform(profile: bytes) -> tuple[str, Any]:
    """Return the mode of a profile's images, and littlecms's transform of them to sRGB; None for sRGB itself.

    A profile is sRGB's if no colour changes by more than 1/255: then not even rounding does.
    """
    from PIL import ImageCms  # here, because it takes time and most images have no profile

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(opened.profile.xcolor_space)
        if mode is None:
            raise ValueError(f"its colour space {opened.profile.xcolor_space.strip()} is not one of images")
        flags = ImageCms.Flags
        exact = flags.NOOPTIMIZE if mode == "L" else flags.NONE  # or a linear curve is 9/255 off in the shadows
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL, exact)
    except ImageCms.PyCMSError as error:
        raise ValueError(str(error)) from error
    levels = np.linspace(0, 255, 16).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
    if mode == "RGB":
        change = np.asarray(transform.apply(Image.fromarray(colours))) - colours.astype(int)
        transform = None if np.abs(change).max() <= 1 else transform
    return mode, transform
