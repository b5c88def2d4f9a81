"""Encode prompts with a BERT-style transformer, as in latent diffusion's own text-to-image model (Rombach et al. 2022,
section 4.3.1); and BERT's tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checks import Count, Entries, Probability, Width, check_file
from ldm.conditioning.tokenizer import without_surrogates
from ldm.models.transformer import Encoder, TransformerWrapper, pool

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# bert-base-uncased: how many tokens its vocab.txt has, and which of them begins, ends and pads a text
BERT_TOKENS, BERT_CLS, BERT_SEP, BERT_PAD = 30522, 101, 102, 0


def read_vocab(path: str | Path) -> list[str]:
    """Read BERT's tokens in the order of their ids from a `vocab.txt`, one per line."""
    path = Path(path)
    check_file(path, "BERT's vocabulary, a vocab.txt,")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"vocabulary {str(path)!r} is not UTF-8 text: give BERT's vocab.txt") from None
    vocab = text.removesuffix("\n").split("\n")  # not splitlines: some tokens are line separators to Unicode
    try:
        _require_special(vocab)
    except ValueError as error:
        raise ValueError(f"vocabulary {str(path)!r} is not BERT's: {error}") from None
    return vocab


def vocabulary_of(texts: Iterable[str]) -> list[str]:
    """Return a vocabulary of BERT's special tokens and the words of texts, which are split as `WordPiece` does."""
    from tokenizers import normalizers, pre_tokenizers

    clean, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    cleaned = [clean.normalize_str(without_surrogates(text)) for text in texts]
    return [*BERT_SPECIAL, *sorted({word for text in cleaned for word, _ in split.pre_tokenize_str(text)})]


class WordPiece:
    """BERT's uncased tokenizer: prompts to token ids (b, max_length), framed by [CLS] and [SEP], then [PAD].

    Text is cleaned of control characters, lowered and stripped of accents, split at white space and punctuation and
    around Chinese characters, and each word split into the longest pieces of the vocabulary (Wu et al. 2016,
    arXiv:1609.08144), or [UNK]. Long prompts are cut. `vocab` has the tokens in the order of their ids (`read_vocab`).
    """

    def __init__(self, vocab: Sequence[str], max_length: int = 77) -> None:
        from tokenizers import BertWordPieceTokenizer

        _require_special(vocab)
        if max_length < 2:
            raise ValueError(f"max_length {max_length} is too short: [CLS] and [SEP] need 2 tokens")
        self.max_length, self.sep = max_length, vocab.index("[SEP]")
        self._pipeline = BertWordPieceTokenizer({token: i for i, token in enumerate(vocab)})
        self._pipeline.enable_truncation(max_length)
        self._pipeline.enable_padding(pad_id=vocab.index("[PAD]"), length=max_length)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of a list of prompts, int64 (b, max_length)."""
        rows = self._pipeline.encode_batch([without_surrogates(prompt) for prompt in prompts])
        return torch.tensor([row.ids for row in rows], dtype=torch.long).view(-1, self.max_length)


class WordPieceEncoder(nn.Module):
    """What encoders of `WordPiece`'s tokens share; a subclass has `encode`.

    Args:
        max_seq_len: tokens per prompt.
        vocab: the tokenizer's tokens (`read_vocab`). None: prompts must be token ids, or empty where vocab_size is that
            of bert-base-uncased, whose ids are known. A stage that trains the encoder gives it the words of its
            captions.
        pooled: also return the `pool` of each prompt's vectors (b, d), padding left out, as "c_adm".
    """

    reads = "caption"  # which part of a data set's sample it encodes

    def __init__(self, vocab_size: int, max_seq_len: int, vocab: Sequence[str] | None, pooled: bool) -> None:
        super().__init__()
        if vocab is not None and len(vocab) != vocab_size:
            raise ValueError(f"the vocabulary has {len(vocab)} tokens and the model {vocab_size}; they must be equal")
        self.vocab_size = vocab_size
        self.max_seq_len, self.pooled = max_seq_len, pooled
        self.pad = BERT_PAD if vocab is None else vocab.index("[PAD]")
        self.tokenizer = None if vocab is None else WordPiece(vocab, max_seq_len)
        self.null = "" if vocab is not None or vocab_size == BERT_TOKENS else None  # the null condition

    def forward(self, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor) -> dict[str, Tensor]:
        """Return {"c_crossattn": encode(prompts)} and, if pooled, "c_adm"."""
        tokens = self.tokens(prompts)
        vectors = self.encode(tokens)
        if not self.pooled:
            return {"c_crossattn": vectors}
        return {"c_crossattn": vectors, "c_adm": pool(vectors, (tokens != self.pad)[:, : vectors.shape[1]])}

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Encode prompts, or their tokens int64 (b, n), as vectors for cross-attention (b, m, d), m <= n."""
        raise NotImplementedError

    def tokens(self, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Return the token ids int64 (b, n) of prompts; given ids are only checked."""
        if isinstance(prompts, str):
            raise ValueError(f"the text encoder takes a list of prompts, not one string ({prompts[:40]!r})")
        if not isinstance(prompts, Tensor) and all(isinstance(prompt, str) for prompt in prompts):
            return self._tokenize(prompts)
        try:
            tokens = torch.as_tensor(prompts)
        except (TypeError, ValueError, RuntimeError):  # torch raises any of them
            raise ValueError("the text encoder takes strings, or rows of token ids of one length") from None
        if tokens.ndim != 2 or tokens.dtype.is_floating_point or tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"token ids of shape {tuple(tokens.shape)} and type {tokens.dtype} do not fit: this model takes "
                f"integers (prompts, tokens), at most {self.max_seq_len} tokens each"
            )
        wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if len(wrong) > 0:
            raise ValueError(f"token id {wrong[0].item()} does not exist: this model has 0 to {self.vocab_size - 1}")
        return tokens.long()

    def _tokenize(self, prompts: Sequence[str]) -> Tensor:
        if self.tokenizer is not None:
            return self.tokenizer(prompts)
        unreadable = next((prompt for prompt in prompts if prompt != self.null), None)
        if unreadable is not None:
            remedy = "give BERT's vocab.txt (ldm.load(..., vocab=FILE), --vocab FILE), or token ids"
            if self.vocab_size != BERT_TOKENS:  # of layouts, say: boxes and kinds of things
                remedy = (
                    f"its {self.vocab_size} tokens are not BERT's {BERT_TOKENS}: give token ids, from Python, by "
                    "model.generate(ids), or a vocabulary of that size (vocab=FILE, --vocab FILE)"
                )
            raise ValueError(
                f"prompt {unreadable[:40]!r} cannot be read: this model's file has no vocabulary; {remedy}"
            )
        row = [BERT_CLS, BERT_SEP, *[BERT_PAD] * (self.max_seq_len - 2)]
        return torch.tensor([row]).expand(len(prompts), -1)


class BERTEncoder(WordPieceEncoder):
    """Tokenizer and BERT-style transformer; parameters `transformer.*`.

    Args:
        n_embed: features d per token.
        n_layer: number of blocks.
        window: tokens that most heads see on one side of a token (`BERTAttention`); None for all, as published.
        vocab_size, max_seq_len, vocab, pooled: of `WordPieceEncoder`.
    """

    def __init__(
        self,
        n_embed: Width,
        n_layer: Count,
        vocab_size: Entries = BERT_TOKENS,
        max_seq_len: Width = 77,
        vocab: Sequence[str] | None = None,
        embedding_dropout: Probability = 0.0,
        pooled: bool = False,
        window: Width | None = None,
    ) -> None:
        super().__init__(vocab_size, max_seq_len, vocab, pooled)
        layers = Encoder(n_embed, n_layer, window)
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, layers, embedding_dropout)
        self.transformer.to_logits.requires_grad_(False)  # not used: several processes expect gradients of all others

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Encode prompts, or their tokens int64 (b, n), as normed embeddings (b, n, d); equal prompts once."""
        tokens, which = torch.unique(self.tokens(prompts), dim=0, return_inverse=True)
        device = self.transformer.token_emb.weight.device
        return self.transformer(tokens.to(device), return_embeddings=True)[which.to(device)]


def _require_special(vocab: Sequence[str]) -> None:
    missing = [token for token in BERT_SPECIAL if token not in vocab]
    if missing:
        raise ValueError(f"its {len(vocab)} tokens lack {', '.join(missing)}")
    if len(set(vocab)) != len(vocab):
        raise ValueError(f"{len(vocab) - len(set(vocab))} of its {len(vocab)} tokens appear twice")
