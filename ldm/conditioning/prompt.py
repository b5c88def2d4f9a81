"""Encode prompts, weighted and long ones too; `prompt_syntax.py` reads brackets and BREAK.

A prompt of more tokens than the encoder's context is cut into chunks of `context_length` - 2 (75 for CLIP), each framed
and padded like a prompt; their hidden states are concatenated. As in AUTOMATIC1111's web UI ("A1111"), a cut within a
phrase moves back to the last comma if that is among the last 20 of 75 tokens (of other lengths: the same share). A
learned word of several tokens is never cut: it begins the next chunk.
"""

import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from einops import rearrange

from ldm.arrays import Tensor, is_tensor
from ldm.batching import Blend, distinct_prompts
from ldm.conditioning.tokenizer import Tokenizer

MAX_CHUNKS = 32
SYNTAX = re.compile(r"[()\[\]\\]|\bBREAK\b")  # a prompt without any of these is plain text


class Chunk(NamedTuple):
    """At most `context_length` - 2 token ids, without start, end or padding, and the weight of each."""

    tokens: list[int]
    weights: list[float]


def cut(tokenizer: Tokenizer, prompt: str, plain: bool = False) -> list[Chunk]:
    """Cut a prompt into chunks, at least one. Each BREAK begins a new one; a BREAK at the end adds none."""
    room = tokenizer.context_length - 2
    (comma,) = tokenizer.encode(",")
    chunks: list[Chunk] = []
    sections: Sequence[Sequence[tuple[str, float]]] = [[(prompt, 1.0)]]
    if not plain and SYNTAX.search(prompt):
        from ldm.conditioning.prompt_syntax import parse_prompt  # only such prompts need it

        sections = parse_prompt(prompt)
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
    """Return the number of chunks of each prompt: 1 for encoders other than CLIP's."""
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
        encoder: a TextEncoder or SizedTextEncoder, or one of `ldm.onnx`; any other conditioner is called as it is,
            without reading syntax.
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
        from ldm.conditioning.prompt_syntax import weigh  # only weights need it

        n = states.shape[1]
        weights = [[1.0, *row.weights, *[1.0] * (n - 1 - len(row.weights))] for row in rows]  # (b k, n)
        states = weigh(states, weights)
    out = {"c_crossattn": rearrange(states, "(b k) n d -> b (k n) d", k=k)}
    if "c_adm" in cond:
        out["c_adm"] = rearrange(cond["c_adm"], "(b k) p -> b k p", k=k)[:, 0]
    return {key: value[which] for key, value in out.items()}


def _ends(prompts: Sequence[Any] | Tensor) -> tuple[Any, Any]:
    """Return the prompts at the first and at the last ends of those that are blends; (prompts, None) without any."""
    if is_tensor(prompts) or not any(isinstance(prompt, Blend) for prompt in prompts):
        return prompts, None
    both = [prompt if isinstance(prompt, Blend) else Blend(prompt, prompt, 0.0) for prompt in prompts]
    return [blend.first for blend in both], [blend.last for blend in both]


def _weighs(encoder: Any, prompts: Sequence[Any] | Tensor) -> bool:
    """Return whether chunks and weights apply: to texts for CLIP's encoder, but not to token ids."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of prompts, not one string ({prompts[:40]!r})")
    weighs = isinstance(getattr(encoder, "tokenizer", None), Tokenizer) and not is_tensor(prompts)
    for prompt in prompts if weighs else ():
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {reprlib.repr(prompt)} is not text, which this model is conditioned on")
    return weighs
