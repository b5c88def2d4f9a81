"""Textual inversion's own EmbeddingManager (Gal et al. 2022): learned vectors that replace those of a token.

Our own models learn words by `ldm.finetune.embeddings`. Here a word must already be a token of the encoder, and its
vectors are replaced whenever a prompt is encoded: `encoder.encode(prompts, embedding_manager=manager)`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.writing import save_torch
from ldm.compvis.personalized import per_img_token_list
from ldm.finetune.embedding_files import TABLE, read_table

PROGRESSIVE_SCALE = 2000  # training calls after which progressive words get another vector


class EmbeddingManager(nn.Module):
    """The trainable vectors of some words: `string_to_param_dict[word]` (num_vectors_per_token, d).

    Args:
        embedder: From `ldm.modules.encoders.modules`, with `word_ids(text)` and `token_embedding`.
        placeholder_strings: The words, each a single token.
        initializer_words: Each word starts as the first token of its initializer word, or at random without one. As in
            the original code, CLIP's vector for the first position is added to that token's.
        per_image_tokens: Learn the words of `per_img_token_list` too.
        progressive_words: Use one vector at first, and one more every `PROGRESSIVE_SCALE` calls.
    """

    def __init__(
        self, embedder: Any, placeholder_strings: Sequence[str] | None = None,
        initializer_words: Sequence[str] | None = None, per_image_tokens: bool = False, num_vectors_per_token: int = 1,
        progressive_words: bool = False, shuffle_mode: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if shuffle_mode not in (None, "off"):
            raise ValueError(f"shuffle_mode {shuffle_mode!r} is not supported: leave it out, or off")
        self.embedder = [embedder]  # in a list, so that it is not a submodule
        self.max_vectors_per_token = num_vectors_per_token
        self.progressive_words, self.progressive_counter = progressive_words, 0
        self.string_to_token_dict: dict[str, Tensor] = {}
        self.string_to_param_dict, self.initial_embeddings = nn.ParameterDict(), nn.ParameterDict()
        words = [*(placeholder_strings or ()), *(per_img_token_list if per_image_tokens else ())]
        initial, width = list(initializer_words or ()), embedder.token_embedding.embedding_dim
        for i, word in enumerate(words):
            self.string_to_token_dict[word] = self._token(word)
            vectors = torch.rand(num_vectors_per_token, width)
            if i < len(initial):
                vectors = self._embedded(initial[i]).repeat(num_vectors_per_token, 1)
                self.initial_embeddings[word] = nn.Parameter(vectors.clone(), requires_grad=False)
            self.string_to_param_dict[word] = nn.Parameter(vectors.clone())

    def _token(self, word: str) -> Tensor:
        ids = self.embedder[0].word_ids(word)
        if len(ids) != 1:
            raise ValueError(f"{word!r} cannot be a placeholder: it is {len(ids)} tokens of this encoder, not one")
        return torch.tensor(ids[0])

    @torch.no_grad()
    def _embedded(self, word: str) -> Tensor:
        encoder = self.embedder[0]
        token = torch.tensor([encoder.word_ids(word)[:1]], device=encoder.device)
        clip = getattr(encoder.transformer, "text_model", None)
        return (encoder.token_embedding if clip is None else clip.embeddings)(token)[0, 0]

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace the words' vectors in (b, n, d), for tokens (b, n); what follows a longer word moves back."""
        self.progressive_counter += self.training
        count = 1 + self.progressive_counter // PROGRESSIVE_SCALE if self.progressive_words else None
        words = {int(self.string_to_token_dict[word]): p[:count] for word, p in self.string_to_param_dict.items()}
        rows = []
        for tokens, vectors in zip(tokenized_text.tolist(), embedded_text, strict=True):
            parts = [words[t].to(v) if t in words else v[None] for t, v in zip(tokens, vectors, strict=True)]
            rows.append(torch.cat(parts)[: len(tokens)])  # (n, d)
        return torch.stack(rows)

    def save(self, ckpt_path: str | Path) -> None:
        """Write an `embeddings.pt`, which `ldm.finetune.embedding_files` reads too."""
        save_torch(ckpt_path, {"string_to_token": self.string_to_token_dict, TABLE: self.string_to_param_dict})

    def load(self, ckpt_path: str | Path, full: bool = True) -> None:
        """Replace all words by those of such a file, without running pickled code."""
        table = read_table(Path(ckpt_path))[0]
        self.string_to_token_dict = {word: self._token(word) for word in table}
        weight = self.embedder[0].token_embedding.weight
        vectors = {word: torch.atleast_2d(value).float().to(weight.device) for word, value in table.items()}
        self.string_to_param_dict = nn.ParameterDict({word: nn.Parameter(value) for word, value in vectors.items()})

    def get_embedding_norms_squared(self) -> Tensor:
        return torch.cat(list(self.string_to_param_dict.values())).square().sum(dim=-1)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        return self.string_to_param_dict.parameters()

    def embedding_to_coarse_loss(self) -> Tensor:
        """Return the mean over words of the inner products of their vectors' changes: (n, n)."""
        moved = [self.string_to_param_dict[word] - start for word, start in self.initial_embeddings.items()]
        return torch.stack([step @ step.T for step in moved]).mean(dim=0)
