"""The first stage of models that work on pixels: none."""

from torch import Tensor, nn


class IdentityFirstStage(nn.Module):
    """Pixels are the latents, so that everything written for latents serves pixels, too. It has no parameters.

    channels: of an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed_dim = self.image_channels = channels
        self.downsampling = 1
        self.encoder, self.decoder = nn.Identity(), nn.Identity()  # where every first stage has them

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (b, c, h, w) as they are."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels (b, c, h, w) as they are."""
        return self.decoder(z)
