"""Guidance against the papers' formulas on the network's own output, and its cost in network calls."""

import math

import pytest
import torch

from ldm.diffusion.denoiser import Prediction, make_denoiser, to_vp
from ldm.diffusion.guidance import classifier_free, clip_x0, dynamic_threshold
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
    s = 4.5  # |x0| runs over 0, 0.1, 0.1, ... 5, 5: its 0.9 quantile, each picture by its own
    assert torch.allclose(x0[1], wild.clamp(-s, s) / s, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"scale": 2.0}, "scale 2.0 needs"),
        ({"scale": 2.0, "uncond": {"c_adm": COND["c_adm"]}}, "same keys and shapes"),
        ({"scale": 2.0, "uncond": conditioning(2, batch=1)}, r"same keys and shapes.*\(2, 3, 5\).*\(1, 3, 5\)"),
        ({"scale": 2.0, "uncond": UNCOND, "interval": (2.0, 1.0)}, "2.0 to 1.0"),
        ({"scale": 2.0, "uncond": UNCOND, "rescale": 1.5}, "from 0 to 1, got 1.5"),
        ({"scale": 2.0, "uncond": UNCOND, "rescale": 0.5}, "unknown prediction None"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        classifier_free(lambda x, sigma, cond: Prediction(x), COND, **arguments)


def test_bad_thresholds_are_named():
    with pytest.raises(ValueError, match="above 0, got 0"):
        clip_x0(lambda x, sigma: Prediction(x), 0)
    with pytest.raises(ValueError, match="at most 1, got 99.5"):
        dynamic_threshold(lambda x, sigma: Prediction(x), 99.5)
