"""The words of a prompt in the conditioning that cross-attention reads, and how those of two prompts correspond."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.conditioning.bert import WordPiece
from ldm.conditioning.prompt import cut
from ldm.conditioning.prompt_syntax import parse_prompt
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer
from ldm.settings import INT, Setting

POSITIVE = Setting(INT, "", low=1)
WORD = re.compile(r"<\S+>|\w+|[^\w\s]")  # learned words are often in angle brackets


class Word(NamedTuple):
    text: str
    places: list[int]  # of its tokens among those of the conditioning


class Words:
    """The words of one prompt, and where they are in its conditioning.

    `texts` are the distinct words without punctuation, and `size` is the number of the conditioning's tokens. What the
    text encoder does not read is left out.

    Args:
        model: a LatentDiffusion whose prompts are texts.
        plain: take brackets as words, not as weights; CompVis's code always does.
    """

    def __init__(self, model: Any, prompt: str, plain: bool = False) -> None:
        encoder = model.cond_stage_model
        if getattr(encoder, "tokenizer", None) is None:
            kind = "nothing" if encoder is None else type(encoder).__name__
            raise ValueError(f"attention to words needs a model with a tokenizer: this one's condition is {kind}")
        if not isinstance(prompt, str):
            raise ValueError(f"attention to words needs a prompt that is text, got {prompt!r}")
        self.prompt, self.tokens, at = prompt, _tokens(encoder, prompt, plain), 0
        weighed = isinstance(encoder, TextEncoder) and not plain
        pieces = [piece for section in parse_prompt(prompt) for piece in section] if weighed else []
        text = " ".join(piece.text for piece in pieces) if weighed else prompt
        around = set(_tokens(encoder, "", True))  # start, end and padding
        self.found: list[Word] = []
        for match in WORD.findall(text):
            own = [i for i in _tokens(encoder, match, True) if i not in around]
            starts = (i for i in range(at, len(self.tokens)) if own and self.tokens[i : i + len(own)] == own)
            if (start := next(starts, None)) is not None:
                at = start + len(own)
                self.found.append(Word(match, list(range(start, at))))
        written = [word.text for word in self.found if word.text[-1].isalnum() or len(word.text) > 1]
        self.texts, self.size = list(dict.fromkeys(written)), len(self.tokens)

    def find(self, text: str) -> list[int]:
        """Return the places of a word's tokens, or of those of several words in a row, wherever they stand."""
        if not isinstance(text, str):
            raise ValueError(f"a word of the prompt must be text, got {text!r}")
        asked, words = [part.lower() for part in WORD.findall(text)], [word.text.lower() for word in self.found]
        starts = [i for i in range(len(words)) if asked and words[i : i + len(asked)] == asked]
        return [place for i in starts for word in self.found[i : i + len(asked)] for place in word.places]

    def places(self, text: str) -> list[int]:
        """Return what `find` does. ValueError where the prompt has no such word."""
        if not (found := self.find(text)):
            raise ValueError(
                f"the prompt {self.prompt!r} has no word {text!r}; it has {', '.join(self.texts) or 'none'}"
            )
        return found

    def mask(self, texts: Sequence[str]) -> Tensor:
        """Return True at the places of these words, (size,)."""
        found = torch.zeros(self.size, dtype=torch.bool)
        for text in texts:
            found[self.places(text)] = True
        return found

    def items(self) -> list[tuple[Any, list[int]]]:
        """Return all that the conditioning has, in order: words, and the tokens around them, each with its places."""
        starts, at = {word.places[0]: word for word in self.found}, 0
        found: list[tuple[Any, list[int]]] = []
        while at < self.size:
            word = starts.get(at)
            found.append((self.tokens[at], [at]) if word is None else (word.text.lower(), word.places))
            at += len(found[-1][1])
        return found


def alignment(source: Words, target: Words) -> tuple[Tensor, Tensor]:
    """Return how the attention to the source's tokens moves to the target's, and which of these have none of it.

    Words that both have keep theirs; a word in another's place gets that one's, spread evenly over its tokens (Hertz et
    al. 2022, section 3.2, "word swap"); a word that is added has none ("adding a new phrase").

    Returns:
        (n, m), where n are the source's tokens and m the target's; and True for tokens that are added, (m,).
    """
    first, last = source.items(), target.items()
    moved = torch.zeros(source.size, target.size)
    names = ([name for name, _ in first], [name for name, _ in last])
    for kind, a, b, c, d in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        old, new = [places for _, places in first[a:b]], [places for _, places in last[c:d]]
        if len(old) != len(new):  # several words in the place of one, say
            old, new = [sum(old, [])], [sum(new, [])]
        for these, those in zip(old, new, strict=True) if kind in ("equal", "replace") else ():
            even = (
                torch.eye(len(these)) if len(these) == len(those) else torch.ones(len(these), len(those)) / len(those)
            )
            moved[torch.tensor(these)[:, None], torch.tensor(those)] = even
    return moved, ~moved.any(0)


def _tokens(encoder: Any, text: str, plain: bool) -> list[int]:
    """Return the ids of a text's tokens as the encoder reads them, framed and padded."""
    tokenizer = encoder.tokenizer
    if isinstance(encoder, TextEncoder):
        return tokenizer.frame([chunk.tokens for chunk in cut(tokenizer, text, plain)]).flatten().tolist()
    if isinstance(tokenizer, Tokenizer | WordPiece):
        return tokenizer([text])[0].tolist()
    length = {"max_length": encoder.max_length, "truncation": True, "padding": "max_length"}  # transformers' own
    return tokenizer(text, **length)["input_ids"]
