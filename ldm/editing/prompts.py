"""Prompt-to-Prompt: edit an image by its prompt, without training (Hertz et al. 2022,
https://arxiv.org/abs/2208.01626; their code: https://github.com/google/prompt-to-prompt).

Two images are made together from one noise: the first of the prompt, the second of the edited prompt, with attention
weights M of the first one in the place of its own, M*. A is the `alignment` of the prompts:

    cross-attention   M A where the first prompt has a word, M* where it has none; times c at a word of weight c
    silenced word     -infinity before the softmax: the other words share what it had, as they do not with c = 0
    self-attention    M, in small layers
    local blend       the first image's x0 where neither image attends to the chosen words

As c M_j V_j = M_j (c V_j), a weight changes how much of a word's value is added, not where. The first image is what it
is in such a batch without an edit, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.prompt_syntax import MAX_WEIGHT
from ldm.diffusion.denoiser import scalings
from ldm.editing.attention import Call, hooked
from ldm.editing.settings import Editing
from ldm.editing.words import POSITIVE, Words, alignment
from ldm.models.attention_layers import Layer, output_of, weights_of
from ldm.settings import FLOAT, Setting, checked, listed

SMALL_LAYER = (
    16 * 16
)  # positions of a layer whose self-attention is taken over, and whose maps make the mask of a blend
BLEND_FROM = 0.2  # of the time: before, the maps show little
WEIGHT = Setting(FLOAT, "", low=-MAX_WEIGHT, high=MAX_WEIGHT)


@contextmanager
def prompt_to_prompt(
    model: Any,
    prompt: str,
    edited: str | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    silence: Sequence[str] = (),
    pairs: int = 1,
    plain: bool = False,
    **editing: Any,
) -> Iterator[None]:
    """Make the next batch, `pairs` images of `prompt` and as many of `edited`, images and their edited versions.

    Both of a pair have the same seed. An edit that changes nothing makes the same image, bit for bit.

    Args:
        model: a LatentDiffusion of texts, ours or CompVis's, with any sampler.
        edited: the edited prompt; None is `prompt`.
        weights: of its words: 2 adds twice as much of one, 0 nothing, -1 takes it away.
        silence: words of it that nothing attends to.
        plain: read brackets in prompts as words, as CompVis's code always does.
        **editing: `ldm.editing.settings.Editing`.

    Raises:
        ValueError: for a model without attention to words, for words that a prompt does not have, and for what would
            have no effect; from the sampler, for another batch or pairs of other seeds; after the block, for a blend
            that had no effect.
    """
    if not isinstance(weights, Mapping | None):
        raise ValueError(f"weights must be a mapping of words to numbers, got {weights!r}")
    silence, pairs = listed("silenced words", silence), POSITIVE.checked("pairs", pairs)
    source, target = (Words(model, text, plain) for text in (prompt, prompt if edited is None else edited))
    if source.size != target.size:
        sizes = " and ".join(str(words.size) for words in (source, target))
        raise ValueError(f"the prompts are encoded as {sizes} tokens: they must be cut into as many chunks")
    settings = Editing(**checked(Editing, editing))
    if editing.get("pooled_steps") is not None and "c_adm" not in model.condition([prompt], plain=plain):
        raise ValueError("pooled_steps has no effect: this model's UNet takes no pooled text beside the words")
    edit = _Edit(model, source, target, weights or {}, silence, pairs, settings)
    if edit.is_empty:
        yield
    else:
        with hooked(model, 2 * pairs, source.size, edit.attend, edit.begin, edit.finish):
            yield
        if edit.seen and not edit.has_blended:
            raise ValueError(f"blend had no effect: no step began after {BLEND_FROM:g} of the time; take more steps")


class _Edit:
    """The hooks of one edit, and what the chosen words of a local blend were attended to by so far."""

    def __init__(
        self,
        model: Any,
        source: Words,
        target: Words,
        weights: Mapping[str, float],
        silence: Sequence[str],
        pairs: int,
        settings: Editing,
    ) -> None:
        self.model, self.pairs, self.settings = model, pairs, settings
        self.moved, self.added = alignment(source, target)
        self.kept = ~target.mask(silence)  # the tokens that may be attended to
        self.factor, free = torch.ones(target.size), self.kept.clone()
        for word, weight in weights.items():
            if not free[places := target.places(word)].all():
                raise ValueError(f"{word!r} is weighted twice, or silenced too: one of them alone would have an effect")
            self.factor[places], free[places] = WEIGHT.checked(f"the weight of {word!r}", weight), False
        self.kept_before = ~self.moved[:, ~self.kept].any(1)  # those of the first prompt that become such
        self.blended = torch.zeros(2, source.size)  # 1 at the words of a blend, in either prompt
        for text in settings.blend:
            self.blended[0, source.find(text)] = 1
            self.blended[1, target.find(text) if source.find(text) else target.places(text)] = 1
        self.is_empty = source.prompt == target.prompt and bool((self.factor == 1).all() and self.kept.all())
        self.seen: dict[int, Tensor] = {}  # positions of a layer -> attention to the blend's words (2, pairs, n)
        self.has_begun = self.has_blended = False

    def begin(self, pooled: Tensor, call: Call) -> Tensor:
        """Return the vectors of texts as a whole, (b or 2b, d), with those of the first images for the edited ones."""
        low, high = self.settings.pooled_steps
        if not low <= call.passed < high:
            return pooled
        others, own = pooled[: -2 * self.pairs], pooled[-2 * self.pairs : -self.pairs]
        return torch.cat([others, own, own])

    def attend(self, layer: Layer, x: Tensor, context: Tensor, output: Tensor, call: Call) -> Tensor | None:
        """Return the output with the edited images' attention in it; see `hooked`."""
        n, (low, high) = self.pairs, self.settings.cross_steps if layer.cross else self.settings.self_steps
        taken, blends = low <= call.passed < high, bool(self.settings.blend)
        if not layer.cross:
            if not taken or x.shape[1] > SMALL_LAYER:
                return None
            edited = weights_of(layer, x[:n], context[:n])
        else:
            edited = weights_of(layer, x[n:], context[n:], self.kept)
            if blends and x.shape[1] <= SMALL_LAYER:
                both = weights_of(layer, x[:n], context[:n]), edited
                self._see(torch.stack([own.mean(1) for own in both]))
            if taken:
                own = weights_of(layer, x[:n], context[:n], self.kept_before)
                edited = torch.where(self.added.to(own.device), edited, own @ self.moved.to(own))
            edited = edited * self.factor.to(edited)
        return torch.cat([output[:n], output_of(layer, edited, context[n:]).to(output.dtype)])

    def _see(self, weights: Tensor) -> None:
        """Add the attention to the blend's words in a layer's weights (2, pairs, n, m)."""
        own = torch.einsum("e p n m, e m -> e p n", weights.float(), self.blended.to(weights.device))
        self.seen[own.shape[-1]] = self.seen.get(own.shape[-1], 0) + own

    def finish(self, x: Tensor, output: Tensor, call: Call) -> Tensor:
        """Give the edited images the x0 of the first ones outside of the local blend's mask.

        x, output: of the UNet, (2 pairs, c, h, w), or twice as many with the unconditional ones first.
        """
        first, edited = x[-2 * self.pairs :].float().chunk(2)
        if not self.has_begun and not torch.allclose(first, edited, atol=1e-3):
            raise ValueError("an image and its edited version begin at other noise: give both the same seed")
        self.has_begun = True
        if self.settings.blend and not self.seen:
            raise ValueError(
                "blend reads maps of at most 16 x 16 places, and this model has none in images of this size"
            )
        if not self.settings.blend or call.passed < BLEND_FROM:
            return output
        self.has_blended = True
        maps = self.seen[max(self.seen)]
        maps = F.max_pool2d(maps.unflatten(-1, call.size(maps.shape[-1])), 3, 1, 1)  # (2, pairs, h, w)
        maps = F.interpolate(maps, output.shape[-2:])
        mask = (maps > self.settings.threshold * maps.amax((-2, -1), keepdim=True)).any(0)[:, None]
        c_skip, c_out = scalings(self.model.prediction, sigma := call.sigma(self.model))
        scale = 1 + sigma if self.model.prediction == "flow" else (1 + sigma * sigma) ** 0.5  # of x_vp to x
        parts = []
        for own, found in zip(x.split(2 * self.pairs), output.split(2 * self.pairs), strict=True):
            first, edited = found.chunk(2)
            # the output for the edited x that means the first image's x0 = c_skip x + c_out output
            before, after = own[:, : output.shape[1]].chunk(2)
            same = first + c_skip * scale / c_out * (before - after).to(first)
            parts += [first, torch.where(mask, edited, same)]
        return torch.cat(parts)
