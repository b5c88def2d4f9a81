"""What each word of a prompt attends to: cross-attention maps of a generation (Hertz et al. 2022, figure 4;
https://arxiv.org/abs/2208.01626)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.editing.attention import Call, hooked
from ldm.editing.words import POSITIVE, Words
from ldm.labels import Row, labelled_rows
from ldm.models.attention_layers import Layer, weights_of
from ldm.settings import INT, Setting, listed

INDEX = Setting(INT, "", low=0)


class AttentionMaps:
    """Cross-attention of images to the words of their prompts: means over heads, and over steps in parts of the time.

    So the memory that it takes does not grow with the steps. `steps` and `layers` name what there is.

    Args:
        words: of each image's prompt.
        parts: of the time, equally long; with at least as many as steps, each of these is a part.
    """

    def __init__(self, words: Sequence[Words], parts: int = 10) -> None:
        self.words, self.parts = list(words), parts
        self.sums: dict[tuple[int, str], tuple[Tensor, int]] = {}  # (part, layer) -> maps (b, w, h, w), how many

    @property
    def steps(self) -> list[int]:
        """The parts of the time in which there were steps; 0 is the first."""
        return sorted({part for part, _ in self.sums})

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for _, layer in self.sums))

    def of(self, word: str, image: int = 0, layer: str | None = None, step: int | None = None) -> Tensor:
        """Return the map of a word, or of several in a row: shares of the attention, (h, w) in float32 on the CPU.

        layer, step: of `layers` and `steps`; the mean over all of them if not given, in the size of the largest map.
        """
        places = self.words[INDEX._replace(high=len(self.words) - 1).checked("image", image)].places(word)
        kept = [
            total[image, places].sum(0) / count
            for (part, name), (total, count) in self.sums.items()
            if layer in (None, name) and step in (None, part)
        ]
        if not kept:
            there = f"there are the layers {', '.join(self.layers) or 'none'}, and the steps {self.steps}"
            raise ValueError(f"no attention of layer {layer!r} in step {step!r} was seen: {there}")
        size = max((one.shape for one in kept), key=lambda shape: shape[0] * shape[1])
        return torch.stack([_resized(one, size) for one in kept]).mean(0)

    def sheet(self, images: Sequence[Image.Image], factor: int | None = None) -> Image.Image:
        """Return the images, enlarged by a factor, each with an `overlay` of every word of its prompt."""
        if len(images) != len(self.words):
            raise ValueError(f"the maps are of {len(self.words)} images, got {len(images)}")
        rows = []
        for i, (words, image) in enumerate(zip(self.words, images, strict=True)):
            shown = [image.convert("RGB"), *(overlay(image, self.of(word, i)) for word in words.texts)]
            rows.append(Row(words.prompt, shown, ["", *words.texts]))
        return labelled_rows(rows, 96, factor)

    def add(self, layer: Layer, x: Tensor, context: Tensor, output: Tensor, call: Call) -> None:
        """Add the attention of one layer in one call, as `hooked` gives it."""
        if not layer.cross:
            return
        own, key = (
            weights_of(layer, x, context).mean(1),
            (min(int(call.passed * self.parts), self.parts - 1), layer.name),
        )
        own = own.transpose(1, 2).unflatten(-1, call.size(own.shape[1])).float().cpu()
        total, count = self.sums.get(key, (0, 0))
        self.sums[key] = total + own, count + 1


@contextmanager
def attention_maps(model: Any, prompts: Sequence[str], parts: int = 10, plain: bool = False) -> Iterator[AttentionMaps]:
    """Collect what the words of the next batch's prompts attend to, until the block ends.

    Every kernel of attention will do (see `ldm.editing.attention`), and the images are what they are without the maps.

    Args:
        model: a LatentDiffusion of texts, ours or CompVis's, with any sampler.
        prompts: of all images of the batch, in order.
        parts: of the time, see `AttentionMaps`.
        plain: read brackets in prompts as words, as CompVis's code always does.

    Raises:
        ValueError: for a model without attention to words; from the sampler, for a batch of other prompts.
    """
    words = [Words(model, prompt, plain) for prompt in listed("prompts", prompts)]
    if not any(one.texts for one in words):
        raise ValueError("attention maps need the prompts of the next batch, and there are none with words in them")
    maps = AttentionMaps(words, POSITIVE.checked("parts", parts))
    with hooked(model, len(maps.words), maps.words[0].size, maps.add):
        yield maps


def _resized(one: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Return a grey copy of the image in which a map (h, w) is red: not at its lowest place, fully at its highest."""
    heat = _resized((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-8), (image.height, image.width))
    mask = Image.fromarray((heat.clamp(0, 1) * 200).byte().numpy())
    return Image.composite(Image.new("RGB", image.size, "red"), image.convert("L").convert("RGB"), mask)
