import torch
from torch.distributions import Normal, kl_divergence

from ldm.models.distributions import DiagonalGaussianDistribution


def make(seed: int = 0, **options) -> DiagonalGaussianDistribution:
    parameters = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DiagonalGaussianDistribution(parameters, **options)


def test_moments_and_clamp():
    parameters = torch.tensor([1.0, -2.0, 40.0, -50.0]).reshape(1, 4, 1, 1)
    posterior = DiagonalGaussianDistribution(parameters)
    assert posterior.mean.flatten().tolist() == [1.0, -2.0]
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    torch.testing.assert_close(posterior.std**2, posterior.var)
    torch.testing.assert_close(posterior.var, posterior.logvar.exp())
    assert torch.equal(posterior.mode(), posterior.mean)


def test_kl_and_nll_equal_torchs():
    a, b = make(0), make(1)
    normal_a, normal_b = Normal(a.mean, a.std), Normal(b.mean, b.std)
    sample = make(2).mean
    for other, normal in ((None, Normal(torch.zeros_like(a.mean), 1.0)), (b, normal_b)):
        torch.testing.assert_close(a.kl(other), kl_divergence(normal_a, normal).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(a.nll(sample), -normal_a.log_prob(sample).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(a.nll(sample, dims=[1]), -normal_a.log_prob(sample).sum(dim=1))


def test_samples_follow_the_generator_and_the_moments():
    posterior = make()
    first = posterior.sample(torch.Generator().manual_seed(5))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([posterior.sample(generator) for _ in range(4000)])
    # standard errors are std / sqrt(4000) = 1.6 % and std / sqrt(8000) = 1.1 %; five of them, over 96 entries
    assert ((samples.mean(0) - posterior.mean) / posterior.std).abs().max() < 0.08
    assert (samples.std(0) / posterior.std - 1).abs().max() < 0.056


def test_deterministic():
    posterior = make(deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert posterior.kl().tolist() == [0.0, 0.0] and posterior.nll(posterior.mean).tolist() == [0.0, 0.0]


def test_half_precision_parameters_are_computed_in_float32():
    posterior = DiagonalGaussianDistribution(torch.randn(1, 8, 16, 16).bfloat16())
    assert posterior.mean.dtype == posterior.sample().dtype == posterior.kl().dtype == torch.float32
