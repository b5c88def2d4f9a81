"""DreamBooth's data: a few images of each subject, paired with images of the subject's class (Ruiz et al. 2022)."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.data.buckets import Shape
from ldm.data.folder import Folder
from ldm.data.image_files import read_image

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")


class DreamBooth(Dataset):
    """Pairs: sample i is an image of a subject and, where there are class images, one of the same subject's class.

    A sample is {"image": float32 (channels, size, size) in [-1, 1], "caption": str} and, of the class image, the same
    as "class_image" and "class_caption". Sample i belongs to subject i modulo their number, and runs through its
    images in turn, so that subjects weigh the same, however many images they have. An epoch holds every image at
    least once, and at least `least` samples.

    subjects: for each, {"instance_dir", "instance_prompt"} and, with prior preservation, {"class_dir",
        "class_images": {file in that folder: caption}}; all of them have class images, or none. The prompt and the
        captions are those of images that come without one of their own (NAME.txt, NAME.caption, metadata.jsonl).
    size, channels, crop, flip, seed: as in `Folder`.
    buckets: as in `Folder`, of the subjects' images; images of the class are squares always, as the model draws
        them. Then `groups` says which samples may go into one batch, and an epoch holds every image at least
        8 x `least` times, so that little is lost with the last, ragged batch of a bucket.

    Raises what `Folder` raises, and ValueError for a damaged image (all are read once), no subject, or class images
    of some subjects only.
    """

    def __init__(
        self,
        subjects: Sequence[Mapping[str, Any]],
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        least: int = 1,
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not subjects:
            raise ValueError("there is no subject: give a folder with images of one.")
        settings = {"size": size, "channels": channels, "crop": crop, "flip": flip, "seed": seed}
        self.instances: list[Any] = [
            Folder(one["instance_dir"], caption=one["instance_prompt"], buckets=buckets, **settings) for one in subjects
        ]
        self.classes: list[Any] = [
            Folder(
                one["class_dir"],
                caption=one["class_images"],
                paths=[Path(one["class_dir"], name) for name in one["class_images"]],
                **settings,
            )
            for one in subjects
            if one.get("class_dir") is not None
        ]
        if self.classes and len(self.classes) != len(self.instances):
            raise ValueError(f"only {len(self.classes)} of {len(subjects)} subjects have class images: all, or none.")
        self.least, self.augments = least, flip or crop == "random"
        self.shapes = None if buckets is None else [folder.shapes for folder in self.instances]
        for folder in [*self.instances, *self.classes]:
            for path in folder.paths:
                read_image(path, channels)  # damage shows now, not after an hour of training

    def __len__(self) -> int:
        longest, subjects = max(len(images) for images in [*self.instances, *self.classes]), len(self.instances)
        if self.shapes is None:
            return max(longest * subjects, self.least)
        return max(longest, 8 * self.least * max(map(len, self.instances))) * subjects

    @property
    def groups(self) -> list[Shape] | None:
        """Of each sample the shape of the subject's image; None where all are alike."""
        if self.shapes is None:
            return None
        places = (divmod(index, len(self.shapes)) for index in range(len(self)))
        return [self.shapes[subject][turn % len(self.shapes[subject])] for turn, subject in places]

    def set_epoch(self, epoch: int) -> None:
        """Crops and mirrorings of the following samples are those of `epoch`."""
        for images in [*self.instances, *self.classes]:
            images.set_epoch(epoch)

    def captions(self) -> list[str]:
        """Every different caption, of subjects and classes."""
        texts = (text for images in [*self.instances, *self.classes] for text in images.captions)
        return list(dict.fromkeys(texts))

    def map(self, cached: Callable[[Any], Any]) -> None:
        """Replace each set of images by `cached(set)`: latents instead of pixels, say."""
        self.instances = [cached(images) for images in self.instances]
        self.classes = [cached(images) for images in self.classes]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        turn, subject = divmod(index, len(self.instances))
        instances = self.instances[subject]
        (sample,) = instances.__getitems__([turn % len(instances)])
        if self.classes:
            classes = self.classes[subject]
            (other,) = classes.__getitems__([turn % len(classes)])
            sample |= {f"class_{name}": value for name, value in other.items()}
        return sample


def choices(prompt: str) -> list[str]:
    """The prompts that one with choices means: "a {thin|bold} five" is "a thin five" and "a bold five".

    A choice may be empty. Braces without | are text. Several choices are combined in every way.
    """
    texts, options = CHOICE.split(prompt)[::2], [match[1].split("|") for match in CHOICE.finditer(prompt)]
    found = (
        "".join(part for pair in zip(texts, [*row, ""], strict=True) for part in pair) for row in product(*options)
    )
    return list(dict.fromkeys(" ".join(one.split()) for one in found)) if options else [prompt]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, without the punctuation around them."""
    return [bare for word in prompt.split() if (bare := word.strip(".,;:!?\"'()[]{}"))]


def identifiers(instance_prompt: str, class_prompt: str | None) -> list[str]:
    """The words that name the subject: those of its prompt that its class's prompt lacks; none without a class."""
    if class_prompt is None:
        return []
    common = {word for one in choices(class_prompt) for word in words_of(one.lower())}
    return [word for word in dict.fromkeys(words_of(instance_prompt)) if word.lower() not in common]


def unread(folder: str | Path, read: Iterable[Path]) -> list[str]:
    """Names of the files in a folder that are neither images read from it nor captions: what to tell a user of."""
    known, root = {Path(path) for path in read}, Path(folder)
    captions = {path.with_suffix(suffix) for path in known for suffix in (".txt", ".caption")}
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "metadata.jsonl")
    return sorted(str(path.relative_to(root)) for path in files if path not in known | captions)
