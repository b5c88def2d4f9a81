"""What stages need of a data set, own ones included: docs/how-to/own_modules.md lists it."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any
from zlib import crc32

from torch import Tensor

from ldm.training.stage import Stage
from ldm.util import get_obj_from_str, instantiate_from_config


def build_dataset(stage: Stage, config: Mapping[str, Any]) -> Any:
    """Build the data set of a configuration for a stage; ValueError if it is not as the stage needs it.

    A data set that takes `reads` is given what the stage reads, and looks for nothing else; one that takes `cache_dir`
    the stage's, unless it has its own.
    """
    kind, own = get_obj_from_str(config["target"]), stage.data_params()
    if "reads" in signature(kind).parameters:
        own = {"reads": stage.reads} | own
    if "cache_dir" in signature(kind).parameters and "cache_dir" not in (config.get("params") or {}):
        own = {"cache_dir": stage.cache_dir} | own
    if twice := sorted(own.keys() & (config.get("params") or {}).keys()):
        raise ValueError(f"data.params.{twice[0]} follows from the model of {type(stage).__name__}: leave it out")
    dataset = instantiate_from_config(config, **own)
    check_dataset(stage, dataset)
    return dataset


def check_dataset(stage: Stage, dataset: Any) -> None:
    """Raise ValueError for a data set that is not as the stage needs it (docs/how-to/own_modules.md)."""
    name, groups = type(dataset).__name__, getattr(dataset, "groups", None)

    def require(good: bool, wrong: str) -> None:
        if not good:
            raise ValueError(f"{name} is not a data set for {type(stage).__name__}: {wrong}")

    lacking = [method for method in ("__len__", "__getitem__", *stage.methods) if not hasattr(dataset, method)]
    require(not lacking, f"it has no method {', '.join(lacking)}")
    require(len(dataset) > 0, "it holds no images")
    first, last = dataset[0], dataset[len(dataset) - 1]
    require(isinstance(first, Mapping), f"its samples are of type {type(first).__name__}, not mappings")
    lacking = [key for key in stage.reads if key not in first]
    require(not lacking, f"its samples have no {', '.join(lacking)}, only {', '.join(map(str, first))}")
    wrong = "its samples have a mask, and this stage's loss takes none: leave out data.params.mask here"
    require(stage.masked or not getattr(dataset, "mask", None), wrong)
    image, caption = first["image"], first.get("caption", "")
    require(isinstance(image, Tensor), f"its image must be a tensor, not of type {type(image).__name__}")
    found = f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}"
    good = image.is_floating_point() and image.ndim == 3
    require(good, f"its image must be floats (channels, height, width), not {found}")
    low, high = image.min().item(), image.max().item()
    require(-1.01 <= low and high <= 1.01, f"its image must be in [-1, 1], not from {low:g} to {high:g}")
    if stage.masked and "mask" in first:
        mask, wanted = first["mask"], (1, *image.shape[1:])
        good = isinstance(mask, Tensor) and mask.is_floating_point() and mask.shape == wanted
        require(good and 0 <= mask.min() <= mask.max() <= 1, f"its mask must be floats {wanted} in [0, 1]")
    require(isinstance(caption, str), f"its caption must be a text, not {caption!r}")
    require(groups is None or len(groups) == len(dataset), "its groups must list the shape of each image")
    shapes = {tuple(image.shape), tuple(last["image"].shape)} if groups is None else set(groups)
    single, some = len(shapes) == 1, ", ".join(map(str, sorted(shapes)[:3]))
    good = single or (stage.takes_shapes and groups is not None)
    why = "leave out buckets here" if groups else "say in `groups` which images have one"
    require(good, f"its images have several shapes ({some}): {why}")


@contextmanager
def checked_output(network: Any, channels: int) -> Iterator[None]:
    """Raise ValueError if what a network returns for x of so many channels in the block is wrong."""

    def check(network: Any, args: tuple[Tensor, ...], output: Any) -> None:
        wanted = [(len(args[0]), channels * k, *args[0].shape[2:]) for k in (1, 2)]  # twice, if it learns a variance
        if not isinstance(output, Tensor) or output.shape not in wanted:
            found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"the network {type(network).__name__} returns {found}, and not a tensor of shape {wanted[0]}"
            )

    with network.register_forward_hook(check):
        yield


def note_cut(tokenizer: Any, texts: Sequence[str]) -> None:
    """Print a note if the tokenizer's context cuts texts."""
    length, sizes = tokenizer.context_length, [len(tokenizer.encode(text)) + 2 for text in dict.fromkeys(texts)]
    if cut := sum(size > length for size in sizes):
        said = f"context_length {length} cuts {cut} of {len(sizes)} captions: {max(sizes)} cuts none"
        print(f"note: {said}", file=sys.stderr)


def note_noise(share: float) -> None:
    """Print a note if much of the latents' variance is noise of the autoencoder's posteriors."""
    if share > 0.1:
        remedy = "train with stage.params.posterior=mean, or the autoencoder anew with a smaller kl_weight"
        said = f"{share:.0%} of the latents' variance is the autoencoder's noise, which the UNet must learn to make"
        print(f"note: {said}: {remedy}", file=sys.stderr)


def check_image_size(dataset: Any, channels: int | None, multiple: int) -> list[tuple[int, int]]:
    """Return each (width, height) of a data set's images; raise ValueError if they do not fit a network."""
    found, *size = dataset[0]["image"].shape
    shapes = sorted(set(getattr(dataset, "groups", None) or [tuple(size[::-1])]))
    if channels is not None and found != channels:
        raise ValueError(
            f"the images of {type(dataset).__name__} have {found} channels, and those of the network have {channels}"
        )
    for width, height in shapes:
        if width % multiple or height % multiple:
            raise ValueError(
                f"the images of {type(dataset).__name__} are {width} x {height} pixels, but the network takes "
                f"multiples of {multiple}"
            )
    return shapes


def square_side(dataset: Any, image_size: int | None = None, patch_size: int = 1, **others: Any) -> int:
    """Return the side of the squares that a network sees, by its settings or else the data set's.

    Images in buckets are resized to it; others must have it.
    """
    if getattr(dataset, "groups", None) is not None:
        if image_size is None:
            raise ValueError("images in buckets are resized to CLIP's square: give its side, vision.image_size")
        return image_size
    ((width, height),) = check_image_size(dataset, None, patch_size)
    size = height if image_size is None else image_size
    if not height == width == size:
        raise ValueError(
            f"the images of {type(dataset).__name__} are {width} x {height} pixels, and CLIP's, by its "
            f"vision.image_size, {size} x {size}"
        )
    return size


def content_of(dataset: Any, words: Sequence[str]) -> dict[str, Any]:
    """Return what a run remembers of its images, for `compare_content`: number, files by name, classes, and words."""
    names = "/".join(map(os.path.basename, getattr(dataset, "paths", ())))  # not their folder, which may be moved
    # names of a folder's; DreamBooth's are data sets
    classes = [str(one) for one in getattr(dataset, "classes", ()) if isinstance(one, str | int)]
    sums = {"names": crc32(names.encode(errors="surrogateescape")), "words": crc32("\n".join(words).encode())}
    return {"images": len(dataset), "classes": classes, **sums}
