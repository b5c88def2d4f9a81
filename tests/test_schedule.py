"""Schedules, spacings and q_sample against CompVis's numbers (golden), diffusers' and closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ldm.diffusion import schedule as S

GOLDEN = load_file(Path(__file__).parent / "golden" / "samplers.safetensors")
# S for which CompVis makes S steps of 1000.
COMPVIS_STEPS = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)


def sd() -> S.Schedule:
    return S.make_schedule("scaled_linear")


@pytest.mark.parametrize(
    "golden, arguments",
    [
        ("linear", ("scaled_linear",)),
        ("linear_ddpm", ("scaled_linear", 1000, 1e-4, 0.02)),
        ("cosine", ("cosine",)),
        ("sqrt_linear", ("linear",)),
        ("sqrt", ("sqrt",)),
    ],
)
def test_betas_are_compvis(golden, arguments):
    # 1 - ab(t+1)/ab(t) of the cosine cancels: one unit in the last place of 1 is all that may differ.
    assert (S.betas(*arguments) - GOLDEN[f"betas/{golden}"]).abs().max() < 4e-16


@pytest.mark.parametrize(
    "arguments, t, expected",
    [
        # number t counts from 1, as in the papers
        (("linear",), 1000, 4.03583e-5),
        (("linear", 300), 300, 0.048058),  # not rescaled with T: the DeepFindr schedule
        (("linear", 300, 1e-4 * 1000 / 300, 0.02 * 1000 / 300), 300, 3.426e-5),
        (("scaled_linear",), 1, 0.99915),
        (("scaled_linear",), 21, 0.981314362200552),
        (("scaled_linear",), 251, 0.673792625233322),
        (("scaled_linear",), 1000, 0.00466009851307724),
        (("scaled_linear", 1000, 0.0015, 0.0195), 1000, 1.423e-4),  # latent diffusion's faces
        (("cosine",), 500, 0.493844),
        (("cosine",), 1000, 2.43e-9),
        (("sigmoid_alphabar",), 500, 0.5),
        (("sigmoid_alphabar",), 1000, 3.0e-7),
        (("vp", 4), 4, 4.319e-5),
    ],
)
def test_alphas_cumprod_facts(arguments, t, expected):
    digits = len(f"{expected:.15g}".split("e")[0].replace(".", "").lstrip("0"))  # the reference is rounded to these
    assert float(S.make_schedule(*arguments).alphas_cumprod[t - 1]) == pytest.approx(expected, rel=10.0 ** (1 - digits))


def test_first_betas_and_the_bound():
    assert float(S.betas("cosine")[0]) == pytest.approx(4.1284e-5, rel=1e-4)
    assert int((S.betas("cosine") == 0.999).sum()) == 1
    assert float(S.betas("sigmoid_alphabar")[0]) == pytest.approx(3.0028e-4, rel=1e-4)
    beta = S.betas("sigmoid_beta")
    expected = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(-u)) for u in (-6, -6 + 12 * 400 / 999, 6)]
    assert beta[[0, 400, 999]].tolist() == pytest.approx(expected, rel=1e-13)


def test_scaled_linear_is_squared():
    """The known mistake: roots that are not squared leave 2.8e-35 of alpha-bar, and there is no image in any level.

    Squared, as Stable Diffusion has it, sqrt(alpha-bar) ends at 0.068265: not at zero SNR either.
    """
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    assert float(S.alphas_cumprod(roots)[-1]) == pytest.approx(2.8e-35, rel=0.02)
    assert torch.equal(S.betas("scaled_linear"), roots**2)
    assert float(sd().alphas_cumprod[-1].sqrt()) == pytest.approx(0.068265, rel=1e-5)


@pytest.mark.parametrize("name", S.SCHEDULES)
def test_more_and_more_noise_is_added(name):
    """betas ascend, all the way up to the bound, and each level keeps less of the image than the one before."""
    assert (S.betas(name).diff() >= 0).all() and (S.make_schedule(name).alphas_cumprod.diff() < 0).all()


def test_the_two_sigmoids_are_two_curves():
    """One is alpha-bar's (Jabri et al. 2022), one beta's own; iDDPM (2021) has neither, but linear and cosine."""
    of_curve, of_beta = (S.make_schedule(name).alphas_cumprod for name in ("sigmoid_alphabar", "sigmoid_beta"))
    assert float((of_curve - of_beta).abs().max()) > 0.1
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000  # alpha-bar itself: a sigmoid from 1 to 0, clipped at its end
    low, high = (1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3)))
    torch.testing.assert_close(of_curve[:999], ((high - torch.sigmoid(6 * u - 3)) / (high - low))[:999])


def test_unscaled_linear_of_300_starts_from_less_than_noise():
    """sqrt(alpha-bar) 0.2192, SNR 0.0505; with betas times 1000 / 300 the last of them is 0.0667."""
    ab = float(S.make_schedule("linear", 300).alphas_cumprod[-1])
    assert (math.sqrt(ab), ab / (1 - ab)) == pytest.approx((0.2192, 0.0505), abs=5e-5)
    assert float(S.betas("linear", 300, 1e-4 * 1000 / 300, 0.02 * 1000 / 300)[-1]) == pytest.approx(0.0667, abs=5e-5)


def test_vp_betas_of_ddgan():
    assert S.betas("vp", 4).tolist() == pytest.approx([0.4783, 0.8492, 0.9564, 0.9874], abs=5e-5)
    # However many steps, they end where the SDE ends: ab(1) / ab(0.001).
    for T in (1, 2, 1000):
        ab = math.exp(-0.1 * 0.999 - 19.9 / 2 * (1 - 1e-6))
        assert float(S.make_schedule("vp", T).alphas_cumprod[-1]) == pytest.approx(ab, rel=1e-10)
    # and of a thousand steps each is near the rate times its duration
    assert float(S.betas("vp")[499]) == pytest.approx(0.999e-3 * (0.1 + 19.9 * 0.5), rel=0.01)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("linaer",), ["linaer", "scaled_linear", "sigmoid_beta"]),
        (("linear", 0), ["T=0"]),
        (("linear", 10, 0.0, 1.5), ["start=0.0", "end=1.5"]),
        (("cosine", 10, 1e-4), ["cosine", "start=0.0001"]),
        (("vp", 4, 0.0, 20.0), ["vp", "start=0.0", "end=20.0"]),
        (("sigmoid_alphabar", 10, 3.0, -3.0), ["start=3.0", "end=-3.0"]),
    ],
)
def test_bad_schedules_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        S.make_schedule(*arguments)
    assert all(word in str(error.value) for word in words)


def test_schedule_refuses_what_is_no_schedule():
    for ab in (torch.tensor([0.9, 0.9]).double(), torch.tensor([1.0, 0.5]).double(), torch.tensor([0.9, 0.5])):
        refused("alphas_cumprod", S.Schedule, ab)


def test_sigmas_are_diffusers():
    # float64 figures of diffusers.md; the last digit given is theirs.
    expected = [0.0291671581517, 0.0413144119968, 0.695798937062, 1.61827882602, 13.1204107426, 14.6146412293]
    assert sd().sigmas[[0, 1, 250, 500, 981, 999]].tolist() == pytest.approx(expected, rel=1e-11)


def test_ddpm_golden_of_the_two_roots():
    assert torch.allclose((1 + sd().sigmas ** 2).sqrt().float(), GOLDEN["ddpm/sqrt_recip_alphas_cumprod"], rtol=2e-7)
    assert torch.allclose(sd().sigmas.float(), GOLDEN["ddpm/sqrt_recipm1_alphas_cumprod"], rtol=2e-6)


def test_zero_terminal_snr_is_diffusers():
    schedule = S.make_schedule("scaled_linear", zero_terminal_snr=True)
    expected = [0.999149978, 0.998233497, 0.65245676, 0.241018638, 0.03279908]
    assert schedule.alphas_cumprod[[0, 1, 250, 500, 750]].tolist() == pytest.approx(expected, rel=3e-6)  # float32 there
    assert float(schedule.alphas_cumprod[998]) == pytest.approx(1.96796336e-7, rel=1e-4)  # roots cancel
    assert float(schedule.alphas_cumprod[999]) == 0
    assert float(schedule.sigmas[999]) == pytest.approx(4096, rel=1e-7)


@pytest.mark.parametrize("name", S.SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("T", [2, 50, 1000])
def test_every_schedule_has_strictly_ascending_finite_sigmas(name, zero, T):
    schedule = S.make_schedule(name, T, zero_terminal_snr=zero)
    assert schedule.sigmas.isfinite().all() and (schedule.sigmas.diff() > 0).all()
    assert [schedule.t_at(float(sigma)) for sigma in schedule.sigmas] == list(range(T))


def test_fractional_levels():
    schedule = sd()
    for t in (0.25, 20.5, 500.125, 998.75):
        assert schedule.t_at(schedule.sigma_at(t)) == pytest.approx(t, abs=1e-9)
    # linear in log ab: half way is the geometric mean
    ab = 1 / (1 + schedule.sigma_at(500.5) ** 2)
    assert ab == pytest.approx(math.sqrt(schedule.alphas_cumprod[500] * schedule.alphas_cumprod[501]), rel=1e-13)
    assert (schedule.t_at(1e-3), schedule.t_at(1e3)) == (0.0, 999.0)
    refused("1000 is outside 0..999", schedule.sigma_at, 1000)


@pytest.mark.parametrize("steps", COMPVIS_STEPS)
def test_compvis_grid_wherever_it_makes_the_steps_asked_for(steps):
    grid = S.timesteps("compvis", steps, 1000)[::-1]
    assert grid == [t + 1 for t in range(0, 1000, 1000 // steps)]
    if steps in (5, 10, 20, 50, 100, 250):
        assert grid == GOLDEN[f"ddim_timesteps/uniform/{steps}"].tolist()


def test_quad_golden_timesteps():
    assert S.timesteps("quad", 10, 1000)[::-1] == GOLDEN["ddim_timesteps/quad/10"].tolist()
    golden = GOLDEN["ddim_timesteps/quad/50"].tolist()
    assert S.compvis_quad(50, 1000) == golden
    ours = S.timesteps("quad", 50, 1000)[::-1]  # 1, 1, 2, 3, 6 become 1, 2, 3, 4, 6
    assert ours[:5] == [1, 2, 3, 4, 6] and ours[4:] == golden[4:]


def test_other_spacings_are_diffusers():
    from diffusers import DDIMScheduler

    for spacing in ("leading", "linspace", "trailing"):
        theirs = DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing=spacing)
        # 1000 and 1 are left out: their leading runs over the table, and their linspace of one step is t = 0.
        for steps in (*range(2, 150), *range(150, 1000, 11)):
            theirs.set_timesteps(steps)
            # [:steps]: at 61 and a few more, rounding gives their trailing one level too many, t = -1.
            assert S.timesteps(spacing, steps, 1000) == theirs.timesteps.tolist()[:steps], (spacing, steps)


def test_spacings_by_hand():
    assert S.timesteps("linspace", 6, 10) == [9, 7, 5, 4, 2, 0]  # rounded down it would be 9, 7, 5, 3, 1, 0
    assert S.timesteps("linspace", 1, 1000) == S.timesteps("trailing", 1, 1000) == [999]
    assert S.timesteps("trailing", 5, 1000) == [999, 799, 599, 399, 199]  # linspace(-1, T - 1, S + 1), in other code
    assert len(S.timesteps("compvis", 300, 1000)) == 300  # CompVis makes 334: range(0, 1000, 1000 // 300)
    assert S.timesteps("leading", 25, 1000)[::-1] == [t + 1 for t in range(0, 1000, 40)]  # guided diffusion: 0 ... 960
    assert S.timesteps("compvis", 3, 1000) == [667, 334, 1]  # CompVis: index 1000 out of bounds
    assert S.timesteps("trailing", 50, 1000) == list(range(999, 0, -20))
    for spacing in S.TIMESTEP_SPACINGS:
        assert S.timesteps(spacing, 1000, 1000) == list(range(999, -1, -1))
        assert S.timesteps(spacing, 1, 1) == [0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_number_of_steps_gives_exactly_that_many_levels(data):
    T = data.draw(st.integers(1, 1200))
    steps = data.draw(st.integers(1, T))
    spacing = data.draw(st.sampled_from(S.TIMESTEP_SPACINGS + S.SIGMA_SPACINGS))
    final = data.draw(st.sampled_from(S.FINAL_SIGMAS))
    schedule = S.make_schedule("scaled_linear", T)
    sigmas = S.sampling_sigmas(schedule, steps, spacing, final)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float64
    assert (sigmas[:-1].diff() < 0).all() and sigmas[-1] <= sigmas[-2]
    assert float(sigmas[-1]) == (0 if final == "zero" else float(schedule.sigmas[0]))
    levels = [schedule.t_at(float(sigma)) for sigma in sigmas[:-1]]
    assert len(set(levels)) == steps and 0 <= min(levels) and max(levels) <= T - 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", S.TIMESTEP_SPACINGS + S.SIGMA_SPACINGS)
def test_steps_out_of_range_are_refused(steps, spacing):
    refused(f"from 1 to 1000 .*got {steps}$", S.sampling_sigmas, sd(), steps, spacing)


def test_unknown_names_are_refused():
    refused("'uniform'.*compvis, leading, linspace, trailing, quad$", S.timesteps, "uniform", 10, 1000)
    refused("'uniform'.*compvis.*karras, exponential", S.sampling_sigmas, sd(), 10, "uniform")
    refused("'one'.*zero, sigma_min", S.sampling_sigmas, sd(), 10, final_sigma="one")
    refused("'normal'.*uniform, logit_normal", S.training_timesteps, "normal", 3, 1000)


def test_sigma_spacings():
    # Karras et al. 2022, eq. 5, written out, and a geometric sequence.
    low, high = 0.0291671581517, 14.6146412293
    karras = S.sampling_sigmas(sd(), 10, "karras")
    for i in range(10):
        expected = (high ** (1 / 7) + i / 9 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        assert float(karras[i]) == pytest.approx(expected, rel=1e-10)
    exponential = S.sampling_sigmas(sd(), 10, "exponential")
    assert np.allclose(exponential[1:10] / exponential[:9], (low / high) ** (1 / 9), rtol=1e-10)
    # The network gets fractions: diffusers' 999, 984.92, 970.38, ... interpolate log sigma, ours log ab: within 0.01.
    levels = [sd().t_at(float(sigma)) for sigma in S.sampling_sigmas(sd(), 50, "karras")[:3]]
    assert levels == pytest.approx([999, 984.92, 970.38], abs=0.01)


def test_levels_of_ones_own():
    grid = [999, 749.5, 499, 0]
    sigmas = [sd().sigma_at(t) for t in grid]
    for spacing in (grid, tuple(grid), "999,749.5,499,0", "999 749.5, 499 0", "sigmas " + " ".join(map(str, sigmas))):
        assert S.sampling_sigmas(sd(), 4, spacing).tolist() == [*sigmas, 0.0]
    assert S.sampling_sigmas(sd(), 1, "sigmas 1.5", "sigma_min").tolist() == [1.5, sigmas[-1]]


@pytest.mark.parametrize(
    "spacing, words",
    [
        ("999,749", "lists 2 noise levels, but the number of steps is 4"),
        ("999,1000,3,1", "timestep 1000.0 is outside 0..999"),
        ([1, 2, 3, 4], "must descend, got \\[1, 2, 3, 4\\]"),
        ([4, 3, 3, 2], "must descend"),
        ([4, 3, 2, -1], "timestep -1.0 is outside 0..999"),
        ("nan 3 2 1", "timestep nan is outside"),
        ("sigmas 15 3 2 1", "sigma 15.0 is outside 0.02916716..14.61464, the model's noise levels"),
        ("sigmas 4 3 2 0", "sigma 0.0 is outside"),
        ("sigmas 4 3 2 nan", "sigma nan is outside"),
        ("sigma 4 3 2 1", "unknown spacing 'sigma 4 3 2 1'; choose from compvis.*or list timesteps"),
        (4, "unknown spacing 4; choose from compvis"),
        ("", "lists 0 noise levels"),
    ],
)
def test_levels_that_do_not_fit_are_named(spacing, words):
    refused(words, S.sampling_sigmas, sd(), 4, spacing)


def test_q_sample_is_diffusers_add_noise():
    x0, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    x = S.q_sample(x0, torch.tensor([0, 500, 999]), noise, sd())
    assert x.flatten().tolist() == pytest.approx([1.96999466, 0.20066029, -0.86113751], abs=1e-6)  # float32
    assert x.dtype == torch.float32


def test_q_sample_is_the_iterated_chain():
    # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise: after t steps mean and variance are those of q_sample.
    mean, variance = 1.0, 0.0
    for beta in S.betas("linear")[:600].tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    one, zero, t = torch.ones(1, 1).double(), torch.zeros(1, 1).double(), torch.tensor([599])
    schedule = S.make_schedule("linear")
    assert float(S.q_sample(one, t, zero, schedule)) == pytest.approx(mean, rel=1e-12)
    assert float(S.q_sample(zero, t, one, schedule)) ** 2 == pytest.approx(variance, rel=1e-12)


def test_q_sample_of_zero_terminal_snr_is_pure_noise():
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    schedule = S.make_schedule("scaled_linear", zero_terminal_snr=True)
    assert torch.equal(S.q_sample(x0, torch.tensor([999, 999]), noise, schedule), noise)


def test_training_timesteps():
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    uniform = S.training_timesteps("uniform", n, 1000, generator=generator)
    assert uniform.dtype == torch.int64 and (int(uniform.min()), int(uniform.max())) == (0, 999)
    assert float(uniform.double().mean()) == pytest.approx(499.5, abs=4 * 289 / n**0.5)
    t = S.training_timesteps("logit_normal", n, 1000, mean=-0.5, std=1.2, generator=generator)
    # quantiles of sigmoid(n) are sigmoids of the normal's; 4 standard errors are below 5 levels at these
    for z, share in ((-1, 0.158655), (0, 0.5), (1, 0.841345)):
        assert float(t.double().quantile(share)) == pytest.approx(1000 / (1 + math.exp(0.5 - 1.2 * z)), abs=5)
    assert int(S.training_timesteps("logit_normal", 4, 1000, mean=1e6).max()) == 999
    again = [S.training_timesteps("logit_normal", 8, 1000, generator=torch.Generator().manual_seed(3)) for _ in "ab"]
    assert torch.equal(*again)
