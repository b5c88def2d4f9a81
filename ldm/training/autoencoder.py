"""The first stage: a KL-regularised or VQ autoencoder, with a PatchGAN and a perceptual loss if wanted.

Rombach et al. 2022, section 3.1 and appendix G.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ldm.checkpoint.networks import KL_TARGET, VQ_TARGET
from ldm.checks import Count, Entries, Rate
from ldm.diffusion.loss import mean_error
from ldm.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.training.contract import check_image_size
from ldm.training.latents import encode_dataset, posterior
from ldm.training.optimizers import make_optimizer
from ldm.training.shapes import alike_batches, latent_statistics
from ldm.training.stage import Loss, Stage
from ldm.util import instantiate_from_config


class AutoencoderStage(Stage):
    """Trains an AutoencoderKL: error + kl_weight * KL (means over elements) + perceptual + adversarial terms.

    With `n_embed`, a VQ autoencoder: codebook_weight * codebook loss takes the place of the KL.

    Args:
        ddconfig, embed_dim: of `AutoencoderKL`, or of `VQModel`.
        n_embed: vectors in the codebook; None for the KL autoencoder.
        kl_weight: weight of the mean KL per latent element, relative to the mean error per pixel; None is 1e-4.
        codebook_weight: of the codebook loss; None is 1.
        reconstruction: error of the pixels, l2 or l1.
        edge_weight: of the same error of the differences between neighbouring pixels, which sharpens edges.
        discriminator: arguments of `NLayerDiscriminator`, its input_nc being the images' channels; None trains without
            one.
        disc_start: batch at which the adversarial loss starts.
        disc_weight: of the adversarial loss, besides its adaptive weight.
        perceptual: torchvision's VGG-16 weights (vgg16-397923af.pth), for LPIPS by the package lpips; or a checkpoint
            of a network with `maps(x) -> list of feature maps`, such as a `Judge` (not the one that will judge the
            results). None leaves the perceptual loss out.
        perceptual_weight: of its distance.
        normalize: finally fold the measured mean and standard deviation of each latent channel into quant_conv and
            post_quant_conv, so that each channel has mean 0 and variance 1. Not for a VQ autoencoder, whose codebook
            would no longer fit.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        learning_rate: Rate,
        n_embed: Entries | None = None,
        kl_weight: float | None = None,
        codebook_weight: float | None = None,
        reconstruction: str = "l2",
        edge_weight: Rate = 0.0,
        discriminator: Mapping[str, Any] | None = None,
        disc_start: int = 0,
        disc_weight: float = 0.5,
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        normalize: bool | None = None,
        optimizer: str | Mapping[str, Any] = "adamw",
        preview_columns: Count = 8,
    ) -> None:
        super().__init__(preview_columns, lr=learning_rate, betas=(0.5, 0.9), optimizer=optimizer)
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction {reconstruction!r} is unknown: use l1 or l2")
        params: dict[str, Any] = {"ddconfig": dict(ddconfig), "embed_dim": embed_dim}
        target = KL_TARGET
        if n_embed is not None:
            target, params["n_embed"] = VQ_TARGET, n_embed
        if (kl_weight is not None or normalize) if n_embed is not None else codebook_weight is not None:
            raise ValueError(
                "kl_weight and normalize are for a KL autoencoder, codebook_weight for a VQ autoencoder, which n_embed "
                f"makes: not {kl_weight=}, {normalize=}, {codebook_weight=} and {n_embed=}"
            )
        self.config = {"target": target, "params": params}
        self.model: Any = instantiate_from_config(self.config)
        self.networks["model"] = self.model
        self.adversary: Any = None
        self.distance: Any = None
        if discriminator is not None:
            from ldm.training.sharpness import Adversary  # only larger first stages have one

            self.adversary = Adversary({"input_nc": ddconfig["out_ch"], **discriminator}, disc_weight)
            self.networks["discriminator"] = self.adversary.network
        if perceptual is not None:
            from ldm.models.perceptual import perceptual_distance  # likewise
            from ldm.training.sharpness import load_perceptual

            self.freeze(perceptual=load_perceptual(perceptual))
            self.distance = partial(perceptual_distance, self.frozen["perceptual"])
        self.kl_weight = 1e-4 if kl_weight is None else kl_weight
        self.codebook_weight = 1.0 if codebook_weight is None else codebook_weight
        self.error, self.edge_weight = reconstruction, edge_weight
        self.normalize = normalize is not False and n_embed is None
        self.disc_start, self.perceptual_weight = disc_start, perceptual_weight

    def optimizers(self) -> list[Optimizer]:
        return [make_optimizer(network.parameters(), **self.adam) for network in self.networks.values()]

    def prepare(self, dataset: Any) -> Dataset:
        check_image_size(dataset, self.model.image_channels, self.model.downsampling)
        places = max(alike_batches(dataset, len(dataset)), key=len)  # of the commonest shape
        self.preview_columns = min(self.preview_columns, len(places))
        count = self.preview_columns * min(2, len(places) // self.preview_columns)  # complete rows
        self.shown = torch.stack([dataset[places[i * (len(places) // count)]]["image"] for i in range(count)])
        return dataset

    def turn(self, batch: Mapping[str, Any], k: int, number: int, shared: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        loss = self._autoencoder_loss if k == 0 else self._discriminator_loss
        return *loss(batch["image"], number >= self.disc_start), None

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the autoencoder in training."""
        return {"noise": self.share.randn} if isinstance(self.model, AutoencoderKL) else {}

    def _autoencoder_loss(self, x: Tensor, adversarial: bool) -> Loss:
        reconstruction, losses, metrics = self._reconstruct(x, **self.sampling)
        loss, metrics = losses.mean(), {name: values.mean() for name, values in metrics.items()}
        if self.adversary is not None:
            last = self.model.get_last_layer()
            metrics["adversarial"], factor = self.adversary.term(loss, reconstruction, last, self.share.mean)
            loss = loss + adversarial * factor * metrics["adversarial"]
        return loss, metrics

    def _reconstruct(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return reconstructions of x (b, c, h, w), their losses but for the adversarial term, and its terms, (b,)."""
        reconstruction, code = self.model(x, **options)
        reconstruction = reconstruction.float()
        if reconstruction.shape != x.shape:  # torch would repeat one of them
            raise ValueError(f"images {tuple(x.shape)} are decoded to {tuple(reconstruction.shape)}: see out_ch")
        metrics = {"error": mean_error(self.error, reconstruction, x)}
        if isinstance(code, Tensor):
            metrics["codebook"] = code.expand(len(x))
            losses = metrics["error"] + self.codebook_weight * metrics["codebook"]
        else:
            metrics["kl"] = code.kl() / code.mean[0].numel()
            losses = metrics["error"] + self.kl_weight * metrics["kl"]
        if self.edge_weight > 0:
            edges = [(reconstruction.diff(dim=dim), x.diff(dim=dim)) for dim in (2, 3)]
            metrics["edges"] = torch.stack([mean_error(self.error, *pair) for pair in edges]).mean(0)
            losses = losses + self.edge_weight * metrics["edges"]
        if self.distance is not None:
            metrics["perceptual"] = self.distance(reconstruction, x)
            losses = losses + self.perceptual_weight * metrics["perceptual"]
        return reconstruction, losses, metrics

    def validate(self, batch: Mapping[str, Any], places: Tensor, noise: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the loss, its terms and the PSNR of reconstructions, where there is a posterior from its mean."""
        from ldm.models.perceptual import psnr  # only validation needs it

        x, options = batch["image"], {"sample_posterior": False} if isinstance(self.model, AutoencoderKL) else {}
        reconstruction, losses, metrics = self._reconstruct(x, **options)
        return {"loss": losses, "psnr": psnr(reconstruction, x).clamp(max=100.0), **metrics}  # not infinite

    def _discriminator_loss(self, x: Tensor, adversarial: bool) -> Loss:
        with torch.no_grad():
            fake, _ = self.model(x, **self.sampling)
        loss = adversarial * self.adversary.own_loss(x, fake)
        return loss, {"discriminator": loss}

    @torch.no_grad()
    def preview(self) -> list[Image.Image]:
        """Return rows of images, each with its reconstructions below it."""
        x = self.shown.to(self.device)
        pairs = torch.stack([x, self.model.decode(posterior(self.model, x)[0])])
        rows = pairs.unflatten(1, (-1, self.preview_columns))  # (2, rows, columns, c, h, w)
        return to_pil(rows.transpose(0, 1).flatten(0, 2))

    def preview_labels(self) -> list[str]:
        return ["images", "their reconstructions"] * (len(self.shown) // self.preview_columns)

    @torch.no_grad()
    def finish(self, dataset: Any) -> None:
        if not self.normalize:
            return
        latents = list(zip(*encode_dataset(self.model, dataset, self.share, self.workers), strict=True))
        mean, std = latent_statistics([latents[i] for i in places] for places in alike_batches(dataset, len(dataset)))
        self.model.fold_latent_statistics(mean.float(), std.float())
