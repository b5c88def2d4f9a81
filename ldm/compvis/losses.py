"""The losses of the published first stages (Esser et al. 2021, eq. 6 and 7; Rombach et al. 2022, appendix G).

They have CompVis's names and units: sums per image, where our own training has means.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, relu

from ldm.compvis.util import Losses
from ldm.models.discriminator import NLayerDiscriminator, adaptive_weight, generator_loss, hinge_d_loss, vanilla_d_loss


class DummyLoss(nn.Module):
    """In configurations of autoencoders that are not trained."""


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return the weight from step `threshold` on, and `value` before."""
    return value if global_step < threshold else weight


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs()


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square()


DISC_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
PIXEL_LOSSES = {"l1": l1, "l2": l2}


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Return (perplexity, number) of the codebook entries in use."""
    share = one_hot(predicted_indices.flatten(), n_embed).float().mean(0)
    return torch.exp(-(share * (share + 1e-10).log()).sum()), (share > 0).sum()


def hinge_d_loss_with_exemplar_weights(logits_real: Tensor, logits_fake: Tensor, weights: Tensor) -> Tensor:
    """Return `hinge_d_loss` with a weight for each image (b,)."""
    terms = relu(1 - logits_real).flatten(1).mean(1) + relu(1 + logits_fake).flatten(1).mean(1)
    return 0.5 * (weights * terms).sum() / weights.sum()


def LPIPS(use_dropout: bool = True) -> nn.Module:
    """Build LPIPS (Zhang et al. 2018; VGG-16, version 0.1), frozen: images (b, 3, h, w), twice -> (b, 1, 1, 1)."""
    try:
        lpips = import_module("lpips")  # not a dependency, because only this needs it
    except ImportError:
        raise ValueError("a perceptual_weight above 0 needs the package lpips: pip install lpips") from None
    return lpips.LPIPS(net="vgg", use_dropout=use_dropout, verbose=False).eval().requires_grad_(False)


class VQLPIPSWithDiscriminator(nn.Module):
    """The mean of |x - y| + LPIPS, plus the codebook loss, and from step `disc_start` on the discriminator's loss."""

    def __init__(
        self, disc_start: int, codebook_weight: float = 1.0, pixelloss_weight: float = 1.0, disc_num_layers: int = 3,
        disc_in_channels: int = 3, disc_factor: float = 1.0, disc_weight: float = 1.0, perceptual_weight: float = 1.0,
        use_actnorm: bool = False, disc_conditional: bool = False, disc_ndf: int = 64, disc_loss: str = "hinge",
        n_classes: int | None = None, perceptual_loss: str = "lpips", pixel_loss: str = "l1",
    ) -> None:  # fmt: skip
        super().__init__()
        if use_actnorm or perceptual_loss != "lpips" or disc_loss not in DISC_LOSSES or pixel_loss not in PIXEL_LOSSES:
            given = f"use_actnorm {use_actnorm}, {perceptual_loss!r}, {disc_loss!r}, {pixel_loss!r}"
            raise ValueError(f"{given}: use false, 'lpips', one of {[*DISC_LOSSES]}, one of {[*PIXEL_LOSSES]}")
        self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers)
        self.disc_loss, self.pixel_loss = DISC_LOSSES[disc_loss], PIXEL_LOSSES[pixel_loss]
        self.perceptual_loss = LPIPS() if perceptual_weight > 0 else None
        self.perceptual_weight, self.codebook_weight, self.n_classes = perceptual_weight, codebook_weight, n_classes
        self.discriminator_iter_start, self.disc_factor = disc_start, disc_factor
        self.discriminator_weight, self.disc_conditional = disc_weight, disc_conditional

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: nn.Parameter) -> Tensor:
        return adaptive_weight(nll_loss, g_loss, last_layer) * self.discriminator_weight

    def _judge(self, x: Tensor, cond: Tensor | None) -> Tensor:
        assert (cond is not None) == self.disc_conditional, "cond must be given if and only if disc_conditional"
        return self.discriminator(x if cond is None else torch.cat([x, cond], dim=1))

    def _losses(self, x: Tensor, y: Tensor, k: int, step: int, last: Any, cond: Any, split: str, own: Any) -> Losses:
        """Return the loss of the autoencoder (k = 0) or the discriminator (1).

        own: error -> (loss without the discriminator's, nll, what to log).
        """
        factor = adopt_weight(self.disc_factor, step, self.discriminator_iter_start)
        if k == 1:
            real, fake = self._judge(x.detach(), cond), self._judge(y.detach(), cond)
            loss = factor * self.disc_loss(real, fake)
            log = {"disc_loss": loss, "logits_real": real, "logits_fake": fake}
        else:
            distance = x.new_zeros(len(x), 1, 1, 1) if self.perceptual_loss is None else self.perceptual_loss(x, y)
            error = self.pixel_loss(x, y) + self.perceptual_weight * distance  # (b, c, h, w)
            loss, nll, log = own(error)
            g_loss, weight = generator_loss(self._judge(y, cond)), torch.zeros(())
            if self.disc_factor > 0 and nll.requires_grad:  # validation has no gradients to compare
                weight = self.calculate_adaptive_weight(nll, g_loss, last)
            loss = loss + weight * factor * g_loss
            log |= {"total_loss": loss, "nll_loss": nll, "rec_loss": error, "p_loss": distance, "g_loss": g_loss}
            log |= {"d_weight": weight, "disc_factor": torch.tensor(factor)}
        return loss, {f"{split}/{name}": value.detach().float().mean() for name, value in log.items()}

    def forward(
        self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, optimizer_idx: int, global_step: int,
        last_layer: nn.Parameter | None = None, cond: Tensor | None = None, split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> Losses:  # fmt: skip

        def own(error: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            nll, log = error.mean(), {"quant_loss": codebook_loss}
            if predicted_indices is not None and self.n_classes is not None:
                log["perplexity"], log["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
            return nll + self.codebook_weight * codebook_loss.mean(), nll, log

        return self._losses(inputs, reconstructions, optimizer_idx, global_step, last_layer, cond, split, own)


class LPIPSWithDiscriminator(VQLPIPSWithDiscriminator):
    """The sum per image of (|x - y| + LPIPS) / exp(logvar) + logvar, plus KL and the discriminator's loss as above."""

    def __init__(
        self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3, disc_in_channels: int = 3, disc_factor: float = 1.0, disc_weight: float = 1.0,
        perceptual_weight: float = 1.0, use_actnorm: bool = False, disc_conditional: bool = False,
        disc_loss: str = "hinge",
    ) -> None:  # fmt: skip
        more = (disc_num_layers, disc_in_channels, disc_factor, disc_weight, perceptual_weight, use_actnorm)
        super().__init__(disc_start, 0.0, pixelloss_weight, *more, disc_conditional, disc_loss=disc_loss)
        self.kl_weight, self.logvar = kl_weight, nn.Parameter(torch.tensor(float(logvar_init)))

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, posteriors: Any, optimizer_idx: int, global_step: int,
        last_layer: nn.Parameter | None = None, cond: Tensor | None = None, split: str = "train",
        weights: Tensor | None = None,
    ) -> Losses:  # fmt: skip

        def own(error: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            nll, kl = error / self.logvar.exp() + self.logvar, posteriors.kl().mean()
            weighted = (nll if weights is None else weights * nll).sum() / len(nll)
            return weighted + self.kl_weight * kl, nll.sum() / len(nll), {"logvar": self.logvar, "kl_loss": kl}

        return self._losses(inputs, reconstructions, optimizer_idx, global_step, last_layer, cond, split, own)
