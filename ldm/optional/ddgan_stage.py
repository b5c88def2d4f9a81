"""Denoising diffusion GAN: a generator of single denoising steps against a judge of them (Xiao et al. 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ldm.diffusion.posterior import q_pair, q_posterior
from ldm.models.discriminator import vanilla_d_loss
from ldm.optional.ddgan import Discriminator, r1_penalty
from ldm.optional.denoising_gan import DenoisingGAN
from ldm.training.pixel_diffusion import PixelDiffusionStage
from ldm.training.stage import adamw
from ldm.util import call_with


class Steps(NamedTuple):
    """Of a batch: x0 (b, c, h, w), the generator's x0', true and drawn x_{t-1}, x_t, t (b,), classes (b,) or None."""

    x0: Tensor
    generated: Tensor
    true: Tensor
    drawn: Tensor
    x: Tensor
    t: Tensor
    y: Tensor | None


class DenoisingGANStage(PixelDiffusionStage):
    """True steps (x_{t-1}, x_t) of the forward chain against drawn ones, x_{t-1} ~ q(. | x_t, G(x_t, t, z)).

    Both losses are of the non-saturating GAN, in softplus (eq. 4 and 5), with an R1 penalty on the true x_{t-1}
    (Mescheder et al. 2018) in every `r1_every`-th batch alone, as in the paper's code. The generator may also be held
    to x0 itself, by |x0' - x0|^2 (by an L1 in Phung et al. 2023): short runs show readable digits with it, while the
    discriminator is still learning to see through the noise of its pairs.

    Args:
        model: `{"target", "params"}` of a `DenoisingGAN`.
        discriminator: arguments of `Discriminator`.
        learning_rate, discriminator_rate: of AdamW, without weight decay, for the two networks. betas: for both.
        r1_weight: gamma; half of it multiplies the penalty.
        reconstruction: weight of |x0' - x0|^2, a mean over pixels; 0 is the paper's loss.
        class_dropout, previews, preview_columns: as there.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        discriminator: Mapping[str, Any],
        learning_rate: float,
        discriminator_rate: float,
        class_dropout: float = 0.1,
        betas: Sequence[float] = (0.5, 0.9),
        r1_weight: float = 0.05,
        r1_every: int = 15,
        reconstruction: float = 0.0,
        previews: int = 20,
        preview_columns: int = 10,
    ) -> None:
        if r1_every < 1 or r1_weight < 0 or reconstruction < 0:
            raise ValueError(
                f"r1_every {r1_every} must be at least 1, r1_weight {r1_weight} and reconstruction {reconstruction} "
                "at least 0"
            )
        super().__init__(
            model, learning_rate, class_dropout, betas=betas, previews=previews, preview_columns=preview_columns
        )
        self.discriminator = call_with("discriminator", Discriminator, discriminator)
        self.rates = (learning_rate, discriminator_rate)
        self.r1_weight, self.r1_every, self.reconstruction = r1_weight, r1_every, reconstruction
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # saved: a resumed run knows R1's turn
        self._check_discriminator()

    def _check(self) -> None:
        if not isinstance(self.latent_diffusion, DenoisingGAN):
            raise ValueError(f"{self.latent_diffusion.target} draws no x0 by a latent: use {DenoisingGAN.target}")
        super()._check()

    def _check_discriminator(self) -> None:
        """As `_check`, which is of the generator."""
        whole = self.latent_diffusion
        x = torch.zeros(1, *whole.latent_size(whole.defaults["height"], whole.defaults["width"]))
        try:
            with torch.no_grad():
                self.discriminator(x, x, torch.zeros(1), y=self.dummy_conditioning().get("c_adm"))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"the discriminator does not fit {tuple(x.shape[1:])} or its classes: {error}") from None

    def optimizers(self) -> list[Optimizer]:
        networks = zip((self.model, self.discriminator), self.rates, strict=True)
        return [adamw(n.parameters(), rate, betas=self.betas, weight_decay=0.0) for n, rate in networks]

    def forward(self, batch: Mapping[str, Any], k: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        if k == 0:
            self.steps = self._steps(batch)  # the discriminator's turn, which follows, judges the same ones
            return self._generator_loss(self.steps)
        return self._discriminator_loss(self.steps)

    def _steps(self, batch: Mapping[str, Any]) -> Steps:
        """True and drawn steps at random t."""
        whole = self.latent_diffusion
        with torch.no_grad():
            x0, cond = self.data(batch)
        t = self.objective.sample_timesteps(x0)
        true, x = q_pair(x0, t, torch.randn_like(x0), torch.randn_like(x0), whole.schedule)
        generated = whole.apply_model(x, t, cond).float()
        mean, variance = q_posterior(generated, x, t, whole.schedule)
        drawn = mean + variance.sqrt() * torch.randn_like(x0)
        return Steps(x0, generated, true, drawn, x, t, cond.get("c_adm"))

    def _generator_loss(self, steps: Steps) -> tuple[Tensor, dict[str, Tensor]]:
        self.discriminator.requires_grad_(False)
        loss = F.softplus(-self.discriminator(steps.drawn, steps.x, steps.t, y=steps.y).float()).mean()
        self.discriminator.requires_grad_(True)
        metrics = {"generator": loss}
        if self.reconstruction > 0:
            metrics["reconstruction"] = F.mse_loss(steps.generated, steps.x0)
            loss = loss + self.reconstruction * metrics["reconstruction"]
        return loss, metrics

    def _discriminator_loss(self, steps: Steps) -> tuple[Tensor, dict[str, Tensor]]:
        penalised = self.batches % self.r1_every == 0
        self.batches += 1
        true = steps.true.requires_grad_(bool(penalised))
        real = self.discriminator(true, steps.x, steps.t, y=steps.y).float()
        drawn = self.discriminator(steps.drawn.detach(), steps.x, steps.t, y=steps.y).float()
        loss = 2 * vanilla_d_loss(real, drawn)
        metrics = {"discriminator": loss}
        if penalised:
            metrics["r1"] = r1_penalty(real, true).mean()
            loss = loss + self.r1_weight / 2 * metrics["r1"]
        return loss, metrics
