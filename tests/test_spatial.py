"""Conditioning on images: the original's numbers, the published layout, closed forms."""

import pytest
import torch
from conftest import refused
from golden_fill import fill, shapes

from ldm.conditioning.spatial import ConcatImage, SpatialRescaler


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_halving():
    """By 2, "bilinear" (no corner alignment) and "area" both are the mean of 2x2; without a mapper channels stay."""
    x = images(2, 5, 8, 12)
    want = x.view(2, 5, 4, 2, 6, 2).mean(dim=(3, 5))
    for method in ("bilinear", "area"):
        model = SpatialRescaler(method=method, in_channels=5)
        torch.testing.assert_close(model(x)["c_concat"], want)
        assert not list(model.parameters())
    assert torch.equal(SpatialRescaler(method="nearest", multiplier=0.25)(x)["c_concat"], x[:, :, ::4, ::4])
    assert SpatialRescaler(n_stages=3, method="bicubic", multiplier=2)(x)["c_concat"].shape == (2, 5, 64, 96)
    assert torch.equal(SpatialRescaler(n_stages=0)(x)["c_concat"], x) and model.null is None


def test_the_mapper_is_a_matrix_over_channels():
    model = fill(SpatialRescaler(n_stages=0, in_channels=5, out_channels=3, bias=True), 1)
    x, weight, bias = images(2, 5, 4, 4), model.channel_mapper.weight[:, :, 0, 0], model.channel_mapper.bias
    torch.testing.assert_close(model.encode(x), torch.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None])
    assert model.half().encode(x).dtype == torch.float16


def test_an_image_stays_as_it_is():
    x = images(2, 3, 4, 4)
    assert ConcatImage()(x)["c_concat"] is x and ConcatImage().null is None and not shapes(ConcatImage())


@pytest.mark.parametrize("model", [ConcatImage(), SpatialRescaler()])
def test_what_is_no_image_is_refused(model):
    refused("got a list: call model.generate", model, ["a cat"])
    refused(r"got \(3, 4, 4\) of torch.float32", model, images(3, 4, 4))
    refused("of torch.uint8", model, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_bad_arguments_are_named():
    refused("method 'lanczos'", SpatialRescaler, method="lanczos")
    refused("n_stages -1", SpatialRescaler, n_stages=-1)
