"""Vector quantization: latents -> the nearest entries of a learned codebook (van den Oord et al. 2017,
arXiv:1711.00937), as VQGAN has it (Esser et al. 2021, arXiv:2012.09841, section 3.1)."""

import torch
from einops import rearrange
from torch import Tensor, nn

MAX_DISTANCES = 2**24  # that exist at once: 64 MiB in float32


class VectorQuantizer(nn.Module):
    """A codebook of `n_e` vectors of width `e_dim`, as taming-transformers' VectorQuantizer2.

    `beta` weighs the commitment loss. `legacy` puts it on the codebook loss instead, as the published models were
    trained: an old error, kept so that losses stay comparable.
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
        """z (b, e_dim, h, w) -> (z_q, loss, (None, None, indices)).

        z_q (b, e_dim, h, w) are the nearest entries, with the gradient that belongs to them given to z (straight
        through: van den Oord et al. 2017, section 3.2); loss () is their equation 3 without its first term; indices,
        int64 (b h w), say which entries. The two Nones are where taming has perplexity and one-hot codes.
        """
        tokens = rearrange(z, "b c h w -> (b h w) c")
        indices = self.nearest(tokens)  # (b h w)
        z_q = self.embedding(indices).to(z.dtype)
        z_q = rearrange(z_q, "(b h w) c -> b c h w", h=z.shape[2], w=z.shape[3])
        commitment = (z_q.detach() - z).square().mean()
        codebook = (z_q - z.detach()).square().mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        return z + (z_q - z).detach(), loss, (None, None, indices)

    @torch.no_grad()
    def nearest(self, tokens: Tensor) -> Tensor:
        """The entry with the least distance |token - entry|^2 to each of the tokens (n, e_dim): int64 (n)."""
        wide = torch.promote_types(tokens.dtype, torch.float32)  # 8 or 11 bits cannot tell thousands of entries apart
        codebook = self.embedding.weight.to(wide)  # (n_e, e_dim)
        squares = codebook.square().sum(dim=1)  # (n_e); |token|^2 is the same for all entries, so it is left out
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.cat(
                [
                    torch.addmm(squares, part.to(wide), codebook.T, alpha=-2).argmin(dim=1)
                    for part in tokens.split(max(1, MAX_DISTANCES // self.n_e))
                ]
            )
