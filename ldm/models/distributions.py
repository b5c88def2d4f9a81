"""Gaussians with a diagonal covariance, the posterior of the autoencoder (Kingma & Welling 2014)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """N(mean, diag(var)). Everything is computed in float32 or wider.

    Args:
        parameters: (b, 2c, h, w), the means, then the log variances, which are clamped to [-30, 20].
        deterministic: no variance: samples are the mean, and `kl` and `nll` are zero.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dtype in (torch.float16, torch.bfloat16):
            parameters = parameters.float()
        self.mean, logvar = parameters.chunk(2, dim=1)  # each (b, c, h, w)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, noise: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return mean + std * noise (b, c, h, w), the noise from the generator and on its device, if there is one.

        noise: what makes it of the mean, instead.
        """
        if noise is not None:
            return self.mean + self.std * noise(self.mean)
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """Return the mean (b, c, h, w)."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Return KL(self || other), other being the standard normal by default, in nats, summed per image: (b,)."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        mean, var, logvar = (0.0, 1.0, 0.0) if other is None else (other.mean, other.var, other.logvar)
        terms = 0.5 * ((self.mean - mean) ** 2 / var + self.var / var - 1.0 - self.logvar + logvar)
        return terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return -log p(sample) in nats, summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
