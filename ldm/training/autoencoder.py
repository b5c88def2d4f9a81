"""The first stage: a KL-regularised autoencoder, with a PatchGAN and a perceptual loss if wanted.

Rombach et al. 2022, section 3.1 and appendix G; the adversarial part after Esser et al. 2021 (VQGAN), eq. 7.
"""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.checks import Count
from ldm.images import to_pil
from ldm.loading import load_network
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.discriminator import NLayerDiscriminator, adaptive_weight, generator_loss, hinge_d_loss
from ldm.models.perceptual import perceptual_distance
from ldm.training.contract import check_image_size
from ldm.training.latents import encode_dataset
from ldm.training.stage import Loss, Stage, adamw
from ldm.util import call_with


class AutoencoderStage(Stage):
    """Trains an AutoencoderKL: error + kl_weight * KL (means over elements) + perceptual + adversarial terms.

    Args:
        ddconfig, embed_dim: of `AutoencoderKL`.
        kl_weight: weight of the mean KL per latent element, relative to the mean error per pixel.
        reconstruction: error of the pixels, l2 or l1.
        discriminator: arguments of `NLayerDiscriminator`, its input_nc being the images' channels; None trains without
            one.
        disc_start: batch at which the adversarial loss starts.
        disc_weight: of the adversarial loss, besides its adaptive weight.
        perceptual: checkpoint of a network with `maps(x) -> list of feature maps`, such as a `Judge` (not the one that
            will judge the results); None leaves the perceptual loss out.
        perceptual_weight: of its distance.
        normalize: finally fold the measured mean and standard deviation of each latent channel into quant_conv and
            post_quant_conv, so that each channel has mean 0 and variance 1.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        learning_rate: float,
        kl_weight: float = 1e-4,
        reconstruction: str = "l2",
        discriminator: Mapping[str, Any] | None = None,
        disc_start: int = 0,
        disc_weight: float = 0.5,
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        normalize: bool = True,
        preview_columns: Count = 8,
    ) -> None:
        super().__init__(preview_columns, lr=learning_rate, betas=(0.5, 0.9))
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction {reconstruction!r} is unknown: use l1 or l2")
        params: dict[str, Any] = {"ddconfig": dict(ddconfig), "embed_dim": embed_dim}
        self.config = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
        self.model = AutoencoderKL(**params)
        self.networks["model"] = self.model
        self.discriminator: Any = None
        self.perceptual: Any = None
        if discriminator is not None:
            self.discriminator = call_with(
                "discriminator", NLayerDiscriminator, {"input_nc": ddconfig["out_ch"], **discriminator}
            )
            self.networks["discriminator"] = self.discriminator
        if perceptual is not None:
            self.perceptual = load_network(perceptual)
            self.freeze(perceptual=self.perceptual)
        self.kl_weight, self.error, self.normalize = kl_weight, reconstruction, normalize
        self.disc_start, self.disc_weight, self.perceptual_weight = disc_start, disc_weight, perceptual_weight

    def optimizers(self) -> list[Optimizer]:
        return [adamw(network.parameters(), **self.adam) for network in self.networks.values()]

    def prepare(self, dataset: Any) -> Dataset:
        check_image_size(dataset, self.model.image_channels, self.model.downsampling)
        self.preview_columns = min(self.preview_columns, len(dataset))
        count = self.preview_columns * min(2, len(dataset) // self.preview_columns)  # complete rows
        self.shown = torch.stack([dataset[i * (len(dataset) // count)]["image"] for i in range(count)])
        return dataset

    def turn(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        loss = self._autoencoder_loss if k == 0 else self._discriminator_loss
        return *loss(batch["image"], number >= self.disc_start), None

    def _autoencoder_loss(self, x: Tensor, adversarial: bool) -> Loss:
        reconstruction, posterior = self.model(x)
        reconstruction = reconstruction.float()
        error = (F.mse_loss if self.error == "l2" else F.l1_loss)(reconstruction, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss, metrics = error + self.kl_weight * kl, {"error": error, "kl": kl}
        if self.perceptual is not None:
            metrics["perceptual"] = perceptual_distance(self.perceptual.maps, reconstruction, x).mean()
            loss = loss + self.perceptual_weight * metrics["perceptual"]
        if self.discriminator is not None:
            metrics["adversarial"] = generator_loss(self._judged(reconstruction))
            last = self.model.get_last_layer()
            factor = adaptive_weight(loss, metrics["adversarial"], last) * self.disc_weight
            loss = loss + adversarial * factor * metrics["adversarial"]
        return loss, metrics

    def _judged(self, x: Tensor) -> Tensor:
        """Return the discriminator's logits, without gradients of its own weights."""
        self.discriminator.requires_grad_(False)
        logits = self.discriminator(x)
        self.discriminator.requires_grad_(True)
        return logits.float()

    def _discriminator_loss(self, x: Tensor, adversarial: bool) -> Loss:
        with torch.no_grad():
            fake, _ = self.model(x)
        loss = adversarial * hinge_d_loss(self.discriminator(x).float(), self.discriminator(fake).float())
        return loss, {"discriminator": loss}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return rows of images, each with its reconstructions below it."""
        x = self.shown.to(self.device)
        pairs = torch.stack([x, self.model(x, sample_posterior=False)[0]])
        rows = pairs.unflatten(1, (-1, self.preview_columns))  # (2, rows, columns, c, h, w)
        return to_pil(rows.transpose(0, 1).flatten(0, 2))

    def preview_labels(self) -> list[str]:
        return ["images", "their reconstructions"] * (len(self.shown) // self.preview_columns)

    @torch.no_grad()
    def finish(self, dataset: Dataset) -> None:
        if not self.normalize:
            return
        means, stds = (torch.stack(part).double() for part in encode_dataset(self.model, dataset, 512))
        mean = means.mean((0, 2, 3))
        std = ((means - mean[:, None, None]).square() + stds.square()).mean((0, 2, 3)).sqrt()
        self.model.fold_latent_statistics(mean.float(), std.float())
