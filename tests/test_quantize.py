"""The vector quantizer: nearest entries, the losses, and where the gradients go."""

import pytest
import torch

from ldm.models import quantize
from ldm.models.quantize import VectorQuantizer


def quantizer(n_e: int = 37, e_dim: int = 3, **options) -> VectorQuantizer:
    module = VectorQuantizer(n_e, e_dim, **options)
    generator = torch.Generator().manual_seed(0)
    module.embedding.weight.data = torch.randn(n_e, e_dim, generator=generator)
    return module


def latents() -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))


def test_nearest_entries():
    module, z = quantizer(), latents()
    z_q, _, (perplexity, encodings, indices) = module(z)
    tokens = z.permute(0, 2, 3, 1).reshape(-1, 3)
    want = torch.cdist(tokens.double(), module.embedding.weight.double()).argmin(dim=1)
    assert indices.shape == (70,) and torch.equal(indices, want)
    expected = module.embedding.weight[want].view(2, 5, 7, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, expected, atol=1e-6, rtol=0)  # z + (z_q - z) rounds
    assert perplexity is None and encodings is None


def test_many_latents_are_compared_in_parts(monkeypatch):
    module, z = quantizer(), latents()
    expected = module(z)[2][2]
    monkeypatch.setattr(quantize, "MAX_DISTANCES", 37 * 9)  # 9 latents at a time, the last time 7
    assert torch.equal(module(z)[2][2], expected)
    monkeypatch.setattr(quantize, "MAX_DISTANCES", 1)
    assert torch.equal(module(z)[2][2], expected)


@pytest.mark.parametrize(("legacy", "of_z", "of_codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_losses_and_gradients(legacy, of_z, of_codebook):
    """d mean |z_q - z|^2 = 2 (z_q - z) / n, weighed per side; the published models have beta on the codebook's."""
    module, z = quantizer(legacy=legacy), latents().requires_grad_()
    z_q, loss, (_, _, indices) = module(z)
    difference = (z_q - z).detach()
    torch.testing.assert_close(loss, 1.25 * difference.square().mean())
    loss.backward()
    torch.testing.assert_close(z.grad, -of_z * 2 * difference / z.numel())
    per_token = difference.permute(0, 2, 3, 1).reshape(-1, 3)
    want = torch.zeros(37, 3).index_add(0, indices, of_codebook * 2 * per_token / z.numel())
    torch.testing.assert_close(module.embedding.weight.grad, want)


def test_straight_through():
    module, z = quantizer(), latents().requires_grad_()
    weight = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    (module(z)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight) and module.embedding.weight.grad is None


def test_half_width_latents_find_the_same_entries():
    """Distances are float32 whatever the latents are, under autocast too."""
    generator = torch.Generator().manual_seed(0)
    module = quantizer(4096)
    z = 100 + torch.randn(2, 3, 8, 8, generator=generator)  # far from 0, where bfloat16 has steps of 0.5
    module.embedding.weight.data += 100
    want = module(z)[2][2]
    assert len(want.unique()) > 100
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(z)[2][2], want)
    rounded = z.bfloat16()
    z_q, _, info = module(rounded)
    assert z_q.dtype == torch.bfloat16 and torch.equal(info[2], module(rounded.float())[2][2])


def test_the_codebook_starts_small():
    weight = VectorQuantizer(100, 8).embedding.weight
    assert weight.shape == (100, 8) and 0.009 < weight.abs().max() <= 0.01
