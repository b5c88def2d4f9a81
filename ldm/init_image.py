"""Init images and masks: padded to sizes that the model supports, noised to start from, and the results pasted back."""

import warnings
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.data.image_files import over, upright
from ldm.diffusion.denoiser import BoundDenoise, Cond
from ldm.diffusion.further_guidance import inpaint
from ldm.images import to_uint8
from ldm.settings import Settings

Images = Image.Image | Sequence[Image.Image]


class InitImages:
    """Init images of `count` results, and the masks of what to change in them.

    Args:
        image: one image for all, or `count` of one size. The model sees them in grey or RGB as its `channels` say,
            turned as their EXIF data says, transparency over white.
        mask: white where the image is generated anew, black (or transparent) where it is kept, of the image's size;
            one for all or `count`; None changes all of the image. At least half white is generated; greys then blend
            the result with the image.
        multiple: the model's sizes are multiples of it. Other images are padded at the right and the bottom by
            repeating the edge, and the results are cut back.

    `images[i:j]` is that part of them. Raises ValueError for images or masks of other counts or sizes, and for images
    with a side shorter than `multiple`.
    """

    def __init__(self, image: Images, mask: Images | None, count: int, channels: int, multiple: int) -> None:
        images = _upright(image, count, "images")
        seen = "L" if channels == 1 else "RGB"
        # One image for all stays one, so that it is encoded once.
        self.seen = stack_images([over(one, "white").convert(seen) for one in images])  # (1 or count, channels, h, w)
        self.height, self.width = self.seen.shape[-2:]
        _check_size(self.height, self.width, multiple)
        self.multiple = multiple
        self.kept = self.levels = None
        if mask is not None:
            masks = _upright(mask, count, "masks")
            self.levels = stack_images([over(one, "black").convert("L") for one in masks])  # (1 or count, 1, h, w)
            if not (self.levels >= 128).any():
                warnings.warn(
                    "the mask is black (below 128) everywhere: nothing of the image is generated anew", stacklevel=4
                )
            height, width = self.levels.shape[-2:]
            if (height, width) != (self.height, self.width):
                raise ValueError(
                    f"the mask is {width} x {height} pixels and the image {self.width} x {self.height}: "
                    "they must have one size"
                )
            widest = max((one.mode for one in images), key=("L", "RGB", "RGBA").index)
            self.kept = stack_images([one.convert(seen if widest == "L" else widest) for one in images])

    def __getitem__(self, batch: slice) -> "InitImages":
        part = copy(self)
        for name in ("seen", "kept", "levels"):
            images = getattr(self, name)
            if images is not None and len(images) > 1:
                setattr(part, name, images[batch])
        return part

    @property
    def pixels(self) -> Tensor:
        """Return what the model sees: (1 or b, channels, h, w) in [-1, 1], padded."""
        return pad_image(self.seen.float() / 127.5 - 1, self.multiple)

    @property
    def mask(self) -> Tensor | None:
        """Return (1 or b, 1, h, w), padded: 1 where the image is generated anew, 0 elsewhere; or None."""
        return None if self.levels is None else pad_image((self.levels >= 128).float(), self.multiple)

    def finish(self, generated: Tensor) -> Tensor:
        """Bring generated pixels (b, channels, h, w) in [-1, 1] to the image's own size: uint8 (b, c, h, w).

        Under a mask they are blended with the image: what is black there is the image's to the byte. The result then
        has the image's colours and transparency too (c is 3 or 4), and what was generated is opaque.
        """
        new = to_uint8(generated)[..., : self.height, : self.width].cpu()
        if self.levels is None or self.kept is None:
            return new
        channels = self.kept.shape[1]
        if new.shape[1] < min(channels, 3):
            new = new.expand(-1, 3, -1, -1)  # grey in an image of colours
        if channels == 4:
            new = torch.cat([new, torch.full_like(new[:, :1], 255)], dim=1)
        return torch.lerp(self.kept.float(), new.float(), self.levels / 255).round().to(torch.uint8)


def pad_image(x: Tensor, multiple: int) -> Tensor:
    """Pad images (b, c, h, w) at the right and the bottom to sides that are multiples, by repeating the edge."""
    height, width = x.shape[-2:]
    _check_size(height, width, multiple)
    padding = 0, -width % multiple, 0, -height % multiple
    return F.pad(x, padding, mode="replicate") if any(padding) else x


def _check_size(height: int, width: int, multiple: int) -> None:
    if min(height, width) < multiple:
        minimum = f"its minimum is {multiple} x {multiple}"
        raise ValueError(f"the image is {width} x {height} pixels, too small for this model: {minimum}")


def _upright(images: Images, count: int, what: str) -> list[Image.Image]:
    """Return the images in mode "L", "RGB" or "RGBA". ValueError unless they are one or `count`, and of one size."""
    images = [images] if isinstance(images, Image.Image) or not isinstance(images, Sequence) else list(images)
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"{what} are PIL images, as PIL.Image.open reads them, got {type(image).__name__}")
    images = [upright(image) for image in images]
    sizes = sorted({image.size for image in images})
    if len(images) not in (1, count) or len(sizes) != 1:
        raise ValueError(f"{count} results need one or {count} {what} of one size, got {len(images)} of sizes {sizes}")
    return images


def stack_images(images: Sequence[Image.Image]) -> Tensor:
    """Stack PIL images of one size and mode: uint8 (b, c, h, w)."""
    arrays = np.stack([np.asarray(image) for image in images])  # (b, h, w) or (b, h, w, c)
    return torch.from_numpy(arrays if arrays.ndim == 4 else arrays[..., None]).permute(0, 3, 1, 2)  # (b, c, h, w)


def concat_condition(model: Any, images: Tensor, mask: Tensor | None) -> Cond:
    """Return {"c_concat": (b, channels, h/f, w/f)} of a model with `concat`, for an image to change.

    It is the latents (posterior mode) of the image without its masked pixels, and the mask at their size, nearest
    pixel.

    Args:
        images: (b, c, h, w) in [-1, 1].
        mask: (b, 1, h, w), 1 where the image is generated anew and 0 where it is kept; None generates all of it.
            InstructPix2Pix has no mask.
    """
    if model.concat == "latents":
        return {"c_concat": model.encode(images, mode=True) / model.scale_factor}  # as Brooks et al. 2023 trained it
    anew = torch.ones_like(images[:, :1], dtype=torch.bool) if mask is None else mask >= 0.5
    blank = 0.0 if model.concat == "mask_latents" else -1.0  # grey in Stable Diffusion, black before it
    latents = model.encode(torch.where(anew, blank, images), mode=True)
    anew = F.interpolate(anew.to(latents), size=latents.shape[-2:])  # (b, 1, h/f, w/f)
    return {"c_concat": torch.cat([anew, latents] if model.concat == "mask_latents" else [latents, 2 * anew - 1], 1)}


def prepare_images(model: Any, image: Images, mask: Images | None, count: int, chosen: Settings) -> InitImages:
    """Prepare the init images. ValueError where the settings ask for another size."""
    init = InitImages(image, mask, count, model.image_channels, model.multiple)
    for name, asked, own in (("height", chosen.height, init.height), ("width", chosen.width, init.width)):
        if asked not in (None, own):
            raise ValueError(f"{name} {asked} differs from the init image's {own}: resize the image first")
    return init


def concat_for(model: Any, init: InitImages | None, size: tuple[int, int, int], count: int) -> Cond:
    """Return c_concat for a model with `concat`: of the init image, or of none."""
    if init is not None:
        cond = concat_condition(model, init.pixels, init.mask)
    elif model.concat == "latents":
        return {"c_concat": torch.zeros(count, *size, device=model.device)}
    else:
        height, width = (model.downsampling * side for side in size[1:])
        cond = concat_condition(model, torch.zeros(1, model.image_channels, height, width), None)
    return {key: value.expand(count, -1, -1, -1) for key, value in cond.items()}


def start_from_image(
    model: Any, init: InitImages, x: Tensor, start: Tensor, sigma: float, strength: Any, denoise: BoundDenoise
) -> tuple[Tensor, BoundDenoise]:
    """Return (x, denoise) for an init image, where x is the image noised to the first noise level.

    With all steps to take, x stays pure noise where the image is generated anew under a mask, and everywhere where the
    model has what is kept in its input.
    """
    known, mask = model.encode(init.pixels, mode=True).float(), init.mask
    noised = known + sigma * start
    if mask is not None and model.concat in (None, "latents"):  # the others have the mask in their input
        mask = F.adaptive_max_pool2d(mask, start.shape[-2:]).to(x)  # a latent is new if any pixel of it is
        denoise, x = inpaint(denoise, known, mask), torch.lerp(noised, x, mask)
    if strength < 1 or (mask is None and model.concat != "latents"):
        return noised, denoise
    return x, denoise
