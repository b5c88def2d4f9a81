"""Vector quantization: latents -> the nearest entries of a learned codebook (van den Oord et al. 2017,
arXiv:1711.00937), as VQGAN has it (Esser et al. 2021, arXiv:2012.09841, section 3.1)."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

MAX_DISTANCES = 2**24  # computed at a time: 64 MiB in float32


class VectorQuantizer(nn.Module):
    """A codebook of `n_e` vectors of width `e_dim`, as taming-transformers' VectorQuantizer2.

    Args:
        beta: weight of the commitment loss.
        legacy: weight the codebook loss by beta instead, as the published models were trained: an old error, kept so
            that losses stay comparable.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Return the nearest entries of latents z (b, e_dim, h, w), the loss (), and (None, None, indices).

        The gradient of the entries goes to z (straight through: van den Oord et al. 2017, section 3.2); the loss is
        their equation 3 without its first term; the indices are int64 (b h w); taming has perplexity and one-hot codes
        in the place of None.
        """
        tokens = rearrange(z, "b c h w -> (b h w) c")
        indices = self.nearest(tokens)  # (b h w)
        z_q = self.embedding(indices).to(z.dtype)
        z_q = rearrange(z_q, "(b h w) c -> b c h w", h=z.shape[2], w=z.shape[3])
        commitment = (z_q.detach() - z).square().mean()
        codebook = (z_q - z.detach()).square().mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return z + (z_q - z).detach(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the entries of indices: (b, h, w) -> (b, e_dim, h, w), and flat ones (n) -> (n, e_dim).

        shape: (b, h, w, e_dim) of flat indices (b h w).
        """
        entries = self.embedding(indices if shape is None else indices.reshape(tuple(shape)[:-1]))
        return rearrange(entries, "b h w c -> b c h w") if entries.ndim == 4 else entries

    @torch.no_grad()
    def nearest(self, tokens: Tensor) -> Tensor:
        """Return the index of the entry nearest to each of the tokens (n, e_dim): int64 (n)."""
        wide = torch.promote_types(tokens.dtype, torch.float32)  # 8 or 11 bits do not separate thousands of entries
        codebook = self.embedding.weight.to(wide)  # (n_e, e_dim)
        squares = codebook.square().sum(dim=1)  # (n_e); |token|^2 is the same for all entries
        with torch.autocast(tokens.device.type, enabled=False):
            parts = tokens.split(max(1, MAX_DISTANCES // self.n_e))
            return torch.cat([torch.addmm(squares, p.to(wide), codebook.T, alpha=-2).argmin(dim=1) for p in parts])
