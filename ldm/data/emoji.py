"""Two open sets of emoji with captions: Noto Emoji (Google, Apache-2.0) and Fluent Emoji Flat (Microsoft, MIT).

`npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji-flat@1.2.6` brings their files, 4 MB of SVG. About 7,000
icons are rendered once by resvg (extra `[emoji]`) and kept. `held_out.txt` names the icons that no training sees:
combinations of role, gender, skin tone and style, whose parts are all seen elsewhere.
"""

import gzip
import hashlib
import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.checkpoint.atomic import atomic
from ldm.checks import Count, Probability
from ldm.data.captions import Caption
from ldm.data.emoji_captions import (
    CATEGORIES,
    COLOURS,
    EMOJI_FRAMES,
    STYLES,
    Parts,
    caption_texts,
    choose_wording,
    read_names,
    say,
)
from ldm.data.image_formats import open_pillow
from ldm.util import progress_bar

HELD_OUT_NAMES = Path(__file__).parent / "held_out.txt"
SCALES = (1.0, 0.9)  # of icons in their square
SHIFTS = {1.0: 1, 0.9: 3}  # pixels of 64 that they are moved by, at most


class Icon(NamedTuple):
    """An emoji of one of the sets."""

    style: str  # "flat" (Fluent) or "detailed" (Noto)
    name: str  # as published
    parts: Parts  # what the name says
    aliases: tuple[str, ...]  # other published names of the icon, or of its mirror image
    others: tuple[str, ...]  # other names of what it shows, in words
    category: str | None
    body: str  # of the SVG
    box: tuple[float, float]  # its width and height

    @property
    def tone(self) -> str | None:
        """The skin tone; None for the yellow default, for none, and for couples of two."""
        return self.parts.tones[0] if len(self.parts.tones) == 1 else None

    def caption(self, background: str | None = None, frame: str = EMOJI_FRAMES[0]) -> str:
        """Return the caption in that wording, with everything stated."""
        kind = CATEGORIES.get(self.category or "", "emoji")
        return say(frame, self.parts.thing, kind, self.style, self.parts.tones, background)


class Emoji(Dataset):
    """Emoji on coloured backgrounds with captions.

    A sample is a dict:
        image    float32 (3, size, size) in [-1, 1]
        caption  str, a function of (seed, epoch, index)
        label    int, the number of what it shows, whatever its style, tone and background
        style    (style, tones, background), as numbers
        stated   the same as far as the caption states it, else -1

    `icons` are the icons, `entries` the icon and the background of each sample, `images` uint8 (n, 3, size, size).

    Args:
        root: The folder with the packages: iconify-json-NAME-*.tgz as npm packs them, or @iconify-json/NAME/ as it
            installs them; by default the environment variable LDM_EMOJI, else ./data/emoji.
        split: "train" or "held_out", which leaves out icons that other icons share.
        size: Pixels of the square.
        copies: How often each icon is there whose name has no skin tone, as the yellow default. Every second copy is
            smaller, moved or on a coloured background.
        toned_copies: How often each icon is there whose name has a skin tone.
        coloured: The share of these with a coloured background.
        together: How many icons of the same thing stay together in a shuffled order, so that a batch has captions
            that only differ in tone or style.
        seed: Of captions and copies.
        cache_dir: A folder that keeps the rendered icons; None renders them anew, in two minutes.
    """

    augments = False  # a copy is the same in every epoch, so that its latents can be cached

    def __init__(
        self,
        root: str | None = None,
        split: Literal["train", "held_out"] = "train",
        size: Count = 64,
        copies: Count = 1,
        toned_copies: Count = 1,
        coloured: Probability = 0.6,
        together: Count = 1,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"the emoji's split is 'train' or 'held_out', not {split!r}")
        folder = Path(os.environ.get("LDM_EMOJI", "data/emoji") if root is None else root)
        everything = [icon for package, style in STYLES.items() for icon in read_package(folder, package, style)]
        self.icons = split_icons(everything, HELD_OUT_NAMES.read_text().split())[split == "held_out"]
        if not self.icons:
            raise ValueError(f"none of the {len(everything)} icons in {str(folder)!r} is in the split {split!r}")
        self.seed, self.together, self.epoch = seed, together, 0
        self.entries: list[tuple[int, str | None]] = []
        rendered = {
            scale: render_icons(self.icons, size, scale, cache_dir)
            for scale in (SCALES if max(copies, toned_copies) > 1 else SCALES[:1])
        }
        made = []
        for i, icon in enumerate(self.icons):
            for copy in range(toned_copies if icon.parts.tones else copies):
                image, background = self._copy(i, copy, rendered, coloured)
                made.append(image)
                self.entries.append((i, background))
        self.images = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()  # n 3 size size
        things = sorted({icon.parts.thing for icon in everything})  # so that both splits number them alike
        tones = sorted({icon.parts.tones for icon in everything})
        self.label = [things.index(icon.parts.thing) for icon in self.icons]
        self.tones = [tones.index(icon.parts.tones) for icon in self.icons]

    def _copy(
        self, i: int, copy: int, rendered: Mapping[float, np.ndarray], coloured: float
    ) -> tuple[np.ndarray, str | None]:
        """Return pixels uint8 (size, size, 3) of a copy, and its background's colour; None for white."""
        if copy % 2 == 0:
            return painted_over(rendered[1.0][i], (255, 255, 255)), None
        icon = self.icons[i]
        uniform = random.Random(f"{self.seed} {icon.style} {icon.name} {copy}").random
        background = [*COLOURS][int(uniform() * len(COLOURS))] if uniform() < coloured else None
        scale = SCALES[int(uniform() * len(SCALES))]
        pixels = rendered[scale][i]
        most = SHIFTS[scale] * len(pixels) // 64
        shift = [int(uniform() * (2 * most + 1)) - most for _ in "yx"]
        colour = (255, 255, 255) if background is None else COLOURS[background]
        tint = [0 if background is None else int(uniform() * 25) - 12 for _ in "rgb"]
        return painted_over(moved(pixels, *shift), np.clip(np.add(colour, tint), 0, 255)), background

    def __len__(self) -> int:
        return len(self.entries)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def caption_of(self, index: int) -> Caption:
        """Return the caption of a sample in this epoch."""
        return Caption(self._choose(index)[0])

    def _choose(self, index: int) -> tuple[str, bool]:
        i, background = self.entries[index]
        icon = self.icons[i]
        things, kind = (icon.parts.thing, *icon.others), CATEGORIES.get(icon.category or "", "emoji")
        return choose_wording(self.seed, self.epoch, index, things, kind, icon.style, icon.parts.tones, background)

    def texts(self) -> list[str]:
        """Return texts that hold every word of the captions."""
        return caption_texts(thing for icon in self.icons for thing in (icon.parts.thing, *icon.others))

    def shuffled(self, generator: torch.Generator) -> Iterator[int]:
        """Yield all indices in an order that follows from the generator, up to `together` of a thing in a row."""
        order = torch.randperm(len(self), generator=generator).tolist()
        order.sort(key=lambda index: self.label[self.entries[index][0]])  # stable: shuffled within a thing
        runs = []
        for _, same in groupby(order, key=lambda index: self.label[self.entries[index][0]]):
            group = list(same)
            runs += [group[k : k + self.together] for k in range(0, len(group), self.together)]
        for k in torch.randperm(len(runs), generator=generator).tolist():
            yield from runs[k]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return {"image": self.images[index].float().div_(127.5).sub_(1), **self.without_image(index)}

    def without_image(self, index: int) -> dict[str, Any]:
        """Return a sample without its image."""
        (i, background), (text, states) = self.entries[index], self._choose(index)
        style, colour = [*STYLES.values()].index(self.icons[i].style), 0
        if background is not None:
            colour = 1 + [*COLOURS].index(background)
        others = (self.tones[i], colour)
        return {
            "caption": text, "label": self.label[i],
            "style": (style, *others), "stated": (style if states else -1, *others),
        }  # fmt: skip


def read_package(root: Path, package: str, style: str) -> list[Icon]:
    """Read the icons of a set. Aliases are further names, and old icons (`elf-tone2`) are left out."""
    icons, metadata = _read_json(root, package)
    bare = style == "flat"
    parts, aliases = read_names(icons["icons"], bare), icons.get("aliases", {})
    categories = {parts[n].thing: kind for kind, names in metadata["categories"].items() for n in names if n in parts}
    of_icon: dict[str, list[str]] = {}  # published names, by that of the icon
    of_thing: dict[str, dict[str, None]] = {}  # names in words, in order, by those of the icon
    for name, said in read_names(aliases, bare).items():
        parent = aliases[name]["parent"]
        while parent in aliases:
            parent = aliases[parent]["parent"]
        of_icon.setdefault(parent, []).append(name)
        if parent in parts and set(aliases[name]) == {"parent"} and "tone" not in name:
            of_thing.setdefault(parts[parent].thing, {})[said.thing] = None
    found = []
    for name, icon in icons["icons"].items():
        thing, box = parts[name].thing, tuple(icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        names = tuple(of_icon.get(name, ())), tuple(of_thing.get(thing, ()))
        found.append(Icon(style, name, parts[name], *names, categories.get(thing), icon["body"], box))
    return [icon for icon in found if not re.search("-tone[1-5]$", icon.name)]


def _read_json(root: Path, package: str) -> list[dict[str, Any]]:
    """Read icons.json and metadata.json of a package, packed or installed."""
    names, found = ("icons.json", "metadata.json"), []
    packed = sorted(root.glob(f"iconify-json-{package}-*.tgz"))
    installed = root / "@iconify-json" / package
    try:
        if packed:
            content = BytesIO(gzip.decompress(packed[-1].read_bytes()))  # all of it, so that its checksum is compared
            with tarfile.open(fileobj=content, mode="r:") as archive:
                for name in names:
                    if (file := archive.extractfile(f"package/{name}")) is None:
                        raise ValueError(f"{name} is not a file")
                    found.append(json.load(file))
            return found
        return [json.loads((installed / name).read_text()) for name in names]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"neither {str(root)!r}/iconify-json-{package}-*.tgz nor {str(installed)!r} exists: set LDM_EMOJI or "
            f"data.params.root to their folder, or bring the file into it: npm pack @iconify-json/{package}"
        ) from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"the package {package!r} in {str(root)!r} is damaged: {error}") from None


def split_icons(icons: Sequence[Icon], names: Iterable[str]) -> tuple[list[Icon], list[Icon]]:
    """Return the icons to train on, and the held-out ones, which are to be measured on.

    names: `package:name` of what is held out, icons or aliases. No icon is trained on whose SVG body is that of a
    held-out one, under whatever name; and a held-out icon that is also that of icons which are not held out is not
    measured on.
    """
    wanted = {(STYLES[package], name) for package, name in (line.split(":") for line in names)}
    found = {(icon.style, name): icon for icon in icons for name in (icon.name, *icon.aliases)}
    if lost := sorted(wanted - found.keys()):
        raise ValueError(
            f"{HELD_OUT_NAMES.name} names {lost[0][1]!r}, which the packages do not have: use noto 1.2.9 and "
            "fluent-emoji-flat 1.2.6, or their icons could be trained on under new names"
        )
    held = {(found[name].style, found[name].name) for name in wanted}
    bodies = {icon.body for icon in icons if (icon.style, icon.name) in held}
    shared = {icon.body for icon in icons if (icon.style, icon.name) not in held}
    train = [icon for icon in icons if icon.body not in bodies]
    return train, [icon for icon in icons if (icon.style, icon.name) in held and icon.body not in shared]


def render_icons(icons: Sequence[Icon], size: int, scale: float, cache_dir: str | None) -> np.ndarray:
    """Return the icons in that part of the square, RGBA uint8 (n, size, size, 4), from the cache if they are there.

    ValueError for an SVG that resvg cannot render.
    """
    content = repr([(icon.style, icon.name, icon.body, icon.box) for icon in icons]) + f" {size} {scale}"
    path = Path(cache_dir or ".") / f"emoji-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npy"
    if cache_dir is not None and path.is_file():
        return np.load(path, mmap_mode="r")
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("rendering the emoji needs the package resvg_py: pip install resvg-py") from None
    pixels = np.empty((len(icons), size, size, 4), np.uint8)
    for i, icon in enumerate(progress_bar(icons, desc="rendering emoji", unit="images")):
        (width, height), margin = icon.box, (1 / scale - 1) / 2
        box = f"{-margin * width} {-margin * height} {width / scale} {height / scale}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        try:
            png = svg_to_bytes(svg_string=f"{svg}{icon.body}</svg>", width=size, height=size)
        except ValueError as error:
            raise ValueError(f"resvg cannot render {icon.style} {icon.name!r}: {error}") from None
        pixels[i] = np.asarray(open_pillow(BytesIO(bytes(png))).convert("RGBA").resize((size, size)))
    if cache_dir is not None:
        with atomic(path, pixels.nbytes) as temporary, open(temporary, "wb") as temporary_file:
            np.save(temporary_file, pixels)
    return pixels


def painted_over(pixels: np.ndarray, colour: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return RGBA pixels uint8 (h, w, 4) over a colour, uint8 (h, w, 3)."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha)).round().astype(np.uint8)


def moved(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Return RGBA pixels (h, w, 4) moved by so many pixels; what comes in is transparent."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((abs(down),) * 2, (abs(right),) * 2, (0, 0)))
    top, left = abs(down) - down, abs(right) - right
    return padded[top : top + height, left : left + width]
