"""The first stage of pixel diffusion models: the identity."""

from torch import Tensor, nn

from ldm.checks import Width


class IdentityFirstStage(nn.Module):
    """A first stage without parameters whose latents are the pixels, so that code for latents serves pixels too."""

    def __init__(self, channels: Width) -> None:
        super().__init__()
        self.embed_dim = self.image_channels = channels
        self.downsampling = 1
        self.encoder, self.decoder = nn.Identity(), nn.Identity()  # where every first stage has them

    def encode(self, x: Tensor) -> Tensor:
        """Return pixels (b, c, h, w) unchanged."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return pixels (b, c, h, w) unchanged."""
        return self.decoder(z)
