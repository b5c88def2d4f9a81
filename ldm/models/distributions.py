"""Gaussians with a diagonal covariance, the posterior of the autoencoder (Kingma & Welling 2014), and single points."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AbstractDistribution:
    """What can be drawn from, and has a most likely value."""

    def sample(self) -> Any:
        raise NotImplementedError

    def mode(self) -> Any:
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """One value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def sample(self) -> Any:
        return self.value

    mode = sample


class DiagonalGaussianDistribution(AbstractDistribution):
    """N(mean, diag(var)) from `parameters` (b, 2c, h, w), which hold the means and the log variances, in that order.

    Everything is computed in float32 or wider. Log variances are clamped to [-30, 20]. A `deterministic`
    distribution has no variance: its samples are its mean, and `kl` and `nll` are zero.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if parameters.dtype in (torch.float16, torch.bfloat16):
            parameters = parameters.float()
        self.mean, logvar = parameters.chunk(2, dim=1)  # each (b, c, h, w)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise (b, c, h, w); the noise is drawn on the generator's device, if there is one."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The mean (b, c, h, w)."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL(self || other), or from the standard normal, in nats, summed per image: (b,)."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is None:
            terms = 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar)
        else:
            terms = normal_kl(self.mean, self.logvar, other.mean, other.logvar)
        return terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-log p(sample) in nats, summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats, element by element, shapes broadcast."""
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))
