"""Errors, and weights over noise levels: the same weight of the error in x0, whatever the network predicts."""

import pytest
import torch
from conftest import refused

from ldm.diffusion.denoiser import PREDICTIONS, target
from ldm.diffusion.loss import WEIGHTINGS, loss_weight, mean_error
from ldm.diffusion.schedule import make_schedule, q_sample

# The weight of x0's error.
OF_X0 = {"snr": lambda snr: snr, "truncated_snr": lambda snr: snr.clamp(min=1), "min_snr": lambda snr: snr.clamp(max=5)}


def test_min_snr_against_the_papers_table():
    """Hang et al. 2023, section 3.4, at SNR 0.25, 5 and 99 with gamma 5."""
    ab = torch.tensor([0.2, 5 / 6, 0.99], dtype=torch.float64)
    expected = {"x0": [0.25, 5.0, 5.0], "eps": [1.0, 1.0, 5 / 99], "v": [0.25 / 1.25, 5 / 6, 5 / 100]}
    expected["flow"] = [weight / (snr**0.5 + 1) ** 2 for weight, snr in ((0.25, 0.25), (5, 5), (5, 99))]
    for prediction, weights in expected.items():
        assert loss_weight("min_snr", prediction, ab).tolist() == pytest.approx(weights, rel=1e-6), prediction


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", OF_X0)
def test_equal_networks_get_equal_losses(name, prediction):
    """The same estimate of x0, given as eps, x0, v or flow, costs the weight times |error of x0|^2."""
    schedule, t = make_schedule("cosine"), torch.tensor([50, 400, 900])
    generator = torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    x_t, ab = q_sample(x0, t, noise, schedule), schedule.alphas_cumprod[t].double()
    signal, spread = ab.sqrt()[:, None], (1 - ab).sqrt()[:, None]
    guessed_noise = (x_t - signal * guess) / spread
    output = {"eps": guessed_noise, "x0": guess, "v": signal * guessed_noise - spread * guess}
    output = {**output, "flow": guessed_noise - guess}[prediction]
    error = mean_error("l2", output, target(prediction, x0, noise, ab)) * loss_weight(name, prediction, ab)
    expected = OF_X0[name](ab / (1 - ab)) * mean_error("l2", guess, x0)
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)


def test_finite_at_zero_terminal_snr():
    """diffusers' eps weights divide by SNR and become nan there."""
    zero, found = torch.zeros(1), {}
    for name in WEIGHTINGS:
        found[name] = [loss_weight(name, prediction, zero).item() for prediction in PREDICTIONS]
    assert found == {
        "none": [1, 1, 1, 1],
        "snr": [1, 0, 0, 0],
        "truncated_snr": [float("inf"), 1, 1, 1],
        "min_snr": [1, 0, 0, 0],
    }


def test_errors():
    predicted, wanted = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert mean_error("l2", predicted, wanted).tolist() == [2.5, 1.0]
    assert mean_error("l1", predicted, wanted).tolist() == [1.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("min_snr", "v", torch.ones(1), 0.0), "gamma"),
        (("min_snr", "y", torch.ones(1)), "unknown prediction 'y'"),
        (("max_snr", "v", torch.ones(1)), "unknown loss weight 'max_snr'; choose from none, snr"),
    ],
)
def test_refused(arguments, message):
    refused(message, loss_weight, *arguments)
    refused("unknown error 'l3'; choose from l2, l1", mean_error, "l3", torch.ones(1, 1), torch.ones(1, 1))
