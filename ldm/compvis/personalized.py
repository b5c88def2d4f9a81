"""The data set of textual inversion's own code (Gal et al. 2022), for programs written for it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ldm.data.image_files import read_image
from ldm.data.image_formats import SUFFIXES
from ldm.finetune.textual_inversion import FRAMES

per_img_token_list = list("אבגדהוזחטיכלמנסעפצקרשת")  # a word for what is special about each image
PAIRS = ("a photo of a {} with {}", "a picture of the {} with {}", "an image of the {} with {}", "a {} with {}")


class PersonalizedBase(Dataset):
    """Images of one subject, which captions call `placeholder_token`: {"image": (h, w, 3) in [-1, 1], "caption"}.

    Args:
        data_root: A folder of images.
        size: Of the square that images are resized to, distorted if they are not square.
        repeats: How often an epoch of `set` "train" has each image.
        flip_p: The share of images that is mirrored.
        per_image_tokens: A share `mixing_prob` of the captions also has the image's own word.
        center_crop: Crop the middle square instead of distorting.
        coarse_class_text: The subject's class, put before the placeholder.
    """

    frames = FRAMES["object"]

    def __init__(
        self, data_root: str, size: int | None = None, repeats: int = 100, interpolation: str = "bicubic",
        flip_p: float = 0.5, set: str = "train", placeholder_token: str = "*", per_image_tokens: bool = False,
        center_crop: bool = False, mixing_prob: float = 0.25, coarse_class_text: str | None = None,
    ) -> None:  # fmt: skip
        found = sorted(Path(data_root).iterdir()) if Path(data_root).is_dir() else []
        self.image_paths = [path for path in found if path.suffix.lower() in SUFFIXES]
        self.num_images = len(self.image_paths)
        if self.num_images == 0:
            raise ValueError(f"data_root {data_root!r} is not a folder with images in it")
        if per_image_tokens and self.num_images > len(per_img_token_list):
            raise ValueError(f"per_image_tokens has {len(per_img_token_list)} words, for {self.num_images} images")
        if interpolation.upper() not in Image.Resampling.__members__:
            raise ValueError(f"unknown interpolation {interpolation!r}; choose from bicubic, bilinear, lanczos")
        self.interpolation = Image.Resampling[interpolation.upper()]
        self._length = self.num_images * (repeats if set == "train" else 1)
        self.size, self.flip_p, self.center_crop = size, flip_p, center_crop
        self.per_image_tokens, self.mixing_prob = per_image_tokens, mixing_prob
        self.placeholder = " ".join(filter(None, (coarse_class_text, placeholder_token)))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i %= self.num_images
        image = read_image(self.image_paths[i])
        if self.center_crop:
            image = ImageOps.fit(image, (min(image.size),) * 2, self.interpolation)
        if self.size is not None:
            image = image.resize((self.size, self.size), self.interpolation)
        if random.random() < self.flip_p:
            image = ImageOps.mirror(image)
        return {"image": (np.asarray(image) / 127.5 - 1).astype(np.float32), "caption": self._caption(i)}

    def _caption(self, i: int) -> str:
        if self.per_image_tokens and random.random() < self.mixing_prob:
            return random.choice(PAIRS).format(self.placeholder, per_img_token_list[i])
        return random.choice(self.frames).format(self.placeholder)
