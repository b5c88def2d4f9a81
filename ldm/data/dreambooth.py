"""DreamBooth's data: a few images of each subject, paired with images of the subject's class (Ruiz et al. 2022)."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from filecmp import cmp
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ldm.data.buckets import Shape
from ldm.data.finding import MASK, find_files, find_images
from ldm.data.folder import Folder
from ldm.data.folder_captions import SIDECARS, TABLES
from ldm.data.image_set import Mask

CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
HALF_CHOICE = re.compile(r"\{[^}]*\||\|[^{]*\}")  # a choice that is not closed, or not opened


class DreamBooth(Dataset):
    """Pairs of a subject's image and, with prior preservation, an image of its class.

    A sample is {"image": float32 (channels, size, size) in [-1, 1], "caption": str} and, for the class image, the same
    as "class_image" and "class_caption". Sample i belongs to subject i modulo their number, and takes its images in
    turn, so that subjects weigh the same however many images they have. An epoch holds every image at least once.

    Args:
        subjects: For each, {"instance_dir", "instance_prompt"} and, with prior preservation, {"class_dir",
            "class_images": {file in that folder: caption}}; all of them have class images, or none. Prompt and captions
            are for images without a caption of their own (NAME.txt, NAME.caption, metadata.jsonl).
        size, channels, crop, flip, seed: As in `Folder`.
        min_samples: The smallest number of samples in an epoch.
        buckets: As in `Folder`, for the subjects' images; class images are square, as they are generated. `groups` then
            says which samples may be in one batch, and an epoch holds every image at least 8 * `min_samples` times, so
            that little is lost with a bucket's last, incomplete batch.
        mask: As in `Folder`, for the subjects' images; class images count whole.
        reads: What a sample has of each image, as in `Folder`.
    """

    def __init__(
        self,
        subjects: Sequence[Mapping[str, Any]],
        size: int,
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        seed: int = 0,
        min_samples: int = 1,
        buckets: Sequence[Sequence[int]] | None = None,
        mask: Mask | None = None,
        reads: Sequence[str] = ("image", "caption"),
    ) -> None:
        if not subjects:
            raise ValueError("DreamBooth needs a subject: give a folder with its images")
        settings: dict[str, Any] = {"size": size, "channels": channels, "crop": crop, "flip": flip, "seed": seed}
        settings["reads"] = reads
        own: dict[str, Any] = settings | {"buckets": buckets, "mask": mask}
        self.instances: list[Any] = [
            Folder(one["instance_dir"], caption=one["instance_prompt"], **own) for one in subjects
        ]
        self.classes: list[Any] = []
        for one, images in zip(subjects, self.class_images(subjects), strict=True):
            if images is not None:
                paths = [Path(one["class_dir"], name) for name in images]
                self.classes.append(Folder(one["class_dir"], caption=images, paths=paths, **settings))
        if self.classes and len(self.classes) != len(self.instances):
            raise ValueError(f"only {len(self.classes)} of {len(subjects)} subjects have class images: all, or none.")
        self.min_samples, self.augments = min_samples, flip or crop == "random"
        self.shapes = None if buckets is None else [folder.shapes for folder in self.instances]

    def class_images(self, subjects: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, str | None] | None]:
        """Return each subject's class images, {file in its folder: caption}; the subjects' images are read already."""
        return [one.get("class_images") for one in subjects]

    def __len__(self) -> int:
        longest, subjects = max(len(images) for images in [*self.instances, *self.classes]), len(self.instances)
        if self.shapes is None:
            return max(longest * subjects, self.min_samples)
        return max(longest, 8 * self.min_samples * max(map(len, self.instances))) * subjects

    @property
    def groups(self) -> list[Shape] | None:
        """The shape of each sample's subject image; None where all are alike."""
        if self.shapes is None:
            return None
        places = (divmod(index, len(self.shapes)) for index in range(len(self)))
        return [self.shapes[subject][turn % len(self.shapes[subject])] for turn, subject in places]

    def set_epoch(self, epoch: int) -> None:
        for images in [*self.instances, *self.classes]:
            images.set_epoch(epoch)

    def captions(self) -> list[str]:
        """Return every distinct caption, of subjects and classes."""
        texts = (text for images in [*self.instances, *self.classes] for text in images.texts())
        return list(dict.fromkeys(texts))

    def map(self, cached: Callable[[Any], Any]) -> None:
        """Replace each set of images by `cached(set)`, such as latents instead of pixels."""
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


class Subject(NamedTuple):
    """A subject; its class, which may have choices, is None where it is not given."""

    instance_dir: Path
    instance_prompt: str
    class_prompt: str | None
    class_dir: Path  # of the class's images


def as_list(value: Any) -> list[Any]:
    """Return a setting that is one value or a list of them as a list; nothing for None."""
    return [] if value is None else [value] if isinstance(value, str | Path) else list(value)


def subjects(
    instance_data_dir: str | Sequence[str] | None,
    instance_prompt: str | Sequence[str] | None,
    class_prompt: str | Sequence[str] | None,
    class_data_dir: str | Sequence[str],
) -> list[Subject]:
    """Return the subjects, checked: value i of each argument belongs to subject i. One class_data_dir serves them all.

    Their folders may not lie within each other.
    """
    folders = as_list(instance_data_dir)
    if not folders:
        raise ValueError("give the folder that holds the subject's images: --instance_data_dir DIR")
    count = len(folders)
    rows = {"instance_prompt": as_list(instance_prompt), "class_prompt": as_list(class_prompt)}
    rows["class_data_dir"] = [class_data_dir] * count if isinstance(class_data_dir, str) else list(class_data_dir)
    for name, values in rows.items():
        if len(values) != count and (values or name != "class_prompt"):
            raise ValueError(
                f"{count} --instance_data_dir need as many --{name}, got {len(values)}: one for each subject"
            )
    rows["class_prompt"] = rows["class_prompt"] or [None] * count
    found = [Subject(Path(a), b, c, Path(d)) for a, b, c, d in zip(folders, *rows.values(), strict=True)]
    for subject in found:
        if not subject.instance_prompt.strip():
            raise ValueError(f"--instance_prompt {subject.instance_prompt!r} is empty: it is what names the subject")
        if choices(subject.instance_prompt) != [subject.instance_prompt]:
            raise ValueError(f"--instance_prompt {subject.instance_prompt!r} has a choice, as only class prompts may")
        if subject.class_prompt is not None and subject.instance_prompt in choices(subject.class_prompt):
            raise ValueError(f"{subject.instance_prompt!r} names the subject and its class: the prompts must differ")
        for folder in {other.class_dir for other in found if other.class_prompt is not None}:
            check_apart(subject.instance_dir, folder)
            check_apart(folder, subject.instance_dir)
            check_different(subject.instance_dir, folder)
    return found


def check_apart(images: Path, other: Path | None) -> None:
    """Raise ValueError where another path is a folder of images, or lies in it: its sub-folders are read with it."""
    if other is None:
        return
    if images.resolve() == other.resolve():
        raise ValueError(f"{other} would hold the subject's images and its class's: give each a folder of its own")
    if images.resolve() in other.resolve().parents:
        raise ValueError(f"{other} lies in {images}, whose images are read with those below it: keep them apart")


def check_different(subject: Path, others: Path) -> None:
    """Raise ValueError where an image of the subject is among the class's too, by a link or as a copy.

    The class would be learned as the subject, which its images are there to prevent.
    """
    for path in find_images(subject):
        same = [one for one in find_images(others, empty=True) if cmp(path, one, shallow=False)]
        if same:
            raise ValueError(f"{path} is an image of the subject, and {same[0]} of its class has the same bytes")


def notes_on_images(folder: Path) -> list[str]:
    """Return what a user should know of a subject's images. FileNotFoundError where there are none."""
    paths, notes = find_images(folder), []
    ignored = unread(folder, paths)
    if ignored:
        notes.append(f"{folder}: skipped {', '.join(ignored)} (no images)")
    if len(paths) == 1:
        notes.append(f"{folder} holds a single image: three to five, from several sides, teach more")
    return notes


def choices(prompt: str) -> list[str]:
    """Return the prompts that one with choices means: "a {thin|bold} five" is "a thin five" and "a bold five".

    A choice may be empty. Braces without | are text. Several choices are combined in every way. ValueError for one that
    is not closed, or in another.
    """
    parts = CHOICE.split(prompt)  # text, choice, text ...
    if any(map(HALF_CHOICE.search, parts[::2])):
        raise ValueError(f"the prompt {prompt!r} has a choice with a brace too few or too many: write {{one|other}}")
    found = product(*(part.split("|") if i % 2 else [part] for i, part in enumerate(parts)))
    return list(dict.fromkeys(" ".join("".join(row).split()) for row in found)) if len(parts) > 1 else [prompt]


def words_of(prompt: str) -> list[str]:
    """Return the words of a prompt, without the punctuation around them."""
    return [bare for word in prompt.split() if (bare := word.strip(".,;:!?\"'()[]{}"))]


def identifiers(instance_prompt: str, class_prompt: str | None) -> list[str]:
    """Return the words that name the subject: those that its class's prompt lacks; none without a class."""
    if class_prompt is None:
        return []
    common = {word for one in choices(class_prompt) for word in words_of(one.lower())}
    return [word for word in dict.fromkeys(words_of(instance_prompt)) if word.lower() not in common]


def unread(folder: str | Path, read: Iterable[Path]) -> list[str]:
    """Return names of the files in a folder that are neither images read from it nor their captions or masks."""
    known, root = {Path(path) for path in read}, Path(folder)
    captions = {*find_files(root, SIDECARS), *(path.with_suffix(MASK) for path in known)}
    files = (path for path in root.rglob("*") if path.is_file() and path.name not in TABLES)
    return sorted(str(path.relative_to(root)) for path in files if path not in known | captions)


def words_and_prompts(
    instance_prompt: str | Sequence[str] | None, class_prompt: str | Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return the words that name the subjects, and the prompts that show what is learned and what is kept."""
    instances, classes = as_list(instance_prompt), as_list(class_prompt)
    pairs = [(one, classes[i] if i < len(classes) else None) for i, one in enumerate(instances)]
    words = [word for one, kind in pairs for word in identifiers(one, kind)]
    prompts = [prompt for one, kind in pairs for prompt in (one, *([] if kind is None else choices(kind)[:1]))]
    return list(dict.fromkeys(words)), list(dict.fromkeys(prompts))
