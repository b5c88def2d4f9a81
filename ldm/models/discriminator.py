"""The PatchGAN discriminator (Isola et al. 2017, section 3.2.2) that sharpens an autoencoder, and its losses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Count, Width


class NLayerDiscriminator(nn.Module):
    """Classifies overlapping patches as real or generated: (b, input_nc, h, w) -> (b, 1, about h / 2^n_layers, ...).

    All convolutions are 4x4, padded by 1; the last two have stride 1, the others 2. Weights start as N(0, 0.02), as in
    DCGAN (Radford et al. 2016).

    Args:
        input_nc: channels of the images.
        ndf: width of the first layer; it doubles with every layer, up to 8 ndf.
        n_layers: at least 1.
    """

    def __init__(self, input_nc: Width = 3, ndf: Width = 64, n_layers: Count = 3) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers}: a discriminator needs at least 1 layer")
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),  # the norm has a bias
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per patch of pixels x (b, input_nc, h, w) in [-1, 1], above 0 for real."""
        return self.main(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim & Ye 2017), halved as in VQGAN; a scalar."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the cross-entropy of real against fake (Goodfellow et al. 2014, eq. 1), halved; a scalar."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss, for either discriminator loss; a scalar."""
    return -logits_fake.mean()


def adaptive_weight(
    loss: Tensor, adversarial: Tensor, last_layer: Tensor, mean: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Return |grad loss| / |grad adversarial| at the last layer (Esser et al. 2021, eq. 7), clamped to [0, 1e4].

    mean: of a gradient over the processes that share the batch.
    """
    gradients = [torch.autograd.grad(value, last_layer, retain_graph=True)[0] for value in (loss, adversarial)]
    norms = [mean(gradient).norm() for gradient in gradients]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
