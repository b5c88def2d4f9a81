"""Guidance against the papers' formulas and closed forms, and its cost in network calls."""

import math

import pytest
import torch
from conftest import refused

from ldm.diffusion.denoiser import Prediction, make_denoiser, to_vp
from ldm.diffusion.further_guidance import autoguidance, dynamic_threshold, inpaint, perturbed_attention
from ldm.diffusion.guidance import classifier_free, clip_x0, in_interval
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import make_schedule

SCHEDULE = make_schedule("scaled_linear")


class Network:
    """A network of x, t and cond, row by row, that remembers the batch of every call."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, cond):
        self.batches.append(len(x))
        c = cond["c_crossattn"].mean(dim=(1, 2)).view(-1, 1, 1, 1) + cond["c_adm"].mean(dim=1).view(-1, 1, 1, 1)
        return torch.tanh(x * (1 + c) + t.view(-1, 1, 1, 1) / 1000)


def conditioning(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "c_crossattn": torch.randn(batch, 3, 5, generator=generator).double(),
        "c_adm": torch.randn(batch, 4, generator=generator).double(),
    }


COND, UNCOND = conditioning(1), conditioning(2)
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double() * 3


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_guiding_x0_is_guiding_the_network_output(prediction, scale):
    network = Network()
    got = classifier_free(make_denoiser(network, SCHEDULE, prediction), COND, UNCOND, scale)(X, 1.7).x0
    assert network.batches == [4]  # one call for both
    t = torch.full((2,), SCHEDULE.t_at(1.7), dtype=torch.float64)
    u, c = network(to_vp(X, 1.7), t, UNCOND), network(to_vp(X, 1.7), t, COND)
    guided = u + scale * (c - u)
    expected = make_denoiser(lambda *_: guided, SCHEDULE, prediction)(X, 1.7, {}).x0
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_one_single_call_at_scale_1_and_outside_the_interval():
    network = Network()
    denoise = make_denoiser(network, SCHEDULE, "eps")
    plain = denoise(X, 1.0, COND).x0
    for guided in (
        classifier_free(denoise, COND),
        classifier_free(denoise, COND, UNCOND, 1.0),
        classifier_free(denoise, COND, UNCOND, 5.0, interval=(1.5, math.inf)),
        classifier_free(denoise, COND, UNCOND, 5.0, interval=(0.0, 0.5)),
        classifier_free(denoise, COND, UNCOND, 5.0, interval=(1.0, 2.0)),  # low itself is outside
    ):
        network.batches.clear()
        assert torch.equal(guided(X, 1.0).x0, plain)
        assert network.batches == [2]
    network.batches.clear()
    classifier_free(denoise, COND, UNCOND, 5.0, interval=(0.5, 1.0))(X, 1.0)  # high itself is inside
    assert network.batches == [4]


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_every_scale_gives_the_update_and_in_one_form(scale):
    """Common mistakes: E15 (the direction c - u alone is no prediction) and E21 (at scale 1 one result, not two)."""
    u, c = Prediction(torch.full((2, 1), -1.0)), Prediction(torch.tensor([[3.0], [5.0]]))

    def denoise(x, sigma, cond):
        rows = [c.x0[i % 2] if is_cond else u.x0[i % 2] for i, is_cond in enumerate(cond["is_cond"].tolist())]
        return Prediction(torch.stack(rows))

    cond, uncond = {"is_cond": torch.tensor([1, 1])}, {"is_cond": torch.tensor([0, 0])}
    guided = classifier_free(denoise, cond, uncond, scale)
    for found in (
        guided(torch.zeros(2, 1), 1.0),
        autoguidance(guided, lambda x, sigma: c, 3.0)(torch.zeros(2, 1), 1.0),
    ):
        assert isinstance(found, Prediction)
        assert torch.equal(found.x0, u.x0 + scale * (c.x0 - u.x0))  # of each image, itself


def test_a_batch_of_2b_equals_two_of_b():
    denoise = make_denoiser(Network(), SCHEDULE, "v")

    def run(rows):
        cond, uncond = ({key: value[rows] for key, value in c.items()} for c in (COND, UNCOND))
        return classifier_free(denoise, cond, uncond, 4.0, rescale=0.7, prediction="v")(X[rows], 0.8).x0

    assert torch.allclose(torch.cat([run(slice(0, 1)), run(slice(1, 2))]), run(slice(0, 2)), rtol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_rescale_is_the_papers_on_the_network_output(prediction, phi):
    network, sigma, scale = Network(), 2.5, 7.5
    denoise = make_denoiser(network, SCHEDULE, prediction)
    got = classifier_free(denoise, COND, UNCOND, scale, rescale=phi, prediction=prediction)(X, sigma).x0
    t = torch.full((2,), SCHEDULE.t_at(sigma), dtype=torch.float64)
    u, c = network(to_vp(X, sigma), t, UNCOND), network(to_vp(X, sigma), t, COND)
    guided = u + scale * (c - u)
    rescaled = torch.stack([g * (one.std() / g.std()) for g, one in zip(guided, c, strict=True)])
    output = phi * rescaled + (1 - phi) * guided
    expected = make_denoiser(lambda *_: output, SCHEDULE, prediction)(X, sigma, {}).x0
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-11)


def bound(c, calls=None):
    """A denoise that says tanh(c x) and, if asked, counts its calls."""

    def denoise(x, sigma):
        if calls is not None:
            calls.append(sigma)
        return Prediction(torch.tanh(c * x))

    return denoise


def test_guidances_add_up_in_any_order_and_evaluate_the_conditioned_network_once():
    network, sigma = Network(), 1.7
    denoise = make_denoiser(network, SCHEDULE, "v")
    u, c = denoise(X, sigma, UNCOND).x0, denoise(X, sigma, COND).x0
    weak, perturbed = bound(0.3), bound(0.6)
    w, p = weak(X, sigma).x0, perturbed(X, sigma).x0
    expected = c + (3 - 1) * (c - u) + (2 - 1) * (c - w) + 1.5 * (c - p)
    for outer in (0, 1):
        network.batches.clear()
        guided = classifier_free(denoise, COND, UNCOND, 3.0)
        if outer == 0:
            guided = perturbed_attention(autoguidance(guided, weak, 2.0), perturbed, 1.5)
        else:
            guided = autoguidance(perturbed_attention(guided, perturbed, 1.5), weak, 2.0)
        found = guided(X, sigma)
        assert network.batches == [4]
        assert torch.allclose(found.x0, expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(found.unguided, c, rtol=1e-12, atol=1e-12)


def test_without_classifier_free_guidance_they_are_the_papers_formulas():
    denoise, weak = bound(1.0), bound(0.3)
    strong_x0, weak_x0 = torch.tanh(X), torch.tanh(0.3 * X)
    got = autoguidance(denoise, weak, 2.3)(X, 1.0).x0
    assert torch.allclose(got, 2.3 * strong_x0 + (1 - 2.3) * weak_x0, rtol=1e-12, atol=1e-12)  # w D1 + (1 - w) D0
    eps, eps_perturbed = X - strong_x0, X - weak_x0  # at sigma 1
    got = X - perturbed_attention(denoise, weak, 3.0)(X, 1.0).x0
    assert torch.allclose(got, eps + 3 * (eps - eps_perturbed), rtol=1e-12, atol=1e-12)


def test_the_same_model_or_a_scale_that_is_off_changes_nothing():
    denoise, calls = bound(1.0), []
    assert torch.equal(autoguidance(denoise, denoise, 4.0)(X, 1.0).x0, torch.tanh(X))
    assert autoguidance(denoise, bound(0.3, calls), 1.0) is denoise
    assert perturbed_attention(denoise, bound(0.3, calls), 0.0) is denoise
    assert calls == []


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
def test_autoguidance_between_gaussians_has_the_variance_that_can_be_computed(scale):
    """Denoisers of N(0, d): x0 = x d / (d + sigma^2). With d of the model, w of the weak one and s the scale, the
    probability flow d ln x / d sigma = s sigma / (d + sigma^2) + (1 - s) sigma / (w + sigma^2) is solved by
    x ~ (d + sigma^2)^(s / 2) (w + sigma^2)^((1 - s) / 2)."""
    d, w, top = 0.25, 0.6, 20.0

    def gaussian(variance):
        return lambda x, sigma: Prediction(x * variance / (variance + sigma**2))

    sigmas = [*(top * (0.005 / top) ** (i / 199) for i in range(200)), 0.0]
    *_, last = SAMPLERS["heun"](autoguidance(gaussian(d), gaussian(w), scale), torch.ones(1, 1).double(), sigmas)
    expected = (d / (d + top**2)) ** (scale / 2) * (w / (w + top**2)) ** ((1 - scale) / 2)
    # Heun's own error: measured at most 3.3e-4 relative, five times that with 100 steps
    assert last.x.item() == pytest.approx(expected, rel=5e-4)
    assert abs(expected / (d / (d + top**2)) ** 0.5 - 1) > 0.1  # guidance moves it much more


def test_in_interval_calls_one_or_the_other():
    inside, outside = [], []
    chosen = in_interval((0.5, 2.0), bound(1.0, inside), bound(2.0, outside))
    for sigma in (0.5, 0.51, 2.0, 2.01):  # low itself is outside, high inside
        chosen(X, sigma)
    assert inside == [0.51, 2.0] and outside == [0.5, 2.01]
    assert torch.equal(chosen(X, 1.0).x0, torch.tanh(X)) and torch.equal(chosen(X, 3.0).x0, torch.tanh(2 * X))
    refused("3.0 to 1.0", in_interval, (3.0, 1.0), bound(1.0), bound(2.0))


def test_limits_keep_what_guidance_noted():
    guided = autoguidance(bound(1.0), bound(0.3), 2.0)
    everywhere = inpaint(guided, torch.zeros_like(X), torch.ones_like(X))
    for limited in (clip_x0(guided), dynamic_threshold(guided), everywhere):
        assert torch.equal(limited(X, 1.0).unguided, torch.tanh(X))


def test_clip_x0():
    def denoise(x, sigma):
        return Prediction(x)

    x = torch.tensor([[-3.0, -0.5, 0.25, 1.5]])
    assert clip_x0(denoise)(x, 1.0).x0.tolist() == [[-1.0, -0.5, 0.25, 1.0]]
    assert clip_x0(denoise, limit=2.0)(x, 1.0).x0.tolist() == [[-2.0, -0.5, 0.25, 1.5]]


def test_dynamic_threshold():
    def denoise(x, sigma):
        return Prediction(x)

    tame, wild = torch.linspace(-0.8, 0.8, 101), torch.linspace(-5, 5, 101)
    x0 = dynamic_threshold(denoise, 0.9)(torch.stack([tame, wild]).view(2, 1, 1, 101), 1.0).x0.view(2, 101)
    assert torch.equal(x0[0], tame)  # the threshold is never below 1
    s = 4.5  # |x0| runs over 0, 0.1, 0.1, ... 5, 5: its 0.9 quantile, each image by its own
    assert torch.allclose(x0[1], wild.clamp(-s, s) / s, atol=1e-6)


def test_dynamic_threshold_of_latents_reaches_as_far_as_the_unguided_ones():
    """By hand: of the five |x0| 0, 2, 4, 6, 8 the 0.75 percentile is 6, of the unguided 0, 1, 2, 3, 4 it is 3."""
    unguided = torch.tensor([[0.0, 1.0, -2.0, 3.0, -4.0], [0.0, 5.0, -10.0, 15.0, -20.0]])
    x0 = torch.tensor([[0.0, 2.0, -4.0, 6.0, -8.0]] * 2)

    def threshold(prediction):
        return dynamic_threshold(lambda x, sigma: prediction, 0.75, limit=None)(x0, 1.0)

    assert threshold(Prediction(x0, None, unguided)).x0.tolist() == [
        [0.0, 1.0, -2.0, 3.0, -3.0],  # clamped to 6, halved
        [0.0, 2.0, -4.0, 6.0, -8.0],  # reaches less far than unguided: stays
    ]
    assert threshold(Prediction(x0)).x0 is x0  # nothing has guided it
    zeros = torch.zeros_like(x0)
    assert torch.equal(threshold(Prediction(zeros, None, zeros)).x0, zeros)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"scale": 2.0}, "guidance scale 2 needs a null or negative condition; use scale 1"),
        ({"scale": 2.0, "uncond": {"c_adm": COND["c_adm"]}}, "same keys and shapes"),
        ({"scale": 2.0, "uncond": conditioning(2, batch=1)}, r"same keys and shapes.*\(2, 3, 5\).*\(1, 3, 5\)"),
        ({"scale": 2.0, "uncond": UNCOND, "interval": (2.0, 1.0)}, "2.0 to 1.0"),
        ({"scale": 2.0, "uncond": UNCOND, "rescale": 1.5}, "from 0 to 1, got 1.5"),
        ({"scale": 2.0, "uncond": UNCOND, "rescale": 0.5}, "unknown prediction None"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    refused(words, classifier_free, lambda x, sigma, cond: Prediction(x), COND, **arguments)


def test_bad_thresholds_are_named():
    refused("above 0, got 0", clip_x0, lambda x, sigma: Prediction(x), 0)
    refused("at most 1, got 99.5", dynamic_threshold, lambda x, sigma: Prediction(x), 99.5)
    refused("above 0, got -1", dynamic_threshold, lambda x, sigma: Prediction(x), limit=-1)
