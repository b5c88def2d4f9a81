"""Encode prompts by a sum of one vector per word: the baseline that knows their words and not the order of these."""

from collections.abc import Sequence

from torch import Tensor, nn

from ldm.checks import Entries, Width
from ldm.conditioning.bert import BERT_TOKENS, WordPieceEncoder
from ldm.models.transformer import FIRST_NORM


class WordSum(WordPieceEncoder):
    """Tokenizer and the sum of its tokens' embeddings, normed: what binds a colour to a thing is lost.

    Args:
        n_embed: features d.
        vocab_size, max_seq_len, vocab, pooled: of `WordPieceEncoder`.
    """

    def __init__(
        self,
        n_embed: Width,
        vocab_size: Entries = BERT_TOKENS,
        max_seq_len: Width = 77,
        vocab: Sequence[str] | None = None,
        pooled: bool = False,
    ) -> None:
        super().__init__(vocab_size, max_seq_len, vocab, pooled)
        self.token_emb = nn.Embedding(vocab_size, n_embed, padding_idx=self.pad)  # a zero, which does not train
        self.norm = nn.LayerNorm(n_embed)
        nn.init.constant_(self.norm.weight, FIRST_NORM)

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Encode prompts, or their tokens int64 (b, n), as one vector each, (b, 1, d)."""
        tokens = self.tokens(prompts).to(self.token_emb.weight.device).sort(dim=1).values  # sums in one order
        return self.norm(self.token_emb(tokens).sum(dim=1, keepdim=True))
