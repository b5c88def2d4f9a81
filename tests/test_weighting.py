"""min-SNR: the same weight of the error in x0, whatever the network predicts."""

import pytest
import torch

from ldm.diffusion.denoiser import target
from ldm.diffusion.schedule import make_schedule, q_sample
from ldm.diffusion.weighting import min_snr_weight


def test_against_the_papers_table():
    """Hang et al. 2023, section 3.4, at SNR 0.25, 5 and 99 with gamma 5."""
    ab = torch.tensor([0.2, 5 / 6, 0.99], dtype=torch.float64)
    snr = [0.25, 5.0, 99.0]
    expected = {
        "x0": [0.25, 5.0, 5.0],
        "eps": [1.0, 1.0, 5 / 99],
        "v": [0.25 / 1.25, 5 / 6, 5 / 100],
    }
    for prediction, weights in expected.items():
        assert min_snr_weight(prediction, ab, 5.0).tolist() == pytest.approx(weights, rel=1e-6), (prediction, snr)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_equal_networks_get_equal_losses(prediction):
    """The same guess of x0, told as eps, x0 or v, costs min(SNR, gamma) |error of x0|^2."""
    schedule, t = make_schedule("cosine"), torch.tensor([50, 400, 900])
    generator = torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    x_t, ab = q_sample(x0, t, noise, schedule), schedule.alphas_cumprod[t].double()
    signal, spread = ab.sqrt()[:, None], (1 - ab).sqrt()[:, None]
    guessed_noise = (x_t - signal * guess) / spread
    told = {"eps": guessed_noise, "x0": guess, "v": signal * guessed_noise - spread * guess}[prediction]
    error = (told - target(prediction, x0, noise, ab)).square().sum(1) * min_snr_weight(prediction, ab, 5.0)
    snr = ab / (1 - ab)
    torch.testing.assert_close(error, snr.clamp(max=5) * (guess - x0).square().sum(1), rtol=1e-5, atol=0)


def test_finite_at_zero_terminal_snr():
    """diffusers' eps weights divide by SNR and become nan there."""
    zero = torch.zeros(1)
    assert [min_snr_weight(prediction, zero, 5.0).item() for prediction in ("eps", "x0", "v")] == [1.0, 0.0, 0.0]


def test_mistakes():
    with pytest.raises(ValueError, match="gamma of min-SNR must be above 0"):
        min_snr_weight("v", torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="unknown prediction 'y'"):
        min_snr_weight("y", torch.ones(1), 5.0)
