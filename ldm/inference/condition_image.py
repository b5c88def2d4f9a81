"""The image that a model is conditioned on, as a script reads it: a small one to enlarge, or a map of classes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.data.image_files import open_image, read_map
from ldm.inference.init_image import InitImage

if TYPE_CHECKING:  # they import torch
    from torch import Tensor

    from ldm.latent_diffusion import LatentDiffusion

GIVEN_BY = {"image": "--upscale", "map": "--map"}  # what the model's conditioner reads -> the option that gives it
BESIDE = ("strength", "width", "height", "resize", "prompts", "from_file")  # options without a meaning beside it


class ConditionImage(InitImage):
    """Such an image, which takes the place of a prompt. reads: as of the model's conditioner, "image" or "map"."""

    conditions = True

    def __init__(self, image: Image.Image, reads: str) -> None:
        super().__init__(image)
        self.reads = reads

    @classmethod
    def of(cls, path: Path, reads: str) -> "ConditionImage":
        """Read it from a file."""
        return cls(open_image(path) if reads == "image" else read_map(path), reads)

    def settings(self, args: argparse.Namespace, model: "LatentDiffusion", made: Any = None) -> dict[str, Any]:
        """Return the settings of what is generated. ValueError for a model or options that do not go with the image."""
        option, conditioner = GIVEN_BY[self.reads], model.cond_stage_model
        if getattr(conditioner, "reads", None) != self.reads:
            what = "small images (super-resolution)" if self.reads == "image" else "maps of classes"
            raise ValueError(f"{option} needs a model that is conditioned on {what}, and this one is not")
        if given := [name for name in BESIDE if getattr(args, name, None) not in (None, False)]:
            prompts = "layout" if getattr(args, "layout", None) else "class" if args.classes else "prompt"
            names = ", ".join("--" + {"prompts": prompts, "width": "W", "height": "H"}.get(n, n) for n in given)
            raise ValueError(f"{option} decides what is generated, and how large: leave out {names.replace('_', '-')}")
        width, height = self.image.size
        if self.reads == "image":
            width, height = (side * model.downsampling for side in (width, height))
        elif width % model.multiple or height % model.multiple:
            raise ValueError(f"the map is {width} x {height} pixels: this model takes multiples of {model.multiple}")
        return {"width": width, "height": height, "init_hash": self.init_hash}

    def resized(self, width: int, height: int) -> "ConditionImage":
        return self

    def prompts(self, model: "LatentDiffusion", texts: Sequence[Any]) -> "Tensor":
        """Return the image for each of the texts' images, padded to a size that the UNet makes."""
        import numpy as np
        import torch

        from ldm.init_image import InitImages

        if self.reads == "map":
            found = torch.from_numpy(np.array(self.image))[None].long()  # (1, h, w)
        else:
            found = InitImages(self.image, None, 1, model.image_channels, model.multiple // model.downsampling).pixels
        return found.expand(len(texts), *found.shape[1:])

    def arguments(self) -> dict[str, Any]:
        return {}
