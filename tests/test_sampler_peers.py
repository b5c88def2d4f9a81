"""Samplers against diffusers on its own grids, and where diffusers is wrong: its value beside ours.

The problem is data N(0, 0.25), whose exact denoiser is known; both sides get it at the exact sigma of the level.
"""

import math
from itertools import pairwise
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from ldm.diffusion.denoiser import Prediction, from_vp, make_denoiser, to_vp
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import make_schedule, sampling_sigmas

SD = make_schedule("scaled_linear")
THEIR_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DATA = 0.25
FROM_UNIT_NORMAL, FROM_SIGMA = 0.500876, 0.499708  # exact, from t = 999: where x starts at sqrt(1 + sigma^2), or sigma


def gaussian(x, sigma):
    return Prediction(x * DATA / (DATA + sigma**2))


def scheduler(name, **settings):
    return getattr(diffusers, f"{name}Scheduler")(**THEIR_SD, **settings)


def their_run(theirs, steps, noise=None):
    """(end in the variance-preserving frame, sigmas visited) of a diffusers scheduler on the Gaussian problem."""
    theirs.set_timesteps(steps)
    theirs.sigmas = theirs.sigmas.double()  # whose differences, and what DEIS integrates, lose digits in float32
    x = torch.ones(1, 1, dtype=torch.float64) * float(theirs.init_noise_sigma)
    with mock.patch(f"{type(theirs).__module__}.randn_tensor", lambda *a, **k: noise(), create=True):
        for t in theirs.timesteps:
            scaled = theirs.scale_model_input(x, t)
            if theirs.step_index is None:
                theirs._init_step_index(t)
            if bool((scaled != x).any()):  # its x is ours: x0 + sigma noise
                sigma = math.sqrt(float(x / scaled) ** 2 - 1)
                eps = sigma * x / (DATA + sigma**2)
            else:
                sigma = float(theirs.sigmas[theirs.step_index])
                eps = sigma * from_vp(x, sigma) / (DATA + sigma**2)
            x = theirs.step(eps, t, x).prev_sample
    return float(x), list(dict.fromkeys(theirs.sigmas.double().tolist()))


def our_run(name, sigmas, start, eta=None, noise=None):
    x = torch.full((1, 1), float(start), dtype=torch.float64)
    *_, end = SAMPLERS[name](gaussian, x, sigmas, eta, noise)
    return float(to_vp(end.x, end.sigma))


def draws():
    generator = torch.Generator().manual_seed(4)
    return lambda: torch.randn(1, 1, generator=generator).double()


# diffusers and the numbers of k-diffusion on the same grids.


@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("euler", "EulerDiscrete"),
        ("heun", "HeunDiscrete"),
        ("dpm2", "KDPM2Discrete"),
        ("lms", "LMSDiscrete"),
        ("dpmpp_2m", "DPMSolverMultistep"),
        ("unipc", "UniPCMultistep"),
    ],
)
def test_deterministic_samplers_are_diffusers(ours, theirs, spacing):
    for steps in (10, 20, 50):
        theirs_too = scheduler(theirs, **spacing)
        expected, sigmas = their_run(theirs_too, steps)
        starts_at_sigma = "Discrete" in theirs
        start = float(theirs_too.init_noise_sigma) if starts_at_sigma else math.sqrt(1 + sigmas[0] ** 2)
        # some of theirs step in float32
        assert our_run(ours, sigmas, start) == pytest.approx(expected, rel=1e-6), (steps, spacing)


def test_deis_is_diffusers():
    """Of order 3 (theirs is 2 unless asked)."""
    for steps in (20, 50):
        expected, sigmas = their_run(scheduler("DEISMultistep", solver_order=3), steps)
        assert our_run("deis", sigmas, math.sqrt(1 + sigmas[0] ** 2)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    "name, grid, expected",
    [  # after 10, 20 and 50 steps; all in float64
        ("euler", "linspace", (0.388805330, 0.440108109, 0.473615433)),
        ("heun", "linspace", (0.522149186, 0.504462489, 0.499794866)),
        ("lms", "linspace", (0.483993979, 0.500434671, 0.499896719)),
        ("dpmpp_2m", "karras", (0.525462007, 0.506112282, 0.499898227)),
    ],
)
def test_k_diffusions_numbers(name, grid, expected):
    for steps, value in zip((10, 20, 50), expected, strict=True):
        if grid == "linspace":  # sigma linear in t between the levels
            levels = np.interp(np.linspace(999, 0, steps), np.arange(1000), SD.sigmas.numpy()).tolist()
            ours = our_run(name, [*levels, 0.0], levels[0])
            assert ours == pytest.approx(value, rel=4e-6)  # theirs are float32 underneath
        else:
            sigmas = sampling_sigmas(SD, steps, grid)
            # its denoiser rounds sigma to a t between levels, along another curve than the sigmas of the problem
            assert our_run(name, sigmas, float(sigmas[0])) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("steps, value", [(10, 0.483710809), (20, 0.494971414), (50, 0.500388314)])
def test_plms_is_diffusers(steps, value):
    theirs = scheduler("PNDM", skip_prk_steps=True, steps_offset=1, timestep_spacing="leading")
    theirs.set_timesteps(steps)
    x = torch.ones(1, dtype=torch.float64)
    for t in theirs.timesteps:
        sigma = float(SD.sigmas[t])
        x = theirs.step(sigma * from_vp(x, sigma) / (DATA + sigma**2), t, x).prev_sample
    sigmas = sampling_sigmas(SD, steps, "leading", "sigma_min")
    ours = our_run("plms", sigmas, math.sqrt(1 + float(sigmas[0]) ** 2))
    assert ours == pytest.approx(value, rel=1e-6) and ours == pytest.approx(float(x), rel=1e-6)


@pytest.mark.parametrize(
    "ours, theirs, settings",
    [
        ("euler_a", "EulerAncestralDiscrete", {}),
        ("dpm2_a", "KDPM2AncestralDiscrete", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_stochastic_samplers_are_diffusers_with_the_same_noise(ours, theirs, settings):
    for steps in (10, 30):
        theirs_too = scheduler(theirs, timestep_spacing="trailing", **settings)
        expected, sigmas = their_run(theirs_too, steps, draws())
        start = math.sqrt(1 + sigmas[0] ** 2) if "Discrete" not in theirs else float(theirs_too.init_noise_sigma)
        assert our_run(ours, sigmas, start, noise=draws()) == pytest.approx(expected, rel=1e-5), steps


def test_lcm_is_diffusers():
    """But for their boundary condition at t = 0, which is 2e-5 of x at the lowest of these levels."""
    theirs = scheduler("LCM")
    theirs.set_timesteps(4)
    x, noise = torch.ones(1, 1, dtype=torch.float64), draws()
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: noise()):
        for t in theirs.timesteps:
            sigma = float(SD.sigmas[t])
            x = theirs.step(sigma * from_vp(x, sigma) / (DATA + sigma**2), t, x).prev_sample
    sigmas = sampling_sigmas(SD, 4, theirs.timesteps.tolist())
    ours = our_run("lcm", sigmas, math.sqrt(1 + float(sigmas[0]) ** 2), noise=draws())
    assert ours == pytest.approx(float(x), rel=1e-4)


# The exact answers.


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.eta != 1])
def test_the_error_shrinks_towards_the_exact_answer(name):
    for start, exact in ((1.0, FROM_UNIT_NORMAL), (0.0, FROM_SIGMA)):
        errors = []
        for steps in (50, 200, 800):
            sigmas = sampling_sigmas(SD, steps, "karras")
            errors.append(abs(our_run(name, sigmas, math.hypot(start, float(sigmas[0]))) - exact))
        # the last step, from sigma 0.0292 to 0, is the same for all: it leaves 0.5 sigma^2 / 0.5, about 0.0017
        assert errors[2] < max(errors[0] / 2, 2e-3) and errors[2] < 4e-3
        sigmas = sampling_sigmas(SD, 800, "karras")[:-1]
        end = our_run(name, sigmas, math.hypot(start, float(sigmas[0]))) * math.sqrt(1 + float(sigmas[-1]) ** 2)
        there = exact * math.sqrt((DATA + float(sigmas[-1]) ** 2) / DATA)
        assert end == pytest.approx(there, rel=3e-3 if name in ("ddim", "euler", "lcm") else 1e-5)


# Where diffusers is wrong.


def test_theirs_plms_mixes_raw_v():
    """The same denoiser as eps and as v is one denoiser; PNDMScheduler makes two images of it."""
    ends = {}
    for prediction in ("epsilon", "v_prediction"):
        theirs = scheduler(
            "PNDM", skip_prk_steps=True, steps_offset=1, timestep_spacing="leading", prediction_type=prediction
        )
        theirs.set_timesteps(20)
        x = torch.ones(1, dtype=torch.float64)
        for t in theirs.timesteps:
            sigma = float(SD.sigmas[t])
            eps = sigma * from_vp(x, sigma) / (DATA + sigma**2)
            x0 = gaussian(from_vp(x, sigma), sigma).x0
            x = theirs.step(eps if prediction == "epsilon" else to_vp(eps - sigma * x0, sigma), t, x).prev_sample
        ends[prediction] = float(x)
    assert ends == pytest.approx({"epsilon": 0.494971414, "v_prediction": 0.464945}, rel=2e-6)

    def v_network(x_vp, t, cond):
        sigma = SD.sigma_at(float(t[0]))
        x = from_vp(x_vp, sigma)
        return to_vp(sigma * x / (DATA + sigma**2) - sigma * gaussian(x, sigma).x0, sigma)

    denoise = make_denoiser(v_network, SD, "v")
    sigmas = sampling_sigmas(SD, 20, "leading", "sigma_min")
    start = from_vp(torch.ones(1, dtype=torch.float64), float(sigmas[0]))
    *_, end = SAMPLERS["plms"](lambda x, sigma: denoise(x, sigma, {}), start, sigmas)
    assert float(to_vp(end.x, end.sigma)) == pytest.approx(0.494971414, rel=1e-6)


@pytest.mark.parametrize("spacing, missed", [("linspace", 29), ("trailing", 10), ("leading", 0)])
def test_theirs_ddim_steps_beside_its_own_grid(spacing, missed):
    """With the true noise of x0 = 1 their x is off its level after most steps; ours never is (the oracle's test)."""
    theirs = scheduler("DDIM", timestep_spacing=spacing, clip_sample=False, steps_offset=1)
    theirs.set_timesteps(30)
    wrong = 0
    for t, after in pairwise(theirs.timesteps.tolist()):
        sigma, sigma_after = float(SD.sigmas[t]), float(SD.sigmas[after])
        x = to_vp(torch.tensor([1 + sigma], dtype=torch.float64), sigma)  # on its level: x0 = 1, noise = 1
        x = theirs.step(torch.ones(1, dtype=torch.float64), t, x).prev_sample
        wrong += abs(float(from_vp(x, sigma_after)) - (1 + sigma_after)) > 1e-4 * sigma_after
        on_level = torch.tensor([1 + sigma], dtype=torch.float64)
        ours = next(SAMPLERS["ddim"](lambda x, sigma: Prediction(x - sigma), on_level, [sigma, sigma_after]))
        assert float(ours.x) == pytest.approx(1 + sigma_after, rel=1e-12)
    assert wrong == missed


def test_theirs_leading_has_no_thousand_steps():
    theirs = scheduler("DDIM", timestep_spacing="leading", clip_sample=False, steps_offset=1)
    theirs.set_timesteps(1000)
    with pytest.raises(IndexError):
        theirs.step(torch.ones(1), theirs.timesteps[0], torch.ones(1))
    sigmas = sampling_sigmas(SD, 1000, "leading")
    assert our_run("ddim", sigmas, math.sqrt(1 + float(sigmas[0]) ** 2)) == pytest.approx(FROM_UNIT_NORMAL, rel=0.01)


@pytest.mark.parametrize(
    "steps, theirs_end, exact_end", [(10, 0.526303101, 0.526690857), (50, 0.500978564, 0.501067126)]
)
def test_theirs_karras_levels_are_rounded(steps, theirs_end, exact_end):
    """Their 2M evaluates at whole t while it integrates between exact sigmas: an error that no finer grid removes."""
    theirs = scheduler("DPMSolverMultistep", use_karras_sigmas=True)
    theirs.set_timesteps(steps)
    sigmas = sampling_sigmas(SD, steps, "karras").tolist()
    assert np.allclose(theirs.sigmas[:-1], sigmas[:-1], rtol=2e-5)  # float32
    exact = np.array([SD.t_at(sigma) for sigma in sigmas[:-1]])
    assert np.abs(exact - theirs.timesteps.numpy()).max() > 0.25 and (np.diff(exact) < 0).all()
    assert len(set(theirs.timesteps.tolist())) == min(steps, 49)  # ... 2, 1, 1, 0
    rounded = dict(zip(sigmas, SD.sigmas[theirs.timesteps].tolist(), strict=False))

    def theirs_would(x, sigma):  # eps of the rounded level, taken for that of sigma
        level = rounded[sigma]
        return Prediction(x - sigma * level * from_vp(to_vp(x, sigma), level) / (DATA + level**2))

    for denoise, expected in ((theirs_would, theirs_end), (gaussian, exact_end)):
        start = from_vp(torch.ones(1, dtype=torch.float64), sigmas[0])
        *_, end = SAMPLERS["dpmpp_2m"](denoise, start, sigmas)
        assert float(end.x) == pytest.approx(expected, rel=2e-6)


def test_theirs_large_log_variance_is_no_number():
    theirs = scheduler("DDPM", variance_type="fixed_large_log", clip_sample=False)
    theirs.set_timesteps(50)
    assert theirs.step(torch.ones(1, 1), 980, torch.ones(1, 1)).prev_sample.isnan().all()
    sigmas = sampling_sigmas(SD, 50, "trailing")
    assert math.isfinite(our_run("ddpm_large", sigmas, float(sigmas[0]), noise=draws()))


def their_multistep(sigmas, **settings):
    """The standard deviation, over the exact one, that their third-order multistep solver ends with on our grid.

    x holds the parts of the run in independent directions: that of the start, then that of each draw.
    """
    theirs = scheduler("DPMSolverMultistep", solver_order=3, lower_order_final=False, **settings)
    n = len(sigmas) - 1
    theirs.set_timesteps(n)
    theirs.sigmas, theirs.timesteps = torch.tensor(sigmas, dtype=torch.float64), torch.arange(n)
    x = torch.zeros(n + 1, dtype=torch.float64)
    x[0] = math.sqrt((DATA + sigmas[0] ** 2) / (1 + sigmas[0] ** 2))
    for i, sigma in enumerate(sigmas[:-1]):
        theirs._step_index = i
        draw = torch.arange(n + 1).eq(i + 1).double()
        x = theirs.step(sigma * from_vp(x, sigma) / (DATA + sigma**2), i, x, variance_noise=draw).prev_sample
    return float(from_vp(x, sigmas[-1]).norm()) / math.sqrt(DATA + sigmas[-1] ** 2)


def our_multistep(sigmas, eta):
    n, draw = len(sigmas) - 1, iter(range(1, len(sigmas)))
    x = torch.zeros(n + 1, dtype=torch.float64)
    x[0] = math.sqrt(DATA + sigmas[0] ** 2)
    *_, end = SAMPLERS["dpmpp_3m_sde"](gaussian, x, sigmas, eta, lambda: torch.arange(n + 1).eq(next(draw)).double())
    return float(end.x.norm()) / math.sqrt(DATA + sigmas[-1] ** 2)


def test_theirs_third_order_is_second():
    """They give the parabola half its weight. Ends with one step of first order, as theirs does."""
    counts, errors = (40, 80, 160), []
    for n in counts:
        sigmas = sampling_sigmas(SD, n + 1, "karras")[:-1].tolist()
        errors.append([abs(their_multistep(sigmas) - 1), abs(our_multistep(sigmas, 0.0) - 1)])
    theirs, ours = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert theirs == pytest.approx(2, abs=0.2) and ours == pytest.approx(3, abs=0.1)
    assert errors[-1][1] < errors[-1][0] / 5


def test_theirs_third_order_with_noise_is_first():
    """Another sign in the weight of the parabola, which is then not small in a small step."""
    counts, errors = (40, 80, 160), []
    for n in counts:
        sigmas = sampling_sigmas(SD, n + 1, "karras")[:-1].tolist()
        theirs = their_multistep(sigmas, algorithm_type="sde-dpmsolver++")
        errors.append([abs(theirs - 1), abs(our_multistep(sigmas, 1.0) - 1)])
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0][0] == pytest.approx(1, abs=0.2)
    assert all(ours < theirs / 10 for theirs, ours in errors)
