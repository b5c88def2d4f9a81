"""Learned words in a model (textual inversion, Gal et al. 2022, https://arxiv.org/abs/2208.01618, section 3).

A learned word is a name and one or several vectors, each in the place of a token's embedding. They are kept beside the
model: the token embedding keeps its weight, its parameters' names and its size, the vocabulary stays, and prompts
without the word are tokenized as before. `ldm.save` writes the model without them; `embedding_files` reads and writes
them.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.changes import Change
from ldm.checkpoint.file import file_hash
from ldm.conditioning.prompt import BREAK
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer
from ldm.finetune.embedding_files import read_words
from ldm.latent_diffusion import LatentDiffusion

WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}  # of their text encoders


class WordTokenizer(Tokenizer):
    """A tokenizer with learned words, whose ids follow the vocabulary's; other text is tokenized as by the base.

    Words are matched anywhere in a prompt, ignoring case; at a word's end that is a letter or digit, only where no
    other letter or digit is next to it.
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
            ids += super().encode(prompt[end : match.start()]) + self.words[self.order[match.lastindex - 1]]
            end = match.end()
        return ids + super().encode(prompt[end:])


def _pattern(word: str) -> str:
    before, after = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
    return f"{before}({re.escape(word)}){after}"


class WordEmbedding(nn.Embedding):
    """A token embedding in which ids from v on are rows of `vectors`, beside the base's own weight (v, d).

    The vectors are not parameters, so that names, sizes and saved files stay the same.
    """

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, _weight=base.weight)
        self.weight = base.weight
        self.vectors: list[Tensor] = []  # (n, d) for each word

    def forward(self, tokens: Tensor) -> Tensor:
        own = super().forward(tokens.clamp(max=self.num_embeddings - 1))  # (b, n) -> (b, n, d)
        rows = torch.cat([vectors.to(own) for vectors in self.vectors])  # (m, d)
        learned = F.embedding((tokens - self.num_embeddings).clamp(min=0), rows)  # (b, n, d)
        return torch.where((tokens >= self.num_embeddings)[..., None], learned, own)


def apply_embedding(model: LatentDiffusion, path: str | Path, word: str | None = None) -> list[str]:
    """Add the words of a file to a loaded model, and return them; `model.changes` and `model.notes` name them.

    word: renames a single one.
    """
    found, before = read_words(path, word), list(model.changes)
    for learned in found:
        try:
            add_word(model, learned.word, learned.vectors)
        except ValueError as error:
            raise ValueError(f"embedding {str(path)!r}: {error}") from None
    words = [learned.word for learned in found]
    model.changes = [*before, Change("words", " ".join(words), file_hash(Path(path)))]  # the file, not each word
    model.notes.append(f"learned words of {path}: {' '.join(words)}")
    return words


class AddedWord(NamedTuple):
    """An entry of `model.changes`: a word without a file, whose vectors may be trained."""

    word: str
    vectors: Tensor

    def current(self) -> Change:
        """Return the change with the hash of the vectors as they are now."""
        digits = hashlib.sha256(self.vectors.detach().float().cpu().numpy().tobytes()).hexdigest()
        return Change("words", self.word, digits[:10])


def add_word(model: LatentDiffusion, word: str, vectors: Tensor) -> None:
    """Add one word to a loaded model. The vectors (n, d) are used without a copy, so that they can be trained."""
    encoder = text_encoder(model)
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
    model.changes.append(AddedWord(word, vectors))


def text_encoder(model: LatentDiffusion) -> TextEncoder:
    """Return the model's text encoder. ValueError if it is not CLIP's."""
    encoder = model.cond_stage_model
    if not isinstance(encoder, TextEncoder):
        kind = "nothing" if encoder is None else type(encoder).__name__
        raise ValueError(f"learned words are for CLIP's text encoders, and this model is conditioned by {kind}")
    return encoder


def token_embedding(encoder: TextEncoder) -> nn.Embedding:
    """Return the text tower's token embedding, in either layout."""
    return _embeddings(encoder).token_embedding


def _embeddings(encoder: TextEncoder) -> Any:
    """Return the module that has the token embedding."""
    tower: Any = encoder.tower
    return tower.text_model.embeddings if encoder.layout == "transformers" else tower


def check_word(encoder: TextEncoder, word: str) -> None:
    """Raise ValueError for a word that prompts cannot contain, or that the text encoder has already."""
    if not word or not word.isprintable() or any(map(str.isspace, word)):
        raise ValueError(f"{word!r} cannot be a learned word: it must be of visible characters, without spaces")
    if set(word) & set("()[]\\") or BREAK.search(word):
        raise ValueError(f"{word!r} cannot be a learned word: brackets, backslashes and BREAK are syntax in prompts")
    if word.lower() in map(str.lower, getattr(encoder.tokenizer, "words", ())):
        raise ValueError(f"{word!r} is already a learned word of this model: rename one of the two")
    ids = encoder.tokenizer.encode(word)
    if len(ids) == 1:
        raise ValueError(
            f"{word!r} is a word that the text encoder has already (token {ids[0]}): choose one that it does not "
            f"have, such as '<{word.strip('<>')}>'"
        )


def initial_vectors(encoder: TextEncoder, text: str, count: int | None = None) -> Tensor:
    """Return the token vectors (count, d) of a text, each repeated in order to make `count` (None: as they are)."""
    ids = encoder.tokenizer.encode(text)
    if not ids or (count is not None and len(ids) > count):
        raise ValueError(f"the initial words {text!r} are {len(ids)} tokens: they must be 1 to the number of vectors")
    count = len(ids) if count is None else count
    spread = torch.tensor([ids[i * len(ids) // count] for i in range(count)])
    weight = token_embedding(encoder).weight
    return weight.detach()[spread.to(weight.device)].float()


def deviation(encoder: TextEncoder) -> float:
    """Return the standard deviation of the text encoder's token embedding: the scale on which vectors differ."""
    return float(token_embedding(encoder).weight.detach().float().std())


def _width(width: int) -> str:
    return f"{width} numbers each" + (f" (as {WIDTHS[width]}'s)" if width in WIDTHS else "")
