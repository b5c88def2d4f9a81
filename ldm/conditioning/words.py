"""Learned words in CLIP's text encoder: names whose vectors stand in the places of tokens' embeddings.

Prompts without such a word are tokenized as before, and the encoder's parameters keep their names and sizes.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.conditioning.prompt import cut
from ldm.conditioning.prompt_syntax import BREAK
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer

WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}  # of their text encoders


ACCENTS = "\u0300-\u036f"  # letters of their own in the decomposed form


class WordTokenizer(Tokenizer):
    """A tokenizer with learned words, whose ids follow the vocabulary's; other text is tokenized as by the base.

    Words are matched anywhere in a prompt, ignoring case, and before tokens; at a word's end that is a letter or digit,
    only where no other letter or digit is next to it. A space matches any white space.
    """

    def __init__(self, base: Tokenizer) -> None:
        vars(self).update(vars(base))  # its merges, its sizes and its pipeline, which takes a while to build
        self.words: dict[str, list[int]] = {}

    def add(self, word: str, count: int) -> None:
        """Add a word of `count` tokens."""
        first = self.vocab_size + sum(map(len, self.words.values()))
        self.words[word] = list(range(first, first + count))
        self.order = sorted(self.words, key=len, reverse=True)  # the longest match first
        self.found = re.compile("|".join(map(_pattern, self.order)), re.IGNORECASE)

    def divides(self, tokens: Sequence[int], at: int) -> bool:
        """Return whether a cut at this position would divide a learned word."""
        firsts = {ids[0] for ids in self.words.values()}
        return tokens[at] == tokens[at - 1] + 1 and tokens[at] > self.vocab_size and tokens[at] not in firsts

    def encode(self, prompt: str) -> list[int]:
        ids, end = [], 0
        for match in self.found.finditer(prompt):
            assert match.lastindex is not None  # each word is a group
            ids += super().encode(prompt[end : match.start()]) + self.words[self.order[match.lastindex - 1]]
            end = match.end()
        return ids + super().encode(prompt[end:])

    def name(self, token: int) -> str:
        """Return the name of a token; that of a learned word for its first one."""
        for word, ids in self.words.items():
            if token in ids:
                return f"{word}</w>" if token == ids[0] else ""
        return super().name(token)


def _pattern(word: str) -> str:
    before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (rf"(?![\w{ACCENTS}])" if word[-1].isalnum() else "")
    forms = {unicodedata.normalize(form, word): None for form in ("NFC", "NFD")}  # macOS's file names are in the second
    text = "|".join(r"\s+".join(map(re.escape, form.split())) for form in forms)
    return f"{before}({text}){after}"


class WordEmbedding(nn.Embedding):
    """A token embedding in which ids from v on are rows of `vectors`, beside the base's own weight (v, d).

    The vectors are not parameters, so that names, sizes and saved files stay the same.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, _weight=base.weight)
        self.weight = base.weight
        self.vectors: list[Tensor] = []  # (n, d) for each word

    def forward(self, input: Tensor) -> Tensor:
        own = super().forward(input.clamp(max=self.num_embeddings - 1))  # (b, n) -> (b, n, d)
        rows = torch.cat([vectors.to(own) for vectors in self.vectors])  # (m, d)
        learned = F.embedding((input - self.num_embeddings).clamp(min=0), rows)  # (b, n, d)
        return torch.where((input >= self.num_embeddings)[..., None], learned, own)


def learn(encoder: TextEncoder, word: str, vectors: Tensor) -> str:
    """Add a word with its vectors (n, d), which are used without a copy; return it in Unicode's composed form (NFC)."""
    word = unicodedata.normalize("NFC", word)
    check_word(encoder, word)
    width, room = token_embedding(encoder).embedding_dim, encoder.tokenizer.context_length - 2
    if vectors.shape[-1] != width:
        raise ValueError(
            f"the vectors of {word!r} have {_width(vectors.shape[-1])}, and this model's text encoder "
            f"takes {_width(width)}: the word was learned with another text encoder"
        )
    if len(vectors) > room:
        raise ValueError(f"{word!r} has {len(vectors)} vectors, and a prompt of this model has room for {room} tokens")
    parent = _embeddings(encoder)
    if not isinstance(encoder.tokenizer, WordTokenizer):
        encoder.tokenizer = WordTokenizer(encoder.tokenizer)
        parent.token_embedding = WordEmbedding(parent.token_embedding)
    encoder.tokenizer.add(word, len(vectors))
    parent.token_embedding.vectors.append(vectors)
    return word


def unused_words(tokenizer: WordTokenizer, prompts: Sequence[str], plain: bool = False) -> list[str]:
    """Return the learned words that none of the prompts contains; plain: brackets are text."""
    used = {token for prompt in prompts for chunk in cut(tokenizer, prompt, plain) for token in chunk.tokens}
    return [word for word, ids in tokenizer.words.items() if ids[0] not in used]


def token_embedding(encoder: TextEncoder) -> nn.Embedding:
    """Return the text tower's token embedding, in either layout."""
    return _embeddings(encoder).token_embedding


def _embeddings(encoder: TextEncoder) -> Any:
    """Return the module that has the token embedding."""
    tower: Any = encoder.tower
    return tower.text_model.embeddings if encoder.layout == "transformers" else tower


def check_word(encoder: TextEncoder, word: str) -> None:
    """Raise ValueError for a word that prompts cannot contain, or that was learned already.

    In prompts, brackets and backslashes of a word have a backslash before them.
    """
    if not word.strip() or word != word.strip() or not word.isprintable() or BREAK.search(word):
        raise ValueError(f"{word!r} cannot be a learned word: it must be of visible characters, and without BREAK")
    if word.lower() in map(str.lower, getattr(encoder.tokenizer, "words", ())):
        raise ValueError(f"{word!r} is already a learned word of this model: rename one of the two (FILE=WORD)")


def _width(width: int) -> str:
    return f"{width} numbers each" + (f" (as {WIDTHS[width]}'s)" if width in WIDTHS else "")
