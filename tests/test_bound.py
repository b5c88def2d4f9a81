"""The variational bound: closed forms of Gaussians, and of Gaussian data under the exact denoiser."""

import math

import pytest
import torch

from ldm.diffusion.bound import log_bin, log_variances, normal_kl, prior_bits, step_bits
from ldm.diffusion.schedule import make_schedule, q_sample

LINEAR = make_schedule("linear")
N = 20_000  # numbers of one image, over which the Monte Carlo estimates average


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_of_normals():
    """0 of equals; log(s2 / s1) + (s1^2 + d^2) / (2 s2^2) - 1 / 2 of others."""
    mean, log_variance = numbers(5), numbers(5, seed=1)
    assert normal_kl(mean, log_variance, mean, log_variance).tolist() == [0] * 5
    one, two, distance = 0.3, 1.7, 0.9
    expected = math.log(two / one) + (one**2 + distance**2) / (2 * two**2) - 0.5
    given = (torch.tensor(v) for v in (0.0, 2 * math.log(one), distance, 2 * math.log(two)))
    assert float(normal_kl(*given)) == pytest.approx(expected, rel=1e-6)
    first, second = ([numbers(5, seed=seed), numbers(5, seed=seed + 1)] for seed in (2, 4))
    normals = [torch.distributions.Normal(mean, (logvar / 2).exp()) for mean, logvar in (first, second)]
    torch.testing.assert_close(normal_kl(*first, *second), torch.distributions.kl_divergence(*normals))


def test_prior_is_1e_5_bits():
    """Ho et al. 2020, section 4: L_T is about 1e-5 bits per dimension of the linear schedule of 1000."""
    ab = float(LINEAR.alphas_cumprod[-1])
    for value in (0.0, 0.5, 1.0):
        expected = (ab * value**2 - ab - math.log1p(-ab)) / 2 / math.log(2)
        found = float(prior_bits(torch.full((1, 3, 4, 4), value).double(), LINEAR))
        assert found == pytest.approx(expected, rel=1e-6) and found < 3e-5
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    assert float(prior_bits(image, LINEAR)) == pytest.approx(1e-5, rel=0.1)  # ab |x0|^2 / 2, |x0|^2 a third


def test_variances_of_a_step():
    """The posterior's and beta; at t = 0 the decoder takes that of t = 1 for the small one."""
    small, large = log_variances(torch.tensor([0, 1, 999]), LINEAR)
    beta, ab = 1e-4 + (0.02 - 1e-4) * torch.tensor([0, 1, 999]) / 999, LINEAR.alphas_cumprod
    torch.testing.assert_close(large.exp(), beta.double(), rtol=1e-6, atol=0)
    expected = [float(beta[i] * (1 - ab[t - 1]) / (1 - ab[t])) for i, t in ((1, 1), (1, 1), (2, 999))]
    assert small.exp().tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 levels, got T=1"):
        log_variances(torch.tensor([0]), make_schedule("cosine", 1))


def terms(data: float, share, predict, schedule, levels) -> list[float]:
    """The terms of one image of N numbers from N(0, data), predicted by predict(x_t, ab)."""
    x0, found = numbers(1, N) * math.sqrt(data), []
    for t in levels:
        t = torch.tensor([t])
        x = q_sample(x0, t, numbers(1, N, seed=1 + int(t)), schedule)
        found.append(float(step_bits(x0, x, t, predict(x, float(schedule.alphas_cumprod[t])), share, schedule)))
    return found


def test_the_exact_model_of_a_point_costs_nothing():
    """Where x0 is known the posterior is the small variance's step itself."""
    assert terms(0.0, 0.0, lambda x, ab: torch.zeros_like(x), LINEAR, (1, 500, 999)) == pytest.approx(
        [0] * 3, abs=1e-12
    )


def test_the_exact_model_of_a_gaussian_costs_the_information_that_the_levels_lose():
    """For data N(0, 1) the reverse steps are normal with the large variance (Ho et al. 2020, section 3.2), so the terms
    add up to I(x0; x_1) - I(x0; x_T) = log2(1 + SNR_1) / 2 - log2(1 + SNR_T) / 2; and each is such a difference.
    """
    schedule = make_schedule("linear", 20, 0.01, 0.4)

    def information(t):
        return math.log2(1 / (1 - schedule.alphas_cumprod[t])) / 2  # 1 + SNR = 1 / (1 - ab)

    found = terms(1.0, 1.0, lambda x, ab: math.sqrt(ab) * x, schedule, range(1, 20))
    expected = [information(t - 1) - information(t) for t in range(1, 20)]
    assert found == pytest.approx(expected, rel=0.03)  # the share's own noise: 1 / sqrt(20,000) times a few
    assert sum(found) == pytest.approx(information(0) - information(19), rel=0.01)


@pytest.mark.parametrize("data", [0.1, 0.5])
def test_the_best_variance_of_a_gaussian_lies_between_the_two(data):
    """It is small + coefficient^2 Var(x0 | x_t); by it the term is log(best / small) / 2, and more by any other."""
    schedule, t = make_schedule("linear", 20, 0.01, 0.4), 10
    ab, before = (float(schedule.alphas_cumprod[i]) for i in (t, t - 1))
    small, large = (float(log) for log in log_variances(torch.tensor([t]), schedule))
    conditional = data * (1 - ab) / (data * ab + 1 - ab)
    best = math.exp(small) + (math.sqrt(before) * (1 - ab / before) / (1 - ab)) ** 2 * conditional
    share = (math.log(best) - small) / (large - small)
    assert 0 < share < 1

    def predict(x, ab):
        return data * math.sqrt(ab) / (data * ab + 1 - ab) * x

    bits = {s: terms(data, s, predict, schedule, [t])[0] for s in (0.0, share, 1.0)}
    assert bits[share] == pytest.approx((math.log(best) - small) / 2 / math.log(2), rel=0.03)
    assert bits[share] == min(bits.values())
    learned = terms(data, torch.full((1, N), share, dtype=torch.float64), predict, schedule, [t])[
        0
    ]  # as a network gives it
    assert learned == pytest.approx(bits[share], rel=1e-12)


def test_decoder():
    """The 256 bins share out the whole probability; far from the mean too the logarithm is that of the bin."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, deviation in ((0.1, 0.05), (-0.99, 0.3), (2.0, 0.5)):
        logs = log_bin(values, torch.tensor(mean), torch.tensor(2 * math.log(deviation)))
        assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-9)
    logs = log_bin(values[128:129].float(), (values[128] - 0.6).float(), torch.tensor(2 * math.log(0.1)))
    exact = (math.erfc((0.6 - 1 / 255) / 0.1 / 2**0.5) - math.erfc((0.6 + 1 / 255) / 0.1 / 2**0.5)) / 2
    assert float(logs) == pytest.approx(math.log(exact), rel=1e-4)  # 1e-9, which float32 has not beside 1
    assert float(
        step_bits(values[None, 7:8], values[None, 7:8], torch.tensor([0]), values[None, 7:8], 1.0, LINEAR)
    ) == (
        pytest.approx(-math.log2(math.erf(1 / 255 / 0.01 / 2**0.5)), rel=1e-6)  # beta_1 is 0.01 squared
    )


def test_gradients_are_finite_at_every_level():
    t = torch.tensor([0, 1, 999])
    x0, share = torch.full((3, 4), -1.0), torch.full((3, 4), 0.5, requires_grad=True)
    x = q_sample(x0, t, numbers(3, 4).float(), LINEAR)
    bits = step_bits(x0, x, t, x0 + 0.3, share, LINEAR)
    bits.sum().backward()
    assert bits.shape == (3,) and bits.isfinite().all() and share.grad.isfinite().all()
    assert (share.grad[1:].abs() > 0).all()
