"""Learned words in a model (textual inversion, Gal et al. 2022, https://arxiv.org/abs/2208.01618, section 3).

A learned word is a name and one or several vectors, each in the place of a token's embedding. They are kept beside the
model: the token embedding keeps its weight, its parameters' names and its size, the vocabulary stays, and prompts
without the word are tokenized as before. `ldm.save` writes the model without them; `embedding_files` reads and writes
them.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.changes import Change
from ldm.checkpoint.file import file_hash
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.words import check_word, learn, token_embedding
from ldm.finetune.embedding_files import read_words
from ldm.latent_diffusion import LatentDiffusion


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
    called = [f" (inside it is called {learned.inside!r})" for learned in found if learned.inside is not None]
    model.notes.append(f"learned words of {path}: {' '.join(words)}{''.join(called)}")
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
    same = encoder.tokenizer.encode(word)
    word = learn(encoder, word, vectors)
    if len(same) == 1:
        model.notes.append(f"{word!r} is a token of the vocabulary ({same[0]}) too: it now means the learned word")
    model.changes.append(AddedWord(word, vectors))


def text_encoder(model: LatentDiffusion) -> TextEncoder:
    """Return the model's text encoder. ValueError if it is not CLIP's."""
    encoder = model.cond_stage_model
    if not isinstance(encoder, TextEncoder):
        kind = "nothing" if encoder is None else type(encoder).__name__
        raise ValueError(f"learned words are for CLIP's text encoders, and this model is conditioned by {kind}")
    return encoder


def check_new_word(encoder: TextEncoder, word: str) -> None:
    """Raise ValueError for a word that is not to be trained: one that the text encoder has, or cannot be in prompts."""
    check_word(encoder, word)
    if any(map(str.isspace, word)) or set(word) & set("()[]\\"):
        raise ValueError(f"{word!r} cannot be a new word: spaces, brackets and backslashes are syntax in prompts")
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
