"""Samplers against CompVis's runs (golden), the textbook formulas, diffusers, and what theory says of their noise."""

import math
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file

from ldm.diffusion.denoiser import Prediction, from_vp, make_denoiser, to_vp
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.sampling import SAMPLERS, choose_sampler, get_sampler, sample, sampler_named
from ldm.diffusion.sampling.first_order import Point, ancestral_split, euler
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.diffusion.sampling.stochastic import ddpm, ddpm_large
from ldm.diffusion.schedule import make_schedule, q_sample, sampling_sigmas, timesteps

GOLDEN = load_file(Path(__file__).parent / "golden" / "samplers.safetensors")
SD = make_schedule("scaled_linear")


def toy(x, t, cond):
    """The goldens' eps network."""
    c = cond["c_crossattn"][:, :1, :1, None]
    return 0.6 * torch.tanh(x + c) * (0.5 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * x


def toy_denoise(scale, dtype=torch.float32):
    cond, uncond = ({"c_crossattn": GOLDEN[name].to(dtype)} for name in ("toy/c", "toy/uc"))
    return classifier_free(make_denoiser(toy, SD, "eps"), cond, uncond, scale)


def last(steps):
    *_, step = steps
    return step


def relative_error(got, golden):
    return float((got - golden).abs().max() / golden.abs().max())


# CompVis's numbers. The goldens are float32 runs: 5e-6 of the largest is their rounding (golden/README.md).


@pytest.mark.parametrize("name", ["ddim", "plms"])
@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_ddim_and_plms_golden(name, steps, scale):
    sigmas = sampling_sigmas(SD, steps, "compvis", "sigma_min")
    end = last(SAMPLERS[name](toy_denoise(scale), from_vp(GOLDEN["toy/x_T"], float(sigmas[0])), sigmas))
    assert relative_error(to_vp(end.x, end.sigma), GOLDEN[f"toy/{name}/S{steps}/cfg{scale}"]) < 5e-6


@pytest.mark.parametrize("steps", [5, 10, 50])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_dpm_solver_golden(steps, scale):
    """DPM-Solver++(2M) at even, fractional levels of time; CompVis takes the last step at first order if steps < 15."""
    grid = torch.linspace(999, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
    sigmas = sampling_sigmas(SD, steps, grid, "sigma_min")
    denoise, start = toy_denoise(scale), from_vp(GOLDEN["toy/x_T"], float(sigmas[0]))
    if steps < 15:
        end = last(SAMPLERS["dpmpp_2m"](denoise, start, sigmas[:-1]))
        end = last(SAMPLERS["euler"](denoise, end.x, sigmas[-2:]))
    else:
        end = last(SAMPLERS["dpmpp_2m"](denoise, start, sigmas))
    assert relative_error(to_vp(end.x, end.sigma), GOLDEN[f"toy/dpm_solver/S{steps}/cfg{scale}"]) < 5e-6


def test_img2img_golden():
    sigmas = sampling_sigmas(SD, 50, "compvis", "sigma_min")
    noised = q_sample(GOLDEN["toy/img2img/z0"], torch.tensor([741, 741]), GOLDEN["toy/img2img/noise"], SD)
    assert relative_error(noised, GOLDEN["toy/img2img/encoded_t37"]) < 1e-6
    # in sigma coordinates the same image is z0 + sigma noise
    sigma = SD.sigma_at(741)
    same = to_vp(GOLDEN["toy/img2img/z0"] + sigma * GOLDEN["toy/img2img/noise"], sigma)
    assert relative_error(same, noised) < 1e-6
    # CompVis then decodes 37 steps from t = 721, as if the latent were at that level.
    rest = sigmas[-38:]
    assert float(rest[0]) == SD.sigma_at(721)
    end = last(SAMPLERS["ddim"](toy_denoise(5.0), from_vp(noised, float(rest[0])), rest))
    assert relative_error(to_vp(end.x, end.sigma), GOLDEN["toy/img2img/decoded_cfg5"]) < 5e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_sigmas_golden(eta):
    sigmas = sampling_sigmas(SD, 50, "compvis", "sigma_min").flip(0)
    ab = 1 / (1 + sigmas**2)  # ascending in t, ab_0 first
    assert torch.allclose(ab[1:], GOLDEN["ddim_alphas/50"], rtol=1e-13)
    assert torch.allclose(ab[:-1], GOLDEN["ddim_alphas_prev/50"], rtol=1e-13)
    up = [ancestral_split(float(sigmas[i + 1]), float(sigmas[i]), eta)[1] for i in range(50)]
    assert torch.allclose(
        torch.tensor(up, dtype=torch.float64) * ab[:-1].sqrt(), GOLDEN[f"ddim_sigmas/50/eta{eta}"], rtol=1e-12
    )


def test_ddpm_posterior_golden():
    sigmas = [0.0, *SD.sigmas.tolist()]
    rows = []
    for t in range(1000):
        sigma, sigma_next = sigmas[t + 1], sigmas[t]
        down, up = ancestral_split(sigma, sigma_next, 1.0)
        to_next = 1 / math.sqrt(1 + sigma_next**2)
        on_x0, on_x = to_next * (1 - down / sigma), to_next * (down / sigma) * math.sqrt(1 + sigma**2)
        rows.append([(up * to_next) ** 2, math.log(max((up * to_next) ** 2, 1e-20)), on_x0, on_x])
    names = ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
    for got, name in zip(torch.tensor(rows, dtype=torch.float64).T, names, strict=True):
        # stored as float32, from a cumprod in float64: one rounding
        assert torch.allclose(got.float(), GOLDEN[f"ddpm/{name}"], rtol=3e-7, atol=0), name


# The textbook formulas, in the variance-preserving frame, with the same network and noise, in float64.


def textbook_error(steps):
    """Measured: 2e-15 of the largest value for up to 50 steps, 9e-15 for 1000; twice that allows for another libm."""
    return 2e-14 if steps >= 800 else 4e-15


def textbook_ddim(x, levels, noises, eta, large=False):
    """Song et al. 2021, eq. 12 and 16, over levels (t, ab, ab_next). large: their sigma-hat in place of sigma."""
    cond = {"c_crossattn": GOLDEN["toy/c"].double()}
    for (t, ab, ab_next), z in zip(levels, noises, strict=True):
        eps = toy(x, torch.full((2,), t).double(), cond)
        x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        s = eta * math.sqrt((1 - ab_next) / (1 - ab)) * math.sqrt(1 - ab / ab_next)
        spread = eta * math.sqrt(1 - ab / ab_next) if large and ab_next < 1 else s
        x = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next - s * s) * eps + spread * z
    return x


def textbook_ddpm(x, levels, noises):
    """Ho et al. 2020, eq. 6 and 7, with alpha_t = ab / ab_next."""
    cond = {"c_crossattn": GOLDEN["toy/c"].double()}
    for (t, ab, ab_next), z in zip(levels, noises, strict=True):
        eps = toy(x, torch.full((2,), t).double(), cond)
        x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        alpha = ab / ab_next
        mean = math.sqrt(ab_next) * (1 - alpha) / (1 - ab) * x0 + math.sqrt(alpha) * (1 - ab_next) / (1 - ab) * x
        x = mean + math.sqrt((1 - ab_next) / (1 - ab) * (1 - alpha)) * z
    return x


def run_both(steps, spacing, final, step, eta, textbook):
    grid = timesteps(spacing, steps, 1000)
    end = 1.0 if final == "zero" else float(SD.alphas_cumprod[0])
    abs_ = [*SD.alphas_cumprod[grid].tolist(), end]
    levels = list(zip(grid, abs_[:-1], abs_[1:], strict=True))
    noises = torch.randn(steps, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    source = iter(noises)
    sigmas = sampling_sigmas(SD, steps, spacing, final)
    x_T = GOLDEN["toy/x_T"].double()
    start = from_vp(x_T, float(sigmas[0]))
    end = last(sample(toy_denoise(1.0, torch.float64), start, sigmas, step, eta, lambda: next(source)))
    return relative_error(to_vp(end.x, end.sigma), textbook(x_T, levels, noises))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps, spacing", [(10, "compvis"), (50, "compvis"), (30, "trailing"), (7, "linspace")])
def test_ddim_is_the_textbooks(steps, spacing, final, eta):
    assert run_both(steps, spacing, final, euler, eta, lambda *run: textbook_ddim(*run, eta)) < textbook_error(steps)


@pytest.mark.parametrize("steps, spacing", [(1000, "trailing"), (800, "linspace"), (50, "trailing"), (30, "leading")])
def test_ddpm_is_the_textbooks(steps, spacing):
    assert run_both(steps, spacing, "zero", euler, 1.0, textbook_ddpm) < textbook_error(steps)


def test_ddpm_is_the_tutorials_update():
    """x <- (x - beta eps / sqrt(1 - ab)) / sqrt(1 - beta) + sqrt(posterior variance) z, and no z at the last step.

    z is fresh: a second sample from the same prediction differs by it alone.
    """
    schedule, generator = make_schedule("linear", 300), torch.Generator().manual_seed(0)
    x, eps, z = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64, generator=generator)
    ab = [*schedule.alphas_cumprod.tolist()]
    for t in (299, 100, 1, 0):
        before = ab[t - 1] if t > 0 else 1.0
        beta, sigma, sigma_next = 1 - ab[t] / before, schedule.sigma_at(t), schedule.sigma_at(t - 1) if t > 0 else 0.0
        mean = (x - beta / math.sqrt(1 - ab[t]) * eps) / math.sqrt(1 - beta)
        expected = mean + math.sqrt(beta * (1 - before) / (1 - ab[t])) * z
        now = Point(sigma, from_vp(x, sigma), from_vp(x, sigma) - sigma * eps)
        found = to_vp(ddpm(None, [now], sigma_next, 1.0, lambda: z), sigma_next)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(expected, mean)


@pytest.mark.parametrize("steps, eta", [(1000, 1.0), (50, 1.0), (50, 0.5)])
def test_ddpm_large_is_the_textbooks(steps, eta):
    error = run_both(steps, "trailing", "zero", ddpm_large, eta, lambda *run: textbook_ddim(*run, eta, large=True))
    assert error < textbook_error(steps)


def test_auto_is_ddpm_for_all_levels_and_ddim_for_fewer():
    assert [choose_sampler("auto", steps, 300) for steps in (1, 299, 300)] == ["ddim", "ddim", "ddpm"]
    assert choose_sampler("heun", 10, 300) == "heun"


@pytest.mark.parametrize("share, other", [(None, euler), (0.0, euler), (1.0, ddpm_large)])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_learned_variance_runs_from_the_small_to_the_large_one(share, other, eta):
    grid, noise = [14.6, 3.0, 0.4, 0.0], torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()

    def denoise(x, sigma):
        return Prediction(torch.tanh(x), None if share is None else torch.full_like(x, share))

    ends = []
    for step in (ddpm, other):
        noises = iter(noise)
        ends.append(last(sample(denoise, noise[0] * 14.6, grid, step, eta, lambda n=noises: next(n))).x)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1000, 50])
def test_learned_variance_is_the_textbooks(steps):
    """Nichol & Dhariwal 2021, eq. 15: exp(v log beta + (1 - v) log posterior variance), betas of the levels visited."""
    sigmas = sampling_sigmas(SD, steps, "trailing")
    ab, ab_next = (float(1 / (1 + sigmas[i] ** 2)) for i in (steps // 2, steps // 2 + 1))
    share = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    x, noise = torch.randn(2, 2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    now = Point(float(sigmas[steps // 2]), from_vp(x, float(sigmas[steps // 2])), torch.tanh(x), share)
    sigma_next = float(sigmas[steps // 2 + 1])
    found = to_vp(ddpm(None, [now], sigma_next, 1.0, lambda: noise), sigma_next)
    beta = 1 - ab / ab_next
    small = beta * (1 - ab_next) / (1 - ab)
    mean = (math.sqrt(ab_next) * beta * now.x0 + math.sqrt(1 - beta) * (1 - ab_next) * x) / (1 - ab)
    variance = torch.exp(share * math.log(beta) + (1 - share) * math.log(small))
    torch.testing.assert_close(found, mean + variance.sqrt() * noise, rtol=1e-9, atol=1e-12)


# What theory says.


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_large_variance_has_its_closed_form_excess(steps):
    # Unit noise in place of draws, and x0 = 0: a step is x -> down / sigma x + up z, so the variance obeys
    # V' = (down / sigma)^2 V + up^2, which is sigma'^2 plus (sigma' / sigma)^4 of the old excess plus the step's own.
    sigmas = sampling_sigmas(SD, steps, "trailing").tolist()

    def step(x, sigma, after, noise):
        return float(ddpm_large(None, [Point(sigma, x, torch.zeros_like(x))], after, 1.0, noise))

    one, variance, excess = torch.ones(1, 1, dtype=torch.float64), sigmas[0] ** 2, 0.0
    for sigma, after in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        carried, fresh = step(one, sigma, after, torch.zeros_like(one).clone), step(0 * one, sigma, after, one.clone)
        variance = carried**2 * variance + fresh**2
        excess = (after / sigma) ** 4 * excess + (sigma**2 - after**2) ** 2 / (sigma**2 * (1 + sigma**2))
        assert variance == pytest.approx(after**2 + excess, rel=1e-11)
    assert excess > 0
    assert step(one, sigmas[-2], 0.0, None) == 0  # the last step draws none


def gaussian_denoise(schedule):
    """The exact eps network for data N(0, 0.25), as diffusers.md section 3 has it."""

    def network(x, t, cond):
        ab = schedule.alphas_cumprod[t.long()].view(-1, 1).to(x)
        return (1 - ab).sqrt() * x / (0.25 * ab + 1 - ab)

    return classifier_free(make_denoiser(network, schedule, "eps"), {})


@pytest.mark.parametrize(
    "spacing, final, expected",
    [
        ("leading", "sigma_min", (0.406577338, 0.448960907, 0.478573376)),
        ("leading", "zero", (0.404799049, 0.446997241, 0.476480190)),
        ("trailing", "sigma_min", (0.400474161, 0.445490527, 0.477034735)),
    ],
)
def test_ddim_on_the_analytic_gaussian(spacing, final, expected):
    for steps, value in zip((10, 20, 50), expected, strict=True):
        sigmas = sampling_sigmas(SD, steps, spacing, final)
        start = from_vp(torch.ones(1, 1, dtype=torch.float64), float(sigmas[0]))
        end = last(SAMPLERS["ddim"](gaussian_denoise(SD), start, sigmas))
        assert float(to_vp(end.x, end.sigma)) == pytest.approx(value, abs=2e-7)  # diffusers' alphas are float32


@pytest.mark.parametrize(
    "spacing, steps, prediction, one",
    [
        ("leading", 30, "epsilon", False),
        ("leading", 50, "v_prediction", False),
        ("trailing", 50, "epsilon", True),
        ("trailing", 20, "v_prediction", True),
    ],
)
def test_ddim_agrees_with_diffusers(spacing, steps, prediction, one):
    # diffusers' trailing steps to t - 1000 // S, which is right only where S divides 1000; `one`: it ends at ab = 1.
    from diffusers import DDIMScheduler

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    settings |= {"set_alpha_to_one": one, "timestep_spacing": spacing, "prediction_type": prediction}
    theirs = DDIMScheduler(**settings, steps_offset=1)
    theirs.set_timesteps(steps)
    cond = {"c_crossattn": GOLDEN["toy/c"].double()}
    x = x_T = GOLDEN["toy/x_T"].double()
    for t in theirs.timesteps:
        x = theirs.step(toy(x, t.expand(2).double(), cond), t, x).prev_sample
    denoise = classifier_free(make_denoiser(toy, SD, {"epsilon": "eps", "v_prediction": "v"}[prediction]), cond)
    sigmas = sampling_sigmas(SD, steps, spacing, "zero" if one else "sigma_min")
    end = last(SAMPLERS["ddim"](denoise, from_vp(x_T, float(sigmas[0])), sigmas))
    assert relative_error(to_vp(end.x, end.sigma), x) < 5e-6  # their alphas are float32


# The driver, the table and the noise.


def test_steps_are_yielded_as_they_are_made():
    sigmas = [3.0, 1.0, 0.0]
    evaluated = []

    def denoise(x, sigma):
        evaluated.append(sigma)
        return Prediction(x / 2)

    run = sample(denoise, torch.full((1, 1), 4.0), torch.tensor(sigmas))
    first = next(run)
    assert evaluated == [3.0]  # lazy: stopping early costs nothing more
    assert (first.index, first.sigma, float(first.x0)) == (0, 1.0, 2.0)
    assert float(first.x) == pytest.approx(2 + 2 / 3, rel=1e-6)
    second = next(run)
    assert (second.index, second.sigma) == (1, 0.0) and torch.equal(second.x, second.x0)
    assert next(run, None) is None


@pytest.mark.parametrize(
    "sigmas, eta, words",
    [
        ([1.0], 0.0, "two or more sigmas"),
        ([1.0, 0.0, 0.0], 0.0, "above 0 except for the last"),
        ([1.0, 1.0, 0.0], 0.0, "must descend"),
        ([1.0, 0.5, 0.7], 0.0, "must descend"),
        ([1.0, math.nan, 0.0], 0.0, "must descend"),
        ([1.0, 0.0], 1.5, "eta must be from 0 to 1, got 1.5"),
        ([1.0, 0.0], 0.5, "needs a source of noise"),
    ],
)
def test_bad_runs_are_refused_at_the_call(sigmas, eta, words):
    refused(words, sample, lambda x, sigma: Prediction(x), torch.ones(1, 1), sigmas, eta=eta)


def test_the_table():
    assert get_sampler("ddpm").eta == 1.0 and get_sampler("ddim") is SAMPLERS["ddim"]
    assert SAMPLERS["ddim"] == SAMPLERS["euler"] and SAMPLERS["ddpm"] != SAMPLERS["euler_a"]  # by the learned variance
    refused("unknown sampler 'dimm'; choose from ddim, ddpm, ddpm_large, euler.*, lcm", get_sampler, "dimm")
    with pytest.raises(ValueError, match="adds no noise: eta must be 0, got 0.5; samplers with eta: ddim, ddpm"):
        SAMPLERS["plms"](lambda x, sigma: Prediction(x), torch.ones(1, 1), [1.0, 0.0], eta=0.5, noise=lambda: None)
    assert SAMPLERS["plms"].eta is None  # and eta 0 is no eta
    assert last(SAMPLERS["plms"](lambda x, sigma: Prediction(x), torch.ones(1, 1), [1.0, 0.0], eta=0.0)).x == 1


def test_an_image_has_the_same_noise_alone_and_in_a_batch():
    batch = SeededNoise([5, 6, 7], (4, 8, 8))
    alone = SeededNoise([6], (4, 8, 8))
    for _ in range(3):
        together = batch()
        assert together.shape == (3, 4, 8, 8) and together.dtype == torch.float32
        assert torch.equal(together[1:2], alone())
    many = SeededNoise(range(2000), (8,))()
    assert float(many.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * many.numel()))  # four standard errors


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.eta == 1])
def test_a_stochastic_run_does_not_depend_on_the_batch(name):
    sigmas = sampling_sigmas(SD, 6)

    def run(seeds):
        noise = SeededNoise(seeds, (4, 2, 2))
        start = from_vp(noise(), float(sigmas[0]))
        return last(SAMPLERS[name](lambda x, sigma: Prediction(torch.tanh(x)), start, sigmas, noise=noise)).x

    assert torch.allclose(run([3, 4])[1:], run([4]), atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    refused(f"from 0 to 18446744073709551615, got {seed}", SeededNoise, [0, seed], (1,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 3M SDE Exponential", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("DPM2 a Karras", ("dpm2_a", "karras")),
        ("Euler a", ("euler_a", None)),
        ("DDIM", ("ddim", None)),
        ("UniPC", ("unipc", None)),
        ("uni_pc", ("unipc", None)),
        ("dpm_2_ancestral", ("dpm2_a", None)),
        ("sample_euler_ancestral", ("euler_a", None)),
        ("k_dpmpp_2m", ("dpmpp_2m", None)),
        ("ddpm_large", ("ddpm_large", None)),
        ("auto", ("auto", None)),
        ("DPM++ 2S a", ("DPM++ 2S a", None)),  # which are not here, and refused under their names
        ("DDIM CFG++", ("DDIM CFG++", None)),
        ("karras", ("karras", None)),
    ],
)
def test_names_of_other_programs(name, expected):
    assert sampler_named(name) == expected
