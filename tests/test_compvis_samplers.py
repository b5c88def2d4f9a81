"""CompVis's sampler classes: its numbers (golden), its formulas written out, what subclasses override, its crashes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from safetensors.torch import load_file

GOLDEN = load_file(Path(__file__).parent / "golden" / "samplers.safetensors")
CLASSES = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}
SHAPE = (4, 8, 8)
C, UC, X_T = GOLDEN["toy/c"], GOLDEN["toy/uc"], GOLDEN["toy/x_T"]


def to_tensor(cond):
    """The tensor inside a conditioning of any form."""
    cond = cond["c_crossattn"] if isinstance(cond, dict) else cond
    return torch.cat(cond, 1) if isinstance(cond, list) else cond


class Toy:
    """The goldens' model, as little as a sampler needs; it counts calls, and gives eps, v or x0 of the same noise."""

    num_timesteps = 1000

    def __init__(self, parameterization="eps", ab=None):
        ab = torch.cumprod(1 - GOLDEN["betas/linear"], 0) if ab is None else ab
        self.parameterization, self.alphas_cumprod = parameterization, ab.float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), ab[:-1].float()])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.calls, self.levels, self.conds = 0, [], []

    def apply_model(self, x, t, cond):
        self.calls += 1
        self.levels.append(float(t[0]))
        self.conds.append(cond)
        eps = 0.6 * torch.tanh(x + to_tensor(cond)[:, :1, :1, None]) * (0.5 + t.view(-1, 1, 1, 1) / 1000) + 0.1 * x
        if self.parameterization == "eps":
            return eps
        ab = self.alphas_cumprod[t.long()].view(-1, 1, 1, 1).double()
        x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
        return (x0 if self.parameterization == "x0" else ab.sqrt() * eps - (1 - ab).sqrt() * x0).float()

    def q_sample(self, x0, t):
        ab = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ab.sqrt() * x0 + (1 - ab).sqrt() * torch.randn_like(x0)


def relative_error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


def run(sampler, S=10, **more):
    settings = {"conditioning": C, "x_T": X_T, "unconditional_conditioning": UC, "unconditional_guidance_scale": 7.5}
    return sampler.sample(S, 2, SHAPE, **settings | more)


def at_step(sampler, index=5, **schedule):
    """The timesteps of that step of ten, for a sampler whose schedule is then made, and the network's eps there."""
    sampler.make_schedule(10, **schedule)
    t = torch.full((2,), int(sampler.ddim_timesteps[index]))
    return t, Toy().apply_model(X_T, t, C)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("S", [5, 10, 50])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_golden(name, S, scale):
    model = Toy()
    samples, _ = run(CLASSES[name](model), S, unconditional_guidance_scale=scale)
    # the goldens are float32 runs: 5e-6 of the largest is their rounding (golden/README.md)
    assert relative_error(samples, GOLDEN[f"toy/{name}/S{S}/cfg{scale}"]) < 5e-6
    assert model.calls == S + (name == "plms")  # both halves of guidance in one call; PLMS looks ahead once


def test_golden_img2img():
    sampler = DDIMSampler(Toy())
    sampler.make_schedule(50, verbose=False)
    z = sampler.stochastic_encode(GOLDEN["toy/img2img/z0"], torch.tensor([37, 37]), noise=GOLDEN["toy/img2img/noise"])
    assert relative_error(z, GOLDEN["toy/img2img/encoded_t37"]) < 1e-6
    seen = []
    decoded = sampler.decode(z, C, 37, 5.0, UC, callback=seen.append)
    assert relative_error(decoded, GOLDEN["toy/img2img/decoded_cfg5"]) < 5e-6
    assert seen == list(range(37))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_schedule_attributes(eta):
    sampler = DDIMSampler(Toy(), schedule="linear", device=torch.device("cuda"), unknown=1)
    assert (sampler.ddpm_num_timesteps, sampler.schedule, sampler.device) == (1000, "linear", torch.device("cpu"))
    sampler.make_schedule(ddim_num_steps=50, ddim_discretize="uniform", ddim_eta=eta, verbose=False)
    assert sampler.ddim_timesteps.dtype == np.int64 and isinstance(sampler.ddim_alphas_prev, np.ndarray)
    assert sampler.ddim_timesteps.tolist() == GOLDEN["ddim_timesteps/uniform/50"].tolist()
    # from float32 alpha-bars; the golden ones are float64
    assert np.allclose(sampler.ddim_alphas_prev, GOLDEN["ddim_alphas_prev/50"].numpy(), rtol=1e-6)
    assert torch.allclose(sampler.ddim_alphas.double(), GOLDEN["ddim_alphas/50"], rtol=1e-6)
    assert torch.allclose(sampler.ddim_sigmas, GOLDEN[f"ddim_sigmas/50/eta{eta}"], rtol=1e-5)
    assert (sampler.ddim_alphas.dtype, sampler.ddim_sigmas.dtype) == (torch.float32, torch.float64)
    ab, before = sampler.alphas_cumprod, sampler.alphas_cumprod_prev
    closed = {
        "sqrt_alphas_cumprod": ab.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - ab).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - ab).log(),
        "sqrt_recip_alphas_cumprod": 1 / ab.sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / ab - 1).sqrt(),
        "ddim_sqrt_one_minus_alphas": (1 - sampler.ddim_alphas).sqrt(),
        "ddim_sigmas_for_original_num_steps": eta * ((1 - before) / (1 - ab) * (1 - ab / before)).sqrt(),
        "betas": Toy().betas,
    }
    for name, table in closed.items():
        assert torch.allclose(getattr(sampler, name), table, rtol=1e-6), name
        assert getattr(sampler, name).dtype == torch.float32, name
    assert sampler.ddim_sigmas_for_original_num_steps[0] == 0  # alpha-bar before the first level is 1


def compvis_grid(S, T=1000):
    """CompVis's "uniform" as it is written there."""
    return np.asarray(list(range(0, T, T // S))) + 1


def test_good_grids_are_bit_for_bit_and_the_others_run():
    for S in [s for s in range(1, 1000) if 1000 % s == 0]:
        sampler = DDIMSampler(Toy())
        sampler.make_schedule(S)
        assert (sampler.ddim_timesteps == compvis_grid(S)).all(), S
    crashed = [S for S in range(1, 1001) if compvis_grid(S).max() > 999]
    assert {3, 9, 27, 36, 37, 101, 111, 251, 333, 501, 1000} <= set(crashed)  # as measured on CompVis's code
    for S in [*range(1, 40), 101, 111, 251, 333, 334, 501, 999, 1000]:
        sampler = PLMSSampler(Toy())
        sampler.make_schedule(S)
        steps = sampler.ddim_timesteps
        assert len(steps) == S and steps.min() >= 0 and steps.max() <= 999 and (np.diff(steps) > 0).all(), S
    for S in (3, 9, 27, 501):
        assert run(DDIMSampler(Toy()), S)[0].isfinite().all()
    for name in CLASSES:
        for S in (1, 2):
            assert run(CLASSES[name](Toy()), S)[0].isfinite().all(), (name, S)
    refused("steps must be from 1 to 1000", run, DDIMSampler(Toy()), 1001)


def test_quad_and_unknown_grids():
    sampler = DDIMSampler(Toy())
    sampler.make_schedule(50, ddim_discretize="quad")
    assert sampler.ddim_timesteps.tolist() == GOLDEN["ddim_timesteps/quad/50"].tolist()  # with its repeated levels
    end, _ = sampler.ddim_sampling(C, (2, *SHAPE), x_T=X_T)
    assert end.isfinite().all()
    refused("ddim_discr_method 'cubic'", sampler.make_schedule, 50, ddim_discretize="cubic")


def test_strength_1_and_all_of_the_steps():
    sampler = DDIMSampler(Toy())
    sampler.make_schedule(20)
    z0, noise = GOLDEN["toy/img2img/z0"], GOLDEN["toy/img2img/noise"]
    z = sampler.stochastic_encode(z0, torch.tensor([20, 20]), noise=noise)  # CompVis: index out of bounds
    a = float(sampler.ddim_alphas[-1])
    assert torch.allclose(z, a**0.5 * z0 + (1 - a) ** 0.5 * noise, atol=1e-6)
    assert torch.equal(sampler.decode(z, C, 20, 7.5, UC), run(sampler, 20, x_T=z)[0])


def compvis_step(sampler, x, eps, index, noise, temperature=1.0, x0=None):
    """p_sample_ddim's formulas, as CompVis writes them, in float64."""
    a, before = float(sampler.ddim_alphas[index]), float(sampler.ddim_alphas_prev[index])
    sigma = float(sampler.ddim_sigmas[index])
    x0 = (x.double() - (1 - a) ** 0.5 * eps.double()) / a**0.5 if x0 is None else x0
    return before**0.5 * x0 + (1 - before - sigma**2) ** 0.5 * eps + sigma * noise * temperature, x0


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_each_step_is_compvis_s_formula(eta):
    sampler = DDIMSampler(Toy())
    for index in (9, 4, 0):
        t, eps = at_step(sampler, index, ddim_eta=eta)
        torch.manual_seed(3)
        got, pred_x0 = sampler.p_sample_ddim(X_T, C, t, index, temperature=0.9)
        torch.manual_seed(3)
        wanted, x0 = compvis_step(sampler, X_T, eps, index, torch.randn(X_T.shape), 0.9)
        # float32 against float64, the largest factor of which is 1 / sqrt(a) = 9
        assert relative_error(got, wanted) < 2e-6 and relative_error(pred_x0, x0) < 2e-6


def test_repeated_and_dropped_noise():
    sampler = DDIMSampler(Toy())
    t, eps = at_step(sampler, ddim_eta=1.0)
    for settings, noise in (
        ({"repeat_noise": True}, lambda: torch.randn(1, *SHAPE).repeat(2, 1, 1, 1)),
        ({"noise_dropout": 0.5}, lambda: torch.nn.functional.dropout(torch.randn(X_T.shape), 0.5)),
    ):
        torch.manual_seed(0)
        got, _ = sampler.p_sample_ddim(X_T, C, t, 5, **settings)
        torch.manual_seed(0)
        assert relative_error(got, compvis_step(sampler, X_T, eps, 5, noise())[0]) < 2e-6


def test_quantized_and_thresholded_x0_keep_the_eps():
    class FirstStage:
        def quantize(self, z):
            return z.round(), None, (None, None, None)

    model = Toy()
    model.first_stage_model = FirstStage()
    sampler = DDIMSampler(model)
    t, eps = at_step(sampler)
    x0 = compvis_step(sampler, X_T, eps, 5, 0)[1]
    got, pred_x0 = sampler.p_sample_ddim(X_T, C, t, 5, quantize_denoised=True)
    assert torch.equal(pred_x0, x0.round().float())
    assert relative_error(got, compvis_step(sampler, X_T, eps, 5, 0, x0=x0.round())[0]) < 2e-6
    got, pred_x0 = sampler.p_sample_ddim(X_T, C, t, 5, dynamic_threshold=0.5)
    assert torch.allclose(pred_x0.square().mean(dim=(1, 2, 3)).sqrt(), torch.tensor([0.5, 0.5]))  # both are louder
    assert relative_error(got, compvis_step(sampler, X_T, eps, 5, 0, x0=pred_x0.double())[0]) < 2e-6
    samples, seen = run(DDIMSampler(model), 5, quantize_x0=True, log_every_t=1)
    assert all(torch.equal(x0, x0.round()) for x0 in seen["pred_x0"][1:])


def test_score_corrector():
    class Halved:
        def modify_score(self, model, e_t, x, t, c, factor):
            assert isinstance(model, Toy) and torch.equal(c, C)
            return e_t * factor

    sampler = DDIMSampler(Toy())
    t, eps = at_step(sampler)
    got, _ = sampler.p_sample_ddim(X_T, C, t, 5, score_corrector=Halved(), corrector_kwargs={"factor": 0.5})
    assert relative_error(got, compvis_step(sampler, X_T, eps * 0.5, 5, 0)[0]) < 2e-6


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_what_the_network_predicts_does_not_matter(name, parameterization):
    """CompVis's PLMS and v1 classes know eps alone. The bound is float32 rounding through 1 / sqrt(a), at most 15."""
    wanted, _ = run(CLASSES[name](Toy()), unconditional_guidance_scale=3.0)
    got, _ = run(CLASSES[name](Toy(parameterization)), unconditional_guidance_scale=3.0)
    if name == "dpm_solver":  # asks between the levels, where the toy's v is that of the level below
        assert got.isfinite().all() and got.shape == wanted.shape
    else:
        assert relative_error(got, wanted) < 2e-5


def test_zero_terminal_snr():
    ab = torch.cumprod(1 - GOLDEN["betas/linear"], 0)
    root = ab.sqrt()
    ab = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    sampler = DDIMSampler(Toy("v", ab))
    sampler.make_schedule(10)
    v = sampler.model.apply_model(X_T, torch.full((2,), 900), C)
    sampler.ddim_alphas = sampler.ddim_alphas.clone()
    sampler.ddim_alphas[-1] = 0  # a grid that ends at the last level
    sampler.model.apply_model = lambda x, t, c: v
    _, pred_x0 = sampler.p_sample_ddim(X_T, C, torch.full((2,), 999), 9)
    assert relative_error(pred_x0, -v) < 1e-3  # x0 = -v where there is no signal; alpha-bar 0 enters as 2^-24


def test_plms_multistep_weights():
    """Liu et al. 2022, eq. 9, and the orders before it, on given eps."""
    sampler, old = PLMSSampler(Toy()), [torch.randn(X_T.shape) for _ in range(3)]
    t, eps = at_step(sampler)
    wanted = {
        1: (3 * eps - old[2]) / 2,
        2: (23 * eps - 16 * old[2] + 5 * old[1]) / 12,
        3: (55 * eps - 59 * old[2] + 37 * old[1] - 9 * old[0]) / 24,
    }
    for n, mean in wanted.items():
        x, x0, own = sampler.p_sample_plms(X_T, C, t, 5, old_eps=old[3 - n :], t_next=t)
        assert torch.equal(own, eps)
        wanted_x, wanted_x0 = compvis_step(sampler, X_T, mean, 5, 0)
        assert relative_error(x, wanted_x) < 2e-6 and relative_error(x0, wanted_x0) < 2e-6
    refused("ddim_eta must be 0 for PLMS, got 0.5", run, sampler, eta=0.5)
