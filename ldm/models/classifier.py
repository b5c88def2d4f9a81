"""The two small networks that evaluate images of digits.

`Judge` classifies the digit. `FeatureNetwork` has another design and is trained separately, so that the Fréchet
distance and the precision and recall measured in its features do not repeat the judge's mistakes. Both take images in
[-1, 1] and see the central 28 x 28 pixels only, or those of another `size`. In half precision each is under 1 MB.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Entries, Width

INNER = 28  # MNIST's own size; two pixels of padding on each side make it 32 x 32
PADDING = 2


def inner(images: Tensor, size: int = INNER) -> Tensor:
    """Return the central `size` x `size` part of images (..., h, w)."""
    height, width = images.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    if any(extra not in range(0, 2 * PADDING + 1, 2) for extra in (height - size, width - size)):
        padded = size + 2 * PADDING
        raise ValueError(
            f"images of {height} x {width} have no central {size} x {size} part: "
            f"give {size} x {size} or {padded} x {padded}"
        )
    return images[..., top : top + size, left : left + size]


def conv_norm(in_channels: int, out_channels: int, kernel_size: int = 3) -> nn.Sequential:
    """Return a convolution that keeps the size, then batch normalisation, which has the bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity (He et al. 2015, arXiv 1512.03385, figure 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = conv_norm(channels, channels)
        self.conv2 = conv_norm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Judge(nn.Module):
    """Residual classifier: at 28, 14 and 7 pixels a convolution, and from 14 pixels down a residual block.

    Args:
        widths: channels at 28, 14 and 7 pixels.
        size: of the central part that it sees; halving rounds down.
    """

    def __init__(
        self,
        widths: tuple[Width, Width, Width] = (24, 48, 96),
        classes: Entries = 10,
        in_channels: Width = 1,
        size: Width = INNER,
    ):
        super().__init__()
        self.size = size
        first, second, third = widths
        self.stem = conv_norm(in_channels, first)
        self.down1 = conv_norm(first, second)
        self.block1 = BasicBlock(second)
        self.down2 = conv_norm(second, third)
        self.block2 = BasicBlock(third)
        self.head = nn.Linear(third, classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Map images (b, c, 28 or 32, same) in [-1, 1] to features at 28, 14 and 7 pixels for a perceptual loss."""
        fine = F.relu(self.stem(inner(images, self.size)))  # (b, widths[0], 28, 28)
        middle = self.block1(F.relu(self.down1(F.max_pool2d(fine, 2))))  # (b, widths[1], 14, 14)
        coarse = self.block2(F.relu(self.down2(F.max_pool2d(middle, 2))))  # (b, widths[2], 7, 7)
        return [fine, middle, coarse]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, c, 28 or 32, same) in [-1, 1] to logits (b, classes)."""
        return self.head(self.maps(images)[-1].amax(dim=(2, 3)))  # (b, widths[2]) -> (b, classes)


class FeatureNetwork(nn.Module):
    """LeNet-like network whose penultimate layer is the feature space in which distances are measured.

    The features are the output of a batch normalisation without gain, before the activation: each has unit variance on
    the training images and none can be dead (37 of 128 features after a ReLU were). With max pooling the distance is a
    third as sensitive to faint background noise as with average pooling.

    Args:
        widths: channels of the two 5 x 5 convolutions, at 28 and at 14 pixels.
        size: of the central part that it sees.
    """

    def __init__(
        self,
        widths: tuple[Width, Width] = (16, 32),
        features: Width = 64,
        classes: Entries = 10,
        in_channels: Width = 1,
        size: Width = INNER,
    ):
        super().__init__()
        self.size = size
        first, second = widths
        self.conv1 = conv_norm(in_channels, first, kernel_size=5)
        self.conv2 = conv_norm(first, second, kernel_size=5)
        self.project = nn.Linear(second * (size // 4) ** 2, features, bias=False)
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.head = nn.Linear(features, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images (b, c, 28 or 32, same) in [-1, 1] to features (b, d)."""
        x = F.max_pool2d(F.gelu(self.conv1(inner(images, self.size))), 2)  # (b, widths[0], 14, 14)
        x = F.max_pool2d(F.gelu(self.conv2(x)), 2)  # (b, widths[1], 7, 7)
        return self.norm(self.project(x.flatten(1)))  # (b, widths[1] * 49) -> (b, d)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, c, 28 or 32, same) in [-1, 1] to logits (b, classes)."""
        return self.head(F.gelu(self.features(images)))
