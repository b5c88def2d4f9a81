r"""Encode weighted and long prompts in the syntax of AUTOMATIC1111's web UI ("A1111").

    a (red) car          weight 1.1; ((red)) has 1.1 ** 2, and so on
    a (red:1.3) car      weight 1.3; brackets in brackets multiply
    a [red] car          weight 1 / 1.1
    \( \) \[ \] \\       these characters; a backslash before any other character is dropped
    a car BREAK a tree   the word in capitals ends the chunk: what follows begins a new one

Brackets that do not match are read as in A1111: one that is never closed acts to the end of the prompt (by 1.1 or
1 / 1.1), one that was never opened is text, and round and square ones may cross.

A prompt of more tokens than the encoder's context is cut into chunks of `context_length` - 2 (75 for CLIP), each framed
and padded like a prompt; their hidden states are concatenated. As in A1111, a cut within a phrase moves back to
the last comma if that is among the last 20 of 75 tokens (of other lengths: the same share). A learned word of several
tokens is never cut: it begins the next chunk.

Weights multiply the hidden states of their tokens; then the chunk is scaled back to its former mean ("original"
emphasis). The factor is a ratio of two signed means, old over new. Where all tokens' means share a sign, its inverse is
an average of the weights. Where it is not (an encoder whose features average to almost zero: for one prompt the digits
model's factor would be -130; or negative weights), the mean is not restored.

Unlike A1111: the mean is of each chunk alone, never of the batch; BREAK acts inside brackets too; a weight may have
an exponent and is refused beyond 1000; `(a:1.2.3)`, at which A1111 fails, is text; prompt editing `[a:b:0.5]`,
alternation `[a|b]` and AND are not read. compel's syntax and meaning differ (`(red)1.3`, `red++`).
"""

import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ldm.batching import Blend
from ldm.conditioning.text import TextEncoder, distinct_prompts
from ldm.conditioning.tokenizer import Tokenizer

FACTORS = {"(": 1.1, "[": 1 / 1.1}  # of a bracket without a number
MAX_WEIGHT = 1000.0  # float16 still holds CLIP's largest features, about 30, times this
MAX_CHUNKS = 32
TOKENS = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<number>[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|(?i:inf|nan)))\s*\)"
    r"|[()\[\]:]"
    r"|[^\\()\[\]:]+"
)
BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    text: str
    weight: float


class Chunk(NamedTuple):
    """At most `context_length` - 2 token ids, without start, end or padding, and the weight of each."""

    tokens: list[int]
    weights: list[float]


def parse_prompt(prompt: str) -> list[list[Piece]]:
    """Parse a prompt into pieces, neighbours of equal weight joined, in a new list after each BREAK."""
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where in `texts` the content of each open bracket begins

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in TOKENS.finditer(prompt):
        token = match[0]
        if match["escaped"] is not None:
            texts.append(match["escaped"])
        elif token in opened:
            opened[token].append(len(texts))
        elif match["number"] is not None and opened["("]:
            close("(", float(match["number"]))
        elif token == ")" and opened["("]:
            close("(", FACTORS["("])
        elif token == "]" and opened["["]:
            close("[", FACTORS["["])
        else:
            first, *rest = BREAK.split(token)
            texts += [first, *(text for part in rest for text in (None, part))]
        weights += [1.0] * (len(texts) - len(weights))
    for bracket, starts in opened.items():
        while starts:
            close(bracket, FACTORS[bracket])
    return _joined(texts, weights)


def _joined(texts: Sequence[str | None], weights: Sequence[float]) -> list[list[Piece]]:
    sections: list[list[Piece]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        section = sections[-1]
        if text is None:
            sections.append([])
        elif text and not abs(weight) <= MAX_WEIGHT:  # nan too
            raise ValueError(
                f"the weight {weight:g} of {text[:40]!r} must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; round "
                r"brackets in prompts are weights: write \( \) for the characters"
            )
        elif text and section and section[-1].weight == weight:
            section[-1] = Piece(section[-1].text + text, weight)
        elif text:
            section.append(Piece(text, weight))
    return sections


def cut(tokenizer: Tokenizer, prompt: str, plain: bool = False) -> list[Chunk]:
    """Cut a prompt into chunks, at least one. Each BREAK begins a new one; a BREAK at the end adds none."""
    room = tokenizer.context_length - 2
    (comma,) = tokenizer.encode(",")
    chunks: list[Chunk] = []
    sections = [[Piece(prompt, 1.0)]] if plain else parse_prompt(prompt)
    for i, section in enumerate(sections):
        tokens, weights = [], []
        for text, weight in section:
            ids = tokenizer.encode(text)
            tokens += ids
            weights += [weight] * len(ids)
        while len(tokens) > room and len(chunks) < MAX_CHUNKS:
            end = _end(tokens, room, comma)
            while tokenizer.divides(tokens, end):
                end -= 1
            chunks.append(Chunk(tokens[:end], weights[:end]))
            tokens, weights = tokens[end:], weights[end:]
        if tokens or i + 1 < len(sections) or not chunks:
            chunks.append(Chunk(tokens, weights))
        if len(chunks) > MAX_CHUNKS:
            raise ValueError(
                f"the prompt {prompt[:40]!r}... is too long: it makes more than {MAX_CHUNKS} chunks of {room} tokens"
            )
    return chunks


def _end(tokens: list[int], room: int, comma: int) -> int:
    """Return where to cut: after the last comma near the end of the first `room` tokens, else after all of them."""
    near = range(room - 1, room - 1 - 20 * room // 75, -1)  # A1111: 20 of 75
    # a comma that is the first token beyond the chunk begins the next one
    return room if tokens[room] == comma else next((i + 1 for i in near if tokens[i] == comma), room)


def count_chunks(encoder: Any, prompts: Sequence[Any] | Tensor, plain: bool = False) -> list[int]:
    """Return the number of chunks of each prompt: 1 for encoders other than TextEncoder."""
    first, last = _ends(prompts)
    if last is not None:
        return list(map(max, count_chunks(encoder, first, plain), count_chunks(encoder, last, plain)))
    if not _weighs(encoder, prompts):
        return [1] * len(prompts)
    return [len(cut(encoder.tokenizer, prompt, plain)) for prompt in prompts]


def encode_prompts(
    encoder: Any, prompts: Sequence[Any] | Tensor, chunks: int | None = None, clip_skip: int = 1, plain: bool = False
) -> dict[str, Tensor]:
    """Encode prompts into the conditioning dict.

    A prompt of one chunk without syntax is encoded as by `encoder(prompts)`, bit for bit. All distinct prompts are
    encoded once, in one call, so that the last bits of the result depend only on the number of distinct prompts and of
    chunks.

    Args:
        encoder: a TextEncoder; any other conditioner is called as it is, without reading syntax.
        prompts: texts, or `Blend`s of two; classes or images for other conditioners.
        chunks: k, to which shorter prompts are padded with empty chunks. None: the longest prompt's number, so that a
            prompt's conditioning depends on the others in its batch; see `count_chunks`.
        clip_skip: as in TextEncoder.forward.
        plain: read prompts literally: no brackets, no BREAK.

    Returns:
        {"c_crossattn": (b, k n, d)} of k chunks of n tokens and, if pooled, "c_adm": (b, p), that of the first chunk,
        unweighted, as in A1111.
    """
    first, last = _ends(prompts)
    if last is not None:
        from ldm.interpolation import lerp_conditions  # only a blend needs it

        chunks = max(count_chunks(encoder, prompts, plain)) if chunks is None else chunks
        both = [encode_prompts(encoder, end, chunks, clip_skip, plain) for end in (first, last)]
        return lerp_conditions(*both, [prompt.share if isinstance(prompt, Blend) else 0.0 for prompt in prompts])
    if not _weighs(encoder, prompts):
        if clip_skip != 1 or chunks not in (None, 1):
            raise ValueError(
                f"clip_skip {clip_skip} and {chunks} chunks need CLIP's text encoder, "
                f"and this model is conditioned by {type(encoder).__name__}"
            )
        return encoder(prompts)
    distinct, which = distinct_prompts(prompts)
    parts = [cut(encoder.tokenizer, prompt, plain) for prompt in distinct]
    longest = max(map(len, parts), default=1)
    k = longest if chunks is None else chunks
    if not longest <= k <= MAX_CHUNKS:
        raise ValueError(f"a prompt of {longest} chunks cannot be padded to {k}; the maximum is {MAX_CHUNKS}")
    rows = [chunk for part in parts for chunk in part + [Chunk([], [])] * (k - len(part))]
    cond = encoder(encoder.tokenizer.frame([row.tokens for row in rows]), clip_skip)
    states = cond["c_crossattn"]
    if any(weight != 1 for row in rows for weight in row.weights):
        n = states.shape[1]
        weights = [[1.0, *row.weights, *[1.0] * (n - 1 - len(row.weights))] for row in rows]  # (b k, n)
        states = weigh(states, torch.tensor(weights, device=states.device))
    out = {"c_crossattn": rearrange(states, "(b k) n d -> b (k n) d", k=k)}
    if "c_adm" in cond:
        out["c_adm"] = rearrange(cond["c_adm"], "(b k) p -> b k p", k=k)[:, 0]
    return {key: value[which.to(states.device)] for key, value in out.items()}


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states (b, n, d) by weights (b, n); scale each row to its former mean where that is valid."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    weighted = exact * weights[..., None].to(exact)
    before, after = exact.mean((1, 2)), weighted.mean((1, 2))  # (b,)
    least, most = weights.aminmax(dim=1)
    share = after / before  # a mean of the weights, if the tokens' own means share a sign
    sound = (share > 0) & (least <= share) & (share <= most)
    factor = torch.where(sound, before / after, 1.0)
    return (weighted * factor[:, None, None]).to(states.dtype)


def _ends(prompts: Sequence[Any] | Tensor) -> tuple[Any, Any]:
    """Return the prompts at the first and at the last ends of those that are blends; (prompts, None) without any."""
    if isinstance(prompts, Tensor) or not any(isinstance(prompt, Blend) for prompt in prompts):
        return prompts, None
    both = [prompt if isinstance(prompt, Blend) else Blend(prompt, prompt, 0.0) for prompt in prompts]
    return [blend.first for blend in both], [blend.last for blend in both]


def _weighs(encoder: Any, prompts: Sequence[Any] | Tensor) -> bool:
    """Return whether chunks and weights apply: to texts for a TextEncoder, but not to token ids."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of prompts, not one string ({prompts[:40]!r})")
    weighs = isinstance(encoder, TextEncoder) and not isinstance(prompts, Tensor)
    for prompt in prompts if weighs else ():
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {reprlib.repr(prompt)} is not text, which this model is conditioned on")
    return weighs
