"""Denoising diffusion GAN: a generator of denoising steps against a discriminator of them (Xiao et al. 2022)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from ldm.checks import Betas, Count, Probability, Rate
from ldm.diffusion.bound import q_posterior
from ldm.latent_diffusion import Conditioning
from ldm.models.discriminator import vanilla_d_loss
from ldm.optional.ddgan import Discriminator, q_pair, r1_penalty
from ldm.optional.denoising_gan import DenoisingGAN
from ldm.training.conditions import try_condition
from ldm.training.optimizers import make_optimizer
from ldm.training.pixel_diffusion import PixelDiffusionStage
from ldm.training.stage import Loss, Stage
from ldm.util import call_with


class Steps(NamedTuple):
    """Pairs of a batch for the discriminator: real and fake x_{t-1}, x_t (b, c, h, w), t (b,), classes (b,) or None."""

    real: Tensor
    fake: Tensor
    x: Tensor
    t: Tensor
    y: Tensor | None


class DenoisingGANStage(PixelDiffusionStage):
    """Trains on steps (x_{t-1}, x_t): real ones of the forward process, and fake ones from q(. | x_t, G(x_t, t, z)).

    Both losses are those of the non-saturating GAN, by softplus (eq. 4 and 5), with an R1 penalty on the real x_{t-1}
    (Mescheder et al. 2018) in every `r1_every`-th batch only, as in the paper's code. The generator can also be trained
    towards x0 itself, by |x0' - x0|^2 (by L1 in Phung et al. 2023): with it short runs give readable digits, while the
    discriminator is still learning to see through the noise of its pairs.

    Args:
        model: `{"target", "params"}` of a `DenoisingGAN`.
        discriminator: arguments of `Discriminator`.
        discriminator_rate: the discriminator's learning rate.
        r1_weight, r1_every: gamma, half of which multiplies the penalty; and in which batches it is added.
        reconstruction: weight of |x0' - x0|^2, a mean over pixels; 0 is the paper's loss.
    """

    masked = False  # the discriminator sees all of an image
    validate = Stage.validate  # there is none: the error of x0 does not say how good a sample of it is

    def __init__(
        self,
        model: Mapping[str, Any],
        discriminator: Mapping[str, Any],
        learning_rate: Rate,
        discriminator_rate: Rate,
        class_dropout: Probability | None = None,
        betas: Betas = (0.5, 0.9),
        r1_weight: float = 0.05,
        r1_every: Count = 15,
        reconstruction: float = 0.0,
        optimizer: str | Mapping[str, Any] = "adamw",
        previews: Count = 20,
        preview_columns: Count = 10,
    ) -> None:
        if r1_every < 1 or r1_weight < 0 or reconstruction < 0:
            raise ValueError(
                f"r1_every {r1_every} must be at least 1, r1_weight {r1_weight} and reconstruction {reconstruction} "
                "at least 0"
            )
        shown: dict[str, Any] = {"previews": previews, "preview_columns": preview_columns}
        super().__init__(
            model, learning_rate, class_dropout, betas=betas, weight_decay=0.0, optimizer=optimizer, **shown
        )
        self.discriminator = call_with("discriminator", Discriminator, discriminator)
        self.networks["discriminator"] = self.discriminator
        self.rates = (learning_rate, discriminator_rate)
        self.r1_weight, self.r1_every, self.reconstruction = r1_weight, r1_every, reconstruction
        self._check_discriminator()

    def _check(self) -> None:
        if not isinstance(self.latent_diffusion, DenoisingGAN):
            raise ValueError(f"{self.latent_diffusion.target} has no latent generator: use {DenoisingGAN.target}")
        # cross-attention is where the generator's latent goes
        if "c_crossattn" in try_condition(self.latent_diffusion, self.preview_prompts):
            raise ValueError("a generator embeds the classes itself: use ldm.conditioning.classes.ClassLabels")
        super()._check()

    def _check_discriminator(self) -> None:
        """Raise ValueError if the discriminator does not fit the images or classes."""
        model = self.latent_diffusion
        x = torch.zeros(1, *model.latent_size(model.defaults["height"], model.defaults["width"]))
        y = try_condition(model, self.preview_prompts).get("c_adm")
        try:
            with torch.no_grad():
                self.discriminator(x, x, torch.zeros(1), y=y)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"the discriminator does not fit {tuple(x.shape[1:])} or its classes: {error}") from None

    def optimizers(self) -> list[Optimizer]:
        networks = zip(self.networks.values(), self.rates, strict=True)
        return [make_optimizer(n.parameters(), **dict[str, Any](self.adam, lr=rate)) for n, rate in networks]

    def turn(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return the loss as `Stage` says; the discriminator judges the steps of the generator's turn."""
        if k == 1:
            return *self._discriminator_loss(shared, penalised=number % self.r1_every == 0), None
        x0, cond = self.data(batch)
        generated, steps = self._sample_steps(x0, cond)
        return *self._generator_loss(x0, generated, steps), steps._replace(fake=steps.fake.detach())

    def _sample_steps(self, x0: Tensor, cond: Conditioning) -> tuple[Tensor, Steps]:
        """Return the generator's x0' (b, c, h, w), and real and fake steps at random t."""
        model: Any = self.latent_diffusion
        share = self.share
        t = self.objective.sample_timesteps(x0, share)
        real, x = q_pair(x0, t, share.randn(x0), share.randn(x0), model.schedule)
        z = share.randn(x0.new_empty(len(x0), model.model.diffusion_model.latent_dim))
        generated = model.apply_model(x, t, cond, z).float()
        mean, variance = q_posterior(generated, x, t, model.schedule)
        fake = mean + variance.sqrt() * share.randn(x0)
        return generated, Steps(real, fake, x, t, cond.get("c_adm"))

    def _generator_loss(self, x0: Tensor, generated: Tensor, steps: Steps) -> Loss:
        self.discriminator.requires_grad_(False)
        loss = F.softplus(
            -self.discriminator(steps.fake, steps.x, steps.t, y=steps.y, average=self.share.mean).float()
        ).mean()
        self.discriminator.requires_grad_(True)
        metrics = {"generator": loss}
        if self.reconstruction > 0:
            metrics["reconstruction"] = F.mse_loss(generated, x0)
            loss = loss + self.reconstruction * metrics["reconstruction"]
        return loss, metrics

    def _discriminator_loss(self, steps: Steps, penalised: bool) -> Loss:
        x_before = steps.real.detach().requires_grad_(penalised)
        real = self.discriminator(x_before, steps.x, steps.t, y=steps.y, average=self.share.mean).float()
        fake = self.discriminator(steps.fake, steps.x, steps.t, y=steps.y, average=self.share.mean).float()
        loss = 2 * vanilla_d_loss(real, fake)
        metrics = {"discriminator": loss}
        if penalised:
            metrics["r1"] = r1_penalty(real, x_before).mean()
            loss = loss + self.r1_weight / 2 * metrics["r1"]
        return loss, metrics
