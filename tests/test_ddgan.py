"""The generator and the discriminator of denoising diffusion GANs: shapes, what they depend on, what trains, and R1."""

import pytest
import torch
from conftest import randomised, refused
from golden_fill import unet_params, untrained

from ldm.optional.ddgan import Discriminator, Generator, batch_deviation, pixel_norm, r1_penalty

UNET = unet_params(in_channels=1, out_channels=1, patch=2, model_channels=16, attention_resolutions=[2])
UNET |= {"num_head_channels": 16, "norm_groups": 8, "use_scale_shift_norm": True}


def generator(**settings) -> Generator:
    torch.manual_seed(0)
    return randomised(Generator(UNET, **{"latent_dim": 6, "mapped": 24, "layers": 2, **settings}))


def discriminator(**settings) -> Discriminator:
    torch.manual_seed(1)
    return randomised(
        Discriminator(**{"width": 8, "channel_mult": [1, 2], "time_channels": 16, "patch": 2, **settings})
    )


def pair(b: int = 3, c: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(2)
    x, before = (torch.randn(b, c, 16, 16, generator=numbers) for _ in range(2))
    return before, x, torch.tensor([0, 2, 3])[:b]


def test_generator_returns_images_of_any_fitting_size():
    network = generator()
    assert network.downsampling == 4
    for size in ((16, 16), (8, 12)):
        images = network(torch.randn(2, 1, *size), torch.tensor([0, 3]), torch.randn(2, 6))
        assert images.shape == (2, 1, *size) and images.abs().max() <= 1
    unet = {**UNET, "in_channels": 3, "out_channels": 3, "patch": 1}
    assert Generator(unet, mapped=8)(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.randn(2, 100)).shape == (2, 3, 8, 8)


def test_the_latent_decides_which_image():
    """The point of the paper (systems.md's E19): the same x_t and t lead to many x0."""
    network = generator()
    _, x, t = pair()
    same, other = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first, again, second = network(x, t, same), network(x, t, same), network(x, t, other)
        later = network(x, t + 0.5, same)
    assert torch.equal(first, again)
    for changed in (second, later):
        assert ((changed - first).abs().amax((1, 2, 3)) > 1e-3).all()
    # only the direction of z counts
    torch.testing.assert_close(network(x, t, 3 * same), first, rtol=0, atol=1e-5)


def test_pixel_norm():
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[3 / 12.5**0.5, 4 / 12.5**0.5], [0.0, 0.0]])
    torch.testing.assert_close(pixel_norm(z), expected)


def test_logits_depend_on_both_images_and_the_timestep():
    """Each logit depends on x_{t-1}, on x_t and on t (systems.md's E19)."""
    network = discriminator()
    before, x, t = pair()
    with torch.no_grad():
        logits = network(before, x, t)
        assert logits.shape == (3,)
        for changed in ((before + 0.1, x, t), (before, x + 0.1, t), (before, x, t + 1)):
            assert ((network(*changed) - logits).abs() > 1e-5).all()
        assert not torch.allclose(network(x, before, t), logits, atol=1e-4)


def test_classes_reach_both():
    _, x, t = pair()
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    g, d = generator(classes=10), discriminator(classes=10)
    for call in (lambda y: g(x, t, z, y=y), lambda y: d(x, x, t, y=y)[:, None]):
        with torch.no_grad():
            change = (call(torch.tensor([1, 2, 3])) - call(torch.tensor([1, 2, 4]))).abs()
        change = change.flatten(1).amax(1)
        assert change[2] > 1e-3 and (change[:2] < 1e-6).all()
        refused("classes 10 needs y", call, None)
    refused("classes None takes no y", discriminator(), x, x, t, y=t)


@pytest.mark.parametrize("classes", [None, 3])
def test_no_parameter_is_without_gradient(classes):
    before, x, t = pair()
    y = None if classes is None else torch.tensor([0, 1, 2])
    g, d = generator(classes=classes), discriminator(classes=classes)
    d(g(x, t, torch.randn(3, 6), y=y), x, t, y=y).sum().backward()
    assert untrained(g, d) == []


def test_batch_deviation():
    h = torch.tensor([[1.0, 2.0], [3.0, 8.0]])[:, :, None, None].expand(2, 2, 3, 3)  # deviations 1 and 3
    assert batch_deviation(h).shape == (2, 1, 3, 3)
    torch.testing.assert_close(batch_deviation(h), torch.full((2, 1, 3, 3), 2.0))


def test_r1_of_a_linear_discriminator():
    """D = w . x_{t-1} + v . x_t has the gradient w everywhere: |w|^2, which pulls on w by 2 w and not on v."""
    before, x, _ = pair()
    w, v = (torch.randn(256, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (4, 5))
    before.requires_grad_()
    penalty = r1_penalty(before.flatten(1) @ w + x.flatten(1) @ v, before)
    torch.testing.assert_close(penalty, w.square().sum().expand(3))
    penalty.mean().backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())
    assert v.grad is None or not v.grad.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": 0}, "latent_dim 0"),
        ({"layers": 0}, "layers 0"),
        ({"unet": {**UNET, "num_classes": 10}}, "itself sets .'num_classes'. of its UNet"),
        ({"unet": {**UNET, "chanel_mult": 1}}, "chanel_mult"),
    ],
)
def test_mistakes_are_named(settings, message):
    refused(message, Generator, **{"unet": UNET, **settings})


def test_the_discriminator_begins_with_logits_of_the_images():
    """Weights of variance 2 / (fan in + fan out) and no biases: by PyTorch's own, noise moves the logit by 0.0009."""
    torch.manual_seed(0)
    network = Discriminator(width=32)
    weight = network.blocks[1].conv1.weight  # (64, 32, 3, 3)
    assert weight.var().item() == pytest.approx(2 / (9 * (32 + 64)), rel=0.05)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    before, x = torch.randn(2, 16, 1, 32, 32)
    with torch.no_grad():
        assert network(before, x, torch.zeros(16)).std() > 0.01
