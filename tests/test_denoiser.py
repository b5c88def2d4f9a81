"""eps, x0, v and flow networks as one denoise(x, sigma, cond), and their training targets."""

import pytest
import torch
from conftest import refused

from ldm.diffusion.denoiser import (
    PREDICTIONS,
    Prediction,
    from_vp,
    make_denoiser,
    network_input,
    predicted_x0,
    scalings,
    split_variance,
    target,
    to_vp,
)
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import sample
from ldm.diffusion.schedule import make_schedule, q_sample, sampling_sigmas
from ldm.diffusion.self_conditioning import self_conditioned


def gaussian_network(schedule, prediction, data_variance=0.25):
    """The exact network for data N(0, data_variance): E[. | x] of eps, x0, v or flow is linear in its input x."""

    def network(x_vp, t, cond):
        if prediction == "flow":
            time = (t / schedule.T).view(-1, 1)
            total = data_variance * (1 - time) ** 2 + time**2
            return (time - data_variance * (1 - time)) / total * x_vp
        ab = schedule.alphas_cumprod[t.long()].to(x_vp).view(-1, 1)
        total = data_variance * ab + 1 - ab
        eps = (1 - ab).sqrt() / total * x_vp
        x0 = data_variance * ab.sqrt() / total * x_vp
        return {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[prediction]

    return network


@pytest.mark.parametrize("t", [0, 20, 500, 999])
def test_one_predictor_in_four_parametrisations_gives_one_x0(t):
    schedule = make_schedule("scaled_linear")
    sigma = schedule.sigma_at(t)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (1 + sigma**2) ** 0.5
    exact = 0.25 / (0.25 + sigma**2) * x
    for prediction in PREDICTIONS:
        x0 = make_denoiser(gaussian_network(schedule, prediction), schedule, prediction)(x, sigma, {}).x0
        assert torch.allclose(x0, exact, rtol=1e-11, atol=1e-13), (
            prediction
        )  # x - sigma eps cancels 3 digits at t = 999


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_noise_level_of_each_image(prediction):
    """As each image alone; the levels lie between the schedule's, too."""
    schedule, generator = make_schedule("flow" if prediction == "flow" else "cosine"), torch.Generator().manual_seed(1)
    sigmas = torch.tensor([0.02, 1.234, 30.0], dtype=torch.float64)
    x, cond = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 1, 1, 1, generator=generator)

    def network(x, t, cond):
        return torch.tanh(x + t.reshape(-1, 1, 1, 1) / 500 + cond["c"])

    denoise = make_denoiser(network, schedule, prediction)
    alone = [denoise(x[i : i + 1], float(sigmas[i]), {"c": cond[i : i + 1]}).x0 for i in range(3)]
    assert torch.equal(denoise(x, sigmas, {"c": cond}).x0, torch.cat(alone))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_training_target_is_what_the_denoiser_inverts(prediction):
    schedule = make_schedule("cosine")
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
    for t in (0, 300, 998):
        level = torch.full((4,), t)
        goal = target(prediction, x0, noise, schedule.alphas_cumprod[level])
        x_vp = q_sample(x0, level, noise, schedule)
        sigma = schedule.sigma_at(t)
        got = make_denoiser(lambda *_, goal=goal: goal, schedule, prediction)(from_vp(x_vp, sigma), sigma, {}).x0
        assert torch.allclose(got, x0, atol=1e-15 * (1 + sigma) * 20)  # eps divides rounding by sqrt(ab)


def test_v_target_is_diffusers_velocity():
    ab = make_schedule("scaled_linear").alphas_cumprod[[0, 500, 999]]
    v = target("v", torch.full((3, 1), 2.0), torch.full((3, 1), -1.0), ab)
    assert v.flatten().tolist() == pytest.approx([-1.05788517, -2.22704649, -2.06359935], rel=1e-6)  # float32


def test_zero_terminal_snr_with_v():
    schedule = make_schedule("scaled_linear", zero_terminal_snr=True)
    sigma = schedule.sigma_at(999)
    x_t = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    seen = []

    def network(x_vp, t, cond):
        seen.append((x_vp, t))
        return gaussian_network(schedule, "v")(x_vp, t, cond)

    x0 = make_denoiser(network, schedule, "v")(from_vp(x_t, sigma), sigma, {}).x0
    # At ab = 0 v = -E[x0] = 0; entering as 2^-24 leaves x_vp / 4096, far below the data's 0.5.
    assert float(x0.abs().max()) < 1e-3
    assert torch.allclose(seen[0][0], x_t, rtol=1e-6) and seen[0][1].tolist() == [999.0]
    # A whole run in float32, from pure noise: N(0, 1) maps linearly to N(0, 0.25); 250 Euler steps are 1 % off.
    denoise = make_denoiser(gaussian_network(schedule, "v"), schedule, "v")
    sigmas = sampling_sigmas(schedule, 250, "trailing")
    *_, last = sample(lambda x, sigma: denoise(x, sigma, {}), from_vp(x_t, sigma), sigmas)
    assert torch.allclose(last.x, 0.5 * x_t, rtol=0.02)


def test_flow_matching_of_a_gaussian():
    """Exact velocities carry N(0, 1) to N(0, 0.25); an Euler step keeps x0 and noise, so that it is DDIM's."""
    schedule = make_schedule("flow", 1000)
    start = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network, sigmas = gaussian_network(schedule, "flow"), sampling_sigmas(schedule, 20, "trailing")
    denoise, times = make_denoiser(network, schedule, "flow"), sigmas / (1 + sigmas)
    *_, last = sample(lambda x, sigma: denoise(x, sigma, {}), from_vp(start, float(sigmas[0])), sigmas)
    x = from_vp(start, float(sigmas[0])) / (1 + sigmas[0])  # x_t = (1 - t) x
    for time, following in zip(times, times[1:], strict=False):
        x = x + (following - time) * network(x, 1000 * time.expand(64), {})
    torch.testing.assert_close(last.x, x, rtol=1e-9, atol=1e-9)
    *_, last = sample(
        lambda x, sigma: denoise(x, sigma, {}),
        from_vp(start, schedule.sigmas[-1].item()),
        sampling_sigmas(schedule, 500, "trailing"),
    )
    assert torch.allclose(last.x, 0.5 * start, rtol=5e-3)


def test_flow_is_diffusers_flow_matching():
    """Inputs, times and steps of FlowMatchEulerDiscreteScheduler, with a shift; its first time is 1, ours 0.99976."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule, received = make_schedule("flow", 1000, shift=3.0), []

    def network(x, t, cond):
        received.append(t[0].item())
        return gaussian_network(schedule, "flow")(x, t, cond)

    start = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    theirs.set_timesteps(10)
    levels = (theirs.sigmas[:-1] / (1 - theirs.sigmas[:-1])).clamp(max=float(schedule.sigmas[-1]))
    sigmas = torch.cat([levels, levels.new_zeros(1)]).double()
    denoise, x = make_denoiser(network, schedule, "flow"), start
    *_, last = sample(lambda x, sigma: denoise(x, sigma, {}), from_vp(start, float(sigmas[0])), sigmas)
    ours = received[:10]
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(8), {}), t, x).prev_sample
    assert ours == pytest.approx(theirs.timesteps.tolist(), rel=3e-4) and torch.allclose(last.x, x, rtol=1e-3)


def test_a_network_that_predicts_flow_gets_the_line_between_image_and_noise():
    schedule, t = make_schedule("flow", 10, shift=2.0), torch.tensor([0, 4, 9])
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, time = network_input("flow", q_sample(x0, t, noise, schedule), t, schedule)
    expected = torch.tensor([2 * u / (1 + u) for u in (0.1, 0.5, 1.0)], dtype=torch.float64)
    torch.testing.assert_close(time / 10, expected)
    torch.testing.assert_close(x, x0 + expected[:, None] * (noise - x0))
    ab, flow = schedule.alphas_cumprod[t], noise - x0
    assert torch.equal(target("flow", x0, noise, ab), flow) and target("flow", x0, noise, ab).shape == x0.shape


def test_the_network_gets_the_level_of_every_sigma():
    schedule = make_schedule("cosine")
    levels = []
    denoise = make_denoiser(lambda x, t, cond: levels.append(t.tolist()) or x, schedule, "eps")
    for sigma in sampling_sigmas(schedule, 4, "trailing")[:-1]:  # 0-d tensors are as good as floats
        denoise(torch.zeros(2, 1), sigma, {})
    denoise(torch.zeros(1, 1), schedule.sigma_at(0.5), {})
    assert levels[:4] == [[999.0] * 2, [749.0] * 2, [499.0] * 2, [249.0] * 2]
    assert levels[4] == pytest.approx([0.5], abs=1e-6)


def test_frames():
    x_vp = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(to_vp(from_vp(x_vp, 12.5), 12.5), x_vp, rtol=1e-15)
    assert torch.equal(to_vp(x_vp, 0.0), x_vp)


def test_unknown_prediction_is_refused():
    for call in (
        lambda: make_denoiser(lambda x, t, cond: x, make_schedule(), "velocity"),
        lambda: target("velocity", torch.zeros(1), torch.zeros(1), torch.ones(1)),
        lambda: scalings("velocity", 1.0),
    ):
        refused("'velocity'; choose from eps, x0, v, flow", call)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_image_at_its_own_level(prediction):
    """Conversions there and back: x0 -> target -> x0, to 1e-6 where x0 is not drowned in noise; and as the denoiser."""
    schedule, t = make_schedule("cosine"), torch.tensor([0, 300, 700, 990])
    x0, noise = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    ab = schedule.alphas_cumprod[t]
    output, x_vp = target(prediction, x0, noise, ab), q_sample(x0, t, noise, schedule)
    back = predicted_x0(prediction, output, x_vp, schedule.sigmas[t])
    limit = 1e-6 * (1 + schedule.sigmas[t]).view(-1, 1, 1, 1) if prediction == "eps" else torch.full((4, 1, 1, 1), 1e-6)
    assert ((back - x0).abs() <= limit * (1 + x0.abs())).all()
    for i, level in enumerate(t.tolist()):
        sigma = schedule.sigma_at(level)
        denoise = make_denoiser(lambda *_, i=i: output[i : i + 1], schedule, prediction)
        one = denoise(from_vp(x_vp[i : i + 1], sigma), sigma, {}).x0
        torch.testing.assert_close(back[i : i + 1], one, rtol=1e-5, atol=1e-5 * sigma)


def test_the_second_half_of_the_channels_is_the_variances_share():
    output = torch.tensor([[0.3, -1.0], [0.5, 1.0]])[..., None, None]
    denoise = make_denoiser(lambda *_: output, make_schedule(), "x0", learned_variance=True)
    found = denoise(torch.zeros(2, 1, 1, 1), 1.0, {})
    assert found.x0.flatten().tolist() == pytest.approx([0.3, 0.5])
    assert found.variance_share.flatten().tolist() == [0, 1]
    guided = classifier_free(denoise, {}, {}, 3.0)(torch.zeros(1, 1, 1, 1), 1.0)
    # the conditioned one's
    assert guided.x0.item() == pytest.approx(0.3 + 3 * 0.2) and guided.variance_share.item() == 1
    assert make_denoiser(lambda *_: output[:, :1], make_schedule(), "x0")(torch.zeros(2, 1, 1, 1), 1.0, {})[1] is None
    with pytest.raises(ValueError, match="returns 2 x 1 channels, but this one returns 3: set out_channels to 2"):
        split_variance(torch.zeros(1, 3, 2, 2), 1)


def test_self_conditioning_gets_its_own_last_x0():
    """Under guidance each half of its own; from one call to the other where guidance begins or ends."""
    received = []

    def denoise(x, sigma, cond):
        received.append(cond["c_concat"].flatten().tolist())
        return Prediction(x + cond["y"].view(-1, 1))

    two = self_conditioned(denoise, 2)
    cond, uncond = {"y": torch.tensor([0.1, 0.2])}, {"y": torch.tensor([-0.1, -0.2])}
    x = torch.tensor([[0.5], [5.0]])
    guided = classifier_free(two, cond, uncond, 2.0, interval=(0.5, 2.0))
    for sigma in (4.0, 3.0, 2.0, 1.0, 0.4):
        guided(x, sigma)
    once, both = pytest.approx([0.6, 1.0]), pytest.approx([0.4, 1.0, 0.6, 1.0])  # clamped to 1
    assert received == [[0, 0], once, pytest.approx([0.6, 1.0, 0.6, 1.0]), both, once]
    self_conditioned(denoise, 2)(x, 1.0, cond)
    assert received[-1] == [0, 0]  # a new wrapper starts from zeros
