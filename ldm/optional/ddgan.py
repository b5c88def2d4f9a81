"""The two networks of denoising diffusion GANs (Xiao et al. 2022, https://arxiv.org/abs/2112.07804).

With few, large denoising steps, p(x_{t-1} | x_t) has many modes, and no Gaussian fits it. So the generator samples it
with a latent z, fresh at every step, and the discriminator sees the pair (x_{t-1}, x_t) and t. Without z a step would
be deterministic; without x_t and t the discriminator would judge an image, not a denoising step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checks import Count, Entries, Levels, Width
from ldm.diffusion.bound import levels
from ldm.diffusion.schedule import Schedule, signal_and_noise_levels
from ldm.models.blocks import TimestepBlock, timestep_embedding, zero_module
from ldm.models.unet import UNetModel
from ldm.util import call_with

NORM_EPS = 1e-8
Average = Callable[[Tensor], Tensor]


class Generator(nn.Module):
    """x0' = G(x_t, t, z): a UNet whose embedded time has the mapped z, and the class if there is one, added to it.

    As in the paper (appendix C) z is normalised and mapped by a small perceptron, and the image goes through a tanh.
    There z alone scales and shifts the features and the time is added to them; here both do what the UNet's
    `use_scale_shift_norm` says.

    Args:
        unet: arguments of `UNetModel`, without num_classes and adm_in_channels.
        latent_dim: width of z.
        mapped, layers: width and number of the perceptron's layers.
        classes: None for an unconditional generator.
    """

    def __init__(
        self,
        unet: Mapping[str, Any],
        latent_dim: Width = 100,
        mapped: Width = 256,
        layers: Count = 4,
        classes: Entries | None = None,
    ) -> None:
        super().__init__()
        own = sorted({"num_classes", "adm_in_channels"} & set(unet))
        if own or latent_dim < 1 or layers < 1:
            raise ValueError(
                f"latent_dim {latent_dim} and layers {layers} must be at least 1, and the generator itself sets "
                f"{own or 'num_classes and adm_in_channels'} of its UNet"
            )
        self.latent_dim, self.classes = latent_dim, classes
        widths = [latent_dim] + [mapped] * layers
        pairs = zip(widths, widths[1:], strict=False)
        self.mapping = nn.Sequential(*(part for pair in pairs for part in (nn.Linear(*pair), nn.SiLU())))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, mapped)
        y_width = mapped if classes is None else 2 * mapped
        self.unet = call_with("unet", UNetModel, unet, num_classes="sequential", adm_in_channels=y_width)
        self.downsampling = self.unet.downsampling  # sizes must be multiples of it

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict x0' (b, c, h, w) in [-1, 1], at timesteps (b,) in 0..T-1 and for classes y (b,), if there are any.

        Args:
            x: (b, c, h, w), variance-preserving.
            context: z, unit normal (b, latent_dim); it has the place and the name of a UNet's context.
        """
        embedded = self.mapping(pixel_norm(context).to(self.unet.dtype))  # (b, mapped)
        if check_classes(self.classes, y):
            embedded = torch.cat([embedded, self.label_emb(y)], dim=1)  # (b, 2 mapped)
        return self.unet(x, timesteps, y=embedded).tanh()


class Discriminator(nn.Module):
    """D(x_{t-1}, x_t, t): one logit per pair, above 0 for a step of the true chain; as the paper's small one.

    A class, which the paper does not have, enters by projection: its embedding times the last features is added to the
    logit (Miyato & Koyama 2018, eq. 3).

    Args:
        channel_mult: width of each residual block in units of `width`; all but the first halve height and width.
        time_channels: width of the embedded time.
        patch: side of the squares of pixels that become the channels of one position, as in `UNetModel`.
    """

    def __init__(
        self,
        in_channels: Width = 1,
        width: Width = 64,
        channel_mult: Levels = (1, 2, 4, 4),
        time_channels: Width = 128,
        classes: Entries | None = None,
        patch: Count = 1,
    ) -> None:
        super().__init__()
        self.time_channels, self.classes, self.patch = time_channels, classes, patch
        self.time_embed = nn.Sequential(
            nn.Linear(time_channels, time_channels), nn.LeakyReLU(0.2), nn.Linear(time_channels, time_channels)
        )
        widths = [width * mult for mult in channel_mult]
        self.conv_in = nn.Conv2d(2 * in_channels * patch**2, widths[0], 1)
        befores = [widths[0], *widths]
        self.blocks = nn.ModuleList(
            PairBlock(before, after, time_channels, down=i > 0)
            for i, (before, after) in enumerate(zip(befores, widths, strict=False))
        )
        self.conv_out = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.out = nn.Linear(widths[-1], 1)
        self.apply(_keep_variance)
        if classes is not None:
            self.label_emb = zero_module(nn.Embedding(classes, widths[-1]))

    def forward(
        self, before: Tensor, x: Tensor, timesteps: Tensor, y: Tensor | None = None, average: Average = lambda x: x
    ) -> Tensor:
        """Return logits (b,) of before = x_{t-1} and x = x_t, (b, c, h, w), at timesteps (b,) in 0..T-1, y (b,).

        average: means over the processes that share the batch.
        """
        emb = timestep_embedding(timesteps, self.time_channels).to(self.out.weight.dtype)
        emb = self.time_embed(emb)  # (b, time_channels)
        h = self.conv_in(F.pixel_unshuffle(torch.cat([before, x], dim=1), self.patch))  # (b, width, h / patch, ...)
        for block in self.blocks:
            h = block(h, emb)
        h = torch.cat([F.leaky_relu(h, 0.2), batch_deviation(h, average)], dim=1)
        h = F.leaky_relu(self.conv_out(h), 0.2).sum(dim=(2, 3))  # (b, width of the last block)
        logits = self.out(h).squeeze(1)  # (b,)
        return logits + (self.label_emb(y) * h).sum(dim=1) if check_classes(self.classes, y) else logits


class PairBlock(TimestepBlock):
    """Two convolutions with the embedded time added between them: (b, channels, h, w) -> (b, out_channels, h, w).

    With `down` both branches are averaged over 2 x 2 pixels. Their sum is divided by sqrt(2), to keep its variance.
    """

    def __init__(self, channels: int, out_channels: int, emb_channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb_layer = nn.Linear(emb_channels, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(x, 0.2)) + self.emb_layer(emb)[:, :, None, None]
        h = F.leaky_relu(h, 0.2)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return (self.conv2(h) + self.skip(x)) / 2**0.5


def _keep_variance(module: nn.Module) -> None:
    """Set weights of variance 1 / fan (Glorot & Bengio 2010, eq. 16), as in the paper's code, and zero biases.

    PyTorch's default has a third of that variance, and without normalisation the factor multiplies from layer to layer:
    the logit then hardly depends on the images, and the discriminator cannot keep up with the generator.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pixel_norm(z: Tensor) -> Tensor:
    """Scale z (b, d) to a mean square of 1 per row (Karras et al. 2018, section 4.2)."""
    return z * (z.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()


def batch_deviation(h: Tensor, average: Average = lambda x: x) -> Tensor:
    """Return the mean standard deviation of all features over the batch as one more feature, (b, 1, h, w).

    With it the discriminator detects a generator whose images are all alike (Karras et al. 2018, section 3).
    """
    mean, variance = h.float().mean(0), h.float().var(dim=0, unbiased=False)
    variance = average(variance + (mean - average(mean)).square())
    deviation = (variance + NORM_EPS).sqrt().mean()
    return deviation.to(h.dtype).expand(len(h), 1, *h.shape[2:])


def r1_penalty(logits: Tensor, before: Tensor) -> Tensor:
    """Return |d logit / d x_{t-1}|^2 (b,) of the logits (b,) of before (b, ...) (Mescheder et al. 2018, eq. 9)."""
    (gradient,) = torch.autograd.grad(logits.sum(), before, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1)


def check_classes(classes: int | None, y: Tensor | None) -> bool:
    """Return whether there are classes; raise ValueError when y is missing or not expected."""
    if (classes is None) != (y is None):
        state = "needs y, the class of each image" if y is None else "takes no y"
        raise ValueError(f"a network with classes {classes} {state}")
    return classes is not None


def q_pair(x0: Tensor, t: Tensor, noise: Tensor, fresh: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Sample (x_{t-1}, x_t) of one forward process: q(x_{t-1} | x0), then q(x_t | x_{t-1}).

    x_{t-1} = sqrt(ab_{t-1}) x0 + sqrt(1 - ab_{t-1}) noise and x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) fresh (Ho
    et al. 2020, eq. 4 and 2). x0, noise and fresh are (b, ...), t is (b,).
    """
    now, before = levels(t, schedule)
    signal_level, noise_level = signal_and_noise_levels(before, x0)
    x_before = signal_level * x0 + noise_level * noise
    signal_level, noise_level = signal_and_noise_levels(now / before, x0)  # of 1 - beta_t
    return x_before, signal_level * x_before + noise_level * fresh
