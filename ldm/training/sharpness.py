"""What sharpens larger first stages besides the error: a discriminator, and a distance in the features of a network."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoint.tensors import read_tensors
from ldm.loading import load_network
from ldm.models.discriminator import NLayerDiscriminator, adaptive_weight, generator_loss, hinge_d_loss
from ldm.models.perceptual import lpips
from ldm.util import call_with

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"


class Adversary:
    """A discriminator that trains with an autoencoder, and the losses of both (Esser et al. 2021, VQGAN, eq. 7).

    params: of `NLayerDiscriminator`. weight: of the autoencoder's term, besides its adaptive weight.
    """

    def __init__(self, params: Mapping[str, Any], weight: float) -> None:
        self.network, self.weight = call_with("discriminator", NLayerDiscriminator, params), weight

    def term(
        self, loss: Tensor, reconstruction: Tensor, last_layer: Tensor, mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the autoencoder's adversarial loss, without gradients of the discriminator's weights, and its factor.

        loss, last_layer, mean: as in `adaptive_weight`.
        """
        self.network.requires_grad_(False)
        logits = self.network(reconstruction)
        self.network.requires_grad_(True)
        adversarial = generator_loss(logits.float())
        return adversarial, adaptive_weight(loss, adversarial, last_layer, mean) * self.weight

    def own_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss."""
        return hinge_d_loss(self.network(real).float(), self.network(fake).float())


def load_perceptual(path: str) -> nn.Module:
    """Load a network for `perceptual_distance`: LPIPS on torchvision's VGG-16 weights, or a checkpoint of ours."""
    if path.endswith(VGG16.rpartition("/")[2]) and not Path(path).exists():
        raise FileNotFoundError(
            f"perceptual weights {path!r} do not exist: download {VGG16}, or train without them: "
            "stage.params.perceptual=null"
        )
    state = read_tensors(path).state
    return lpips(state) if "features.28.weight" in state else load_network(path)
