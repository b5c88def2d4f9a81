"""CLIP's byte-pair tokenizer, with all of its 49,408 tokens or a reduced vocabulary that is saved with a model.

A prompt is cleaned, split into words, and every word is written as bytes and merged pair by pair, lowest rank first
(Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019, GPT-2; this vocabulary: Radford et al. 2021,
arXiv:2103.00020). The merging is done by the `tokenizers` library.

Token ids: 256 bytes, the same 256 as ends of words, one token per merge, start of text, end of text (the highest id).
"""

import gzip
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.arrays import Tensor
from ldm.checks import shorten

NUM_CLIP_MERGES = 48_894  # 49,408 tokens less 2 x 256 bytes, start and end; the rest of the file is not used
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_SPECIAL = {"clip": ("<|startoftext|>", "<|endoftext|>"), "openclip": ("<start_of_text>", "<end_of_text>")}
# Text in which ftfy and html.unescape find nothing to do: printable ASCII without "&", and white space that ftfy keeps.
PLAIN_TEXT = re.compile(r"[ -%'-~\t\n\r\f]*")


class Tokenizer:
    """Convert prompts to token ids (b, context_length), framed by start and end of text.

    `pipeline` is the `tokenizers.Tokenizer` behind it: token names by id, merging of single words.

    Args:
        merges: the byte pairs in order of rank, each "left right", as `reduce` returns them; None reads CLIP's own list
            from open_clip's installed package, which is neither imported nor downloaded.
        context_length: tokens per prompt; longer prompts are cut, the end of text stays.
        cleaning: "clip" cleans text as transformers' CLIPTokenizer (Stable Diffusion 1): Unicode NFC, white space,
            lower case character by character. "openclip" cleans it as open_clip (Stable Diffusion 2): ftfy, HTML
            entities twice, white space, Python's lower case.
        pad: token id after the end of text, or "eos" for the end of text itself. None: what Stable Diffusion was
            trained with, "eos" for "clip" and 0 for "openclip".
    """

    def __init__(
        self,
        merges: Sequence[str] | None = None,
        context_length: int = 77,
        cleaning: str = "clip",
        pad: int | str | None = None,
    ):
        if cleaning not in CLIP_SPECIAL:
            raise ValueError(f"tokenizer cleaning {cleaning!r} is unknown; it is one of {', '.join(CLIP_SPECIAL)}")
        if context_length < 3:
            raise ValueError(f"context_length {context_length} is too short: start, end and a text take 3 tokens")
        self.merges = clip_merges() if merges is None else tuple(merges)
        self.context_length = context_length
        self.cleaning = cleaning
        self.vocab_size = 512 + len(self.merges) + 2
        self.sot, self.eos = self.vocab_size - 2, self.vocab_size - 1
        if pad is None:
            pad = "eos" if cleaning == "clip" else 0
        self.pad = self.eos if pad == "eos" else pad
        if not isinstance(self.pad, int) or not 0 <= self.pad < self.vocab_size:
            raise ValueError(f"tokenizer pad {pad!r} must be 'eos' or a token id below {self.vocab_size}")
        if strange := [m for m in self.merges if not isinstance(m, str) or m.count(" ") != 1]:
            raise ValueError(f"the tokenizer's merge {shorten(repr(strange[0]))} is not two parts with a space between")
        self.pipeline = _pipeline(self.merges, cleaning)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of a list of prompts, int64 (b, context_length)."""
        if isinstance(prompts, str):
            raise ValueError(f"the tokenizer takes a list of prompts, not one string ({prompts[:40]!r})")
        import torch  # a model without torch frames tokens itself

        return torch.from_numpy(self.frame([self.encode(prompt)[: self.context_length - 2] for prompt in prompts]))

    def frame(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Add start, end and padding to ids, at most context_length - 2 each: int64 (b, context_length)."""
        rows = np.full((len(texts), self.context_length), self.pad)
        for row, ids in zip(rows, texts, strict=True):
            row[: len(ids) + 2] = [self.sot, *ids, self.eos]
        return rows

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of one prompt, of any length, without start, end or padding."""
        prompt = without_surrogates(prompt)
        if self.cleaning == "clip":
            return self.pipeline.encode(prompt, add_special_tokens=False).ids
        prompt = openclip_clean(prompt)
        special = dict(zip(CLIP_SPECIAL["openclip"], (self.sot, self.eos), strict=True))
        if not any(name in prompt for name in special):
            return self.pipeline.encode(prompt, add_special_tokens=False).ids
        # In open_clip the name of a special token is that token only where the word pattern isolates it.
        words = [prompt[slice(*span)] for _, span in self.pipeline.pre_tokenizer.pre_tokenize_str(prompt)]
        return [i for word in words for i in ([special[word]] if word in special else self.pipeline.encode(word).ids)]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Return the text of one prompt's token ids, up to the end of text: in lower case, single spaces between."""
        from tokenizers import decoders

        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        names = [self.name(i) for i in ids if i != self.sot]
        return decoders.ByteLevel().decode(names).replace("</w>", " ").strip()

    def name(self, token: int) -> str:
        """Return the name of a token, as byte-pair encoding writes it. ValueError where there is none."""
        name = self.pipeline.id_to_token(token) if token >= 0 else None
        if name is None:
            raise ValueError(f"token {token} does not exist: this vocabulary has 0 to {self.vocab_size - 1}")
        return name

    def divides(self, tokens: Sequence[int], at: int) -> bool:
        """Return whether a cut before tokens[at] would divide a learned word; CLIP's own tokens have none."""
        return False


def reduce(texts: Iterable[str], merges_first: int = 0, cleaning: str = "clip") -> list[str]:
    """Reduce CLIP's merges to those that a small model needs: `Tokenizer(merges=reduce(...))`.

    All bytes stay in the vocabulary, so that any other prompt still tokenizes, into shorter pieces.

    Args:
        texts: prompts whose tokens must be those of the full vocabulary. Every merge behind one of these tokens is
            kept; the dropped merges were never chosen for those words.
        merges_first: how many of CLIP's first merges to keep as well, for other prompts.

    Returns:
        Merges "left right" in CLIP's order.
    """
    full = Tokenizer(cleaning=cleaning)
    parts = dict(zip(("".join(merge.split(" ")) for merge in full.merges), full.merges, strict=True))
    rank = {merge: i for i, merge in enumerate(full.merges)}
    if not 0 <= merges_first <= len(full.merges):
        raise ValueError(f"merges_first {merges_first} must be between 0 and {len(full.merges)}")
    kept = set(range(merges_first))
    ids = {i for text in dict.fromkeys(texts) for i in full.encode(text) if i < full.sot}
    pending = [full.pipeline.id_to_token(i) for i in ids]
    while pending:
        merge = parts.get(pending.pop())  # None: a byte
        if merge is not None and rank[merge] not in kept:
            kept.add(rank[merge])
            pending.extend(merge.split(" "))
    return [full.merges[i] for i in sorted(kept)]


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which have no bytes, by U+FFFD, as ftfy does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def openclip_clean(text: str) -> str:
    """Clean text as open_clip does: ftfy, HTML entities twice, single spaces, lower case."""
    if PLAIN_TEXT.fullmatch(text) is None:
        import html  # both imported only for text that they can change: ftfy costs 70 ms

        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=1)
def clip_merges() -> tuple[str, ...]:
    """Read CLIP's 48,894 merges from the file in open_clip's installed package."""
    spec = importlib.util.find_spec("open_clip")  # finds the folder; importing the package would cost seconds
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    for folder in folders:
        path = Path(folder) / VOCABULARY_FILE
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            return tuple(lines[1 : 1 + NUM_CLIP_MERGES])  # the first line is a version
    raise ValueError(f"CLIP's vocabulary, {VOCABULARY_FILE} of the package open_clip_torch, is not installed")


@lru_cache(maxsize=2)  # CLIP's own merges take 80 ms, at every model that is loaded; nothing changes the result
def _pipeline(merges: tuple[str, ...], cleaning: str):
    """Build a `tokenizers.Tokenizer`: clean (only "clip"; "openclip" does it in Python), split words, merge bytes."""
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Pipeline
    from tokenizers.models import BPE

    split: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    names = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character per byte, in CLIP's order
    names += [name + "</w>" for name in names]
    names += ["".join(pair) for pair in split] + list(CLIP_SPECIAL[cleaning])
    vocabulary = {name: i for i, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ValueError("the tokenizer's merges name a token twice; every merge must make a new one")
    try:
        pipeline = Pipeline(BPE(vocab=vocabulary, merges=split, end_of_word_suffix="</w>"))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"the tokenizer's merges are not a byte-pair list: {shorten(str(error))}") from error
    special = "|".join(re.escape(name) for name in CLIP_SPECIAL[cleaning])
    if cleaning == "clip":
        pipeline.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        pipeline.add_special_tokens(
            [AddedToken(name, normalized=False, special=True) for name in CLIP_SPECIAL[cleaning]]
        )
        words = special + "|" + WORDS
    else:
        # open_clip ignores case after lower(): of all its pattern only s has another lower-case form, the long s
        words = special.replace("s", "[sſ]", 1) + "|" + WORDS.replace("'s", "'[sſ]", 1)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            # transformers lets GPT-2's pattern split again, which shows only in a special token written in capitals
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cleaning == "clip"),
        ]
    )
    return pipeline
