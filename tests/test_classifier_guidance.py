"""Classifier guidance against the papers' algorithms and the closed forms of a Gaussian toy."""

import math

import pytest
import torch

from ldm.data.digits import Digits
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.further_guidance import autoguidance, classifier, noisy_log_prob
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("scaled_linear")
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double() * 3

# Data N(M, D) in each pixel; of each, y is seen where x0 + N(0, C) is A: all is Gaussian.

M, D, A, C = 0.3, 0.25, -0.7, 0.4


def gaussian(x, sigma):
    """The exact denoiser of N(M, D)."""
    return Prediction((M * sigma**2 + x * D) / (D + sigma**2))


def log_prob(x, sigma):
    """log p(y | x): x0 given x is N(mean, variance), so that A given x is N(mean, variance + C)."""
    mean, variance = gaussian(x, sigma).x0, D * sigma**2 / (D + sigma**2)
    return (-((mean - A) ** 2) / (2 * (variance + C)) - 0.5 * math.log(variance + C)).flatten(1).sum(1)


def slope(x, sigma):
    """Its gradient by hand."""
    share = D / (D + sigma**2)
    return -share * (gaussian(x, sigma).x0 - A) / (share * sigma**2 + C)


@pytest.mark.parametrize("sigma", [0.02, 1.3, 150.0])
def test_classifier_guidance_at_scale_1_is_the_denoiser_of_the_class(sigma):
    """Bayes: the score of p(x | y) is that of p(x) and the classifier's; of N(mean, variance) the denoiser is known."""
    mean, variance = (M * C + A * D) / (C + D), C * D / (C + D)
    found = classifier(gaussian, log_prob, 1.0)(X, sigma)
    expected = (mean * sigma**2 + X * variance) / (variance + sigma**2)
    assert torch.allclose(found.x0, expected, rtol=1e-12, atol=1e-11)  # sigma^2 times a slope that cancels, at 150
    assert torch.equal(found.unguided, gaussian(X, sigma).x0)


def vp_run(step, noises):
    """A run by the papers' formulas in the variance-preserving frame: x0 at the end. step(x, ab, ab_next, noise)."""
    ab = [*(1 / (1 + s * s) for s in RUN[:-1]), 1.0]
    x = X / math.sqrt(1 + RUN[0] ** 2)
    for now, following, noise in zip(ab[:-1], ab[1:], noises, strict=True):
        x = step(x, now, following, noise)
    return x


RUN = [*SCHEDULE.sigmas[torch.tensor([999, 700, 420, 210, 90, 30, 5])].tolist(), 0.0]
NOISES = [torch.randn(X.shape, generator=torch.Generator().manual_seed(i)).double() for i in range(len(RUN) - 1)]


def slope_vp(x, ab):
    """The gradient of log p(y | x_vp) in x_vp."""
    return slope(x / math.sqrt(ab), math.sqrt((1 - ab) / ab)) / math.sqrt(ab)


def guided_run(sampler, scale):
    noises = iter(NOISES)
    *_, last = SAMPLERS[sampler](classifier(gaussian, log_prob, scale), X, RUN, noise=lambda: next(noises))
    return last.x


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_ddim_is_guided_as_by_algorithm_2_with_its_scale_and_its_root(scale):
    """Common mistakes (E15): without sqrt(1 - ab), without the scale, or not at all in DDIM."""

    def algorithm_2(x, ab, ab_next, noise, root=True):
        x0 = gaussian(x / math.sqrt(ab), math.sqrt((1 - ab) / ab)).x0
        eps = (x - math.sqrt(ab) * x0) / math.sqrt(1 - ab)
        eps = eps - scale * (math.sqrt(1 - ab) if root else 1) * slope_vp(x, ab)
        return math.sqrt(ab_next / ab) * (x - math.sqrt(1 - ab) * eps) + math.sqrt(1 - ab_next) * eps

    got = guided_run("ddim", scale)
    assert torch.allclose(got, vp_run(algorithm_2, NOISES), rtol=1e-10, atol=1e-12)
    rootless = vp_run(lambda *args: algorithm_2(*args, root=False), NOISES)
    assert (got - rootless).abs().mean() > 0.05 and (got - guided_run("ddim", 0.0)).abs().mean() > 0.05


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_large"])
def test_ddpm_is_guided_as_by_algorithm_1_with_the_large_variance(sampler):
    scale = 2.0

    def algorithm_1(x, ab, ab_next, noise):
        alpha, beta = ab / ab_next, 1 - ab / ab_next
        x0 = gaussian(x / math.sqrt(ab), math.sqrt((1 - ab) / ab)).x0
        mean = (math.sqrt(ab_next) * beta * x0 + math.sqrt(alpha) * (1 - ab_next) * x) / (1 - ab)  # E1: the root
        mean = mean + scale * beta / math.sqrt(alpha) * slope_vp(x, ab)
        small = beta * (1 - ab_next) / (1 - ab)
        large = beta if ab_next < 1 else 0.0
        return mean + math.sqrt(small if sampler == "ddpm" else large) * noise

    assert torch.allclose(guided_run(sampler, scale), vp_run(algorithm_1, NOISES), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_guided_result_shifts_as_computed(sampler, scale):
    """With E = C D / (C + D), w = sigma^2 and u = x - M the guided flow is linear,

        2 du/dw = (1 - s) u / (D + w) + s u / (E + w) + s K / (E + w),   K = D (M - A) / (C + D),

    and DDPM's mean has twice that slope. Both are solved by variation of constants around h, the product of the powers
    (D + w)^((1 - s) p) and (E + w)^(s p), p = 1/2 for DDIM and 1 for DDPM."""
    e, k, p = C * D / (C + D), D * (M - A) / (C + D), 1.0 if sampler == "ddpm" else 0.5
    top, steps = 60.0, 1000
    levels = [*torch.logspace(math.log10(top), -3, steps).tolist(), 0.0]

    def h(w):
        return (D + w) ** ((1 - scale) * p) * (e + w) ** (scale * p)

    grid = torch.logspace(-9, math.log10(top**2), 40_001).double()
    inner = scale * p * k / ((e + grid) * h(grid))
    u = h(0.0) * (-M / h(top**2) - torch.trapezoid(inner, grid).item())  # x starts at 0
    start, still = torch.zeros(1, 1).double(), torch.zeros(1, 1).double()  # the mean: noise of mean 0
    *_, last = SAMPLERS[sampler](classifier(gaussian, log_prob, scale), start, levels, noise=lambda: still)
    # Euler's own error: measured at most 7.5e-4
    assert last.x.item() == pytest.approx(M + u, abs=1.5e-3)
    if scale == 1:
        assert M + u == pytest.approx((M * C + A * D) / (C + D), abs=1e-3)  # the class's own mean; the start is off
    assert abs(u) > 0.3  # far from the unguided mean, M


def test_scale_0_is_unguided_to_the_bit_and_asks_no_classifier():
    def never(x, sigma):
        raise AssertionError("called")

    assert classifier(gaussian, never, 0.0) is gaussian


def test_classifier_guidance_adds_to_classifier_free():
    sigma = 1.7
    cond, uncond = ({"c": torch.full((2, 1), value, dtype=torch.float64)} for value in (0.8, 0.4))

    def denoise(x, sigma, cond):
        return Prediction(torch.tanh(cond["c"].view(-1, 1, 1, 1) * x))

    def weak(x, sigma):
        return Prediction(torch.tanh(0.3 * x))

    u, c = torch.tanh(0.4 * X), torch.tanh(0.8 * X)
    for order in (0, 1):
        guided = classifier_free(denoise, cond, uncond, 3.0)
        if order == 0:
            guided = classifier(autoguidance(guided, weak, 2.0), log_prob, 1.5)
        else:
            guided = autoguidance(classifier(guided, log_prob, 1.5), weak, 2.0)
        expected = c + 2 * (c - u) + (c - torch.tanh(0.3 * X)) + 1.5 * sigma**2 * slope(X, sigma)
        found = guided(X, sigma)
        assert torch.allclose(found.x0, expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found.unguided, c, rtol=1e-12, atol=1e-12)


def test_a_networks_log_probability_of_each_images_class():
    weight = torch.randn(5, 4 * 8 * 8, generator=torch.Generator().manual_seed(8)).double().requires_grad_()
    levels = []

    def network(x, t):
        levels.append(t.tolist())
        return x.flatten(1) @ weight.T

    sigma, y = SCHEDULE.sigma_at(321), [3, 1]
    with torch.inference_mode():  # as `generate` has it: what is made here has no gradient by itself
        x, classes = X * 1.0, torch.tensor(y)
        found = classifier(gaussian, noisy_log_prob(network, SCHEDULE, classes), 2.0)(x, sigma)
    assert levels == [[321.0, 321.0]] and weight.grad is None and not found.x0.requires_grad
    frame = 1 / math.sqrt(1 + sigma**2)
    p = (frame * X.flatten(1) @ weight.T).softmax(1).detach()
    expected = frame * (weight[y] - p @ weight).detach().view(X.shape)  # of log softmax, by hand
    assert torch.allclose(found.x0 - gaussian(X, sigma).x0, 2 * sigma**2 * expected, rtol=1e-10, atol=1e-11)
    one = classifier(gaussian, noisy_log_prob(network, SCHEDULE, torch.tensor(1)), 2.0)(X, sigma).x0  # the same for all
    assert torch.equal(one[1], found.x0[1]) and not torch.equal(one[0], found.x0[0])
    some = classifier(gaussian, noisy_log_prob(network, SCHEDULE, torch.tensor([5, 1])), 2.0)(X, sigma).x0  # 5: none
    assert torch.equal(some[1], found.x0[1]) and torch.equal(some[0], gaussian(X, sigma).x0[0])


# Real digits, without a network: of 200 images the exact denoiser is their mean, weighed by how near x is to each.


@pytest.fixture(scope="module")
def digits():
    data = Digits(first=200)
    return torch.nn.functional.avg_pool2d(data.images.double() / 127.5 - 1, 4), data.labels  # (200, 1, 8, 8)


def log_similarity(x, sigma, images):
    """log p(x | image) but for a constant: (b, 200)."""
    return -((x.flatten(1)[:, None] - images.flatten(1)) ** 2).sum(-1) / (2 * sigma**2)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_it_makes_unconditional_digits_those_of_a_class(digits, sampler):
    images, labels = digits
    asked = torch.arange(10).repeat(2)

    def denoise(x, sigma):
        weights = log_similarity(x, sigma, images).softmax(1)
        return Prediction((weights @ images.flatten(1)).view(x.shape))

    def exact(x, sigma):  # log p(y | x): the share of the weights that images of the class have
        near = log_similarity(x, sigma, images)
        of_class = near.masked_fill(labels != asked[:, None], -math.inf)
        return of_class.logsumexp(1) - near.logsumexp(1)

    def right(scale):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(20, 1, 8, 8, generator=generator).double() * 80.0
        levels = [*torch.logspace(math.log10(80.0), -2, 30).tolist(), 0.0]
        fresh = lambda: torch.randn(start.shape, generator=generator).double()  # noqa: E731
        *_, last = SAMPLERS[sampler](classifier(denoise, exact, scale), start, levels, noise=fresh)
        return (labels[log_similarity(last.x, 1.0, images).argmax(1)] == asked).double().mean().item()

    assert right(0.0) < 0.3  # one in ten, by chance
    assert right(1.0) == 1.0  # by Bayes the very denoiser of the class
