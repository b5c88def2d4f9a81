"""How CompVis's sampler classes are called: overriding, masks, callbacks, conditioning of any form, inversion."""

import inspect

import pytest
import torch
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from test_compvis_samplers import CLASSES, GOLDEN, SHAPE, UC, X_T, C, Toy, relative_error, run


@pytest.mark.parametrize("name", CLASSES)
def test_conditioning_of_any_form(name):
    wanted, _ = run(CLASSES[name](Toy()))
    model = Toy()
    for wrap in (lambda c: {"c_crossattn": [c], "c_concat": [c, c]}, lambda c: {"c_crossattn": c}, lambda c: [c]):
        got, _ = run(CLASSES[name](model), conditioning=wrap(C), unconditional_conditioning=wrap(UC))
        assert torch.equal(got, wanted)
    both = model.conds[0]["c_concat"][1]
    assert torch.equal(both, torch.cat([UC, C]))  # uncond first


def test_subclasses_override_the_whole_chain():
    calls = []

    class Mine(DDIMSampler):  # the signatures of CompVis's first generation
        def ddim_sampling(self, cond, shape, **kwargs):
            calls.append("sampling")
            return super().ddim_sampling(cond, shape, **kwargs)

        @torch.no_grad()
        def p_sample_ddim(
            self, x, c, t, index, repeat_noise=False, use_original_steps=False, quantize_denoised=False,
            temperature=1.0, noise_dropout=0.0, score_corrector=None, corrector_kwargs=None,
            unconditional_guidance_scale=1.0, unconditional_conditioning=None,
        ):  # fmt: skip
            calls.append(index)
            x_prev, x0 = super().p_sample_ddim(x, c, t, index)
            return x_prev * 0 + index, x0

    samples, _ = run(Mine(Toy()), 5)
    assert calls == ["sampling", 4, 3, 2, 1, 0] and (samples == 0).all()
    calls.clear()
    sampler = Mine(Toy())
    sampler.make_schedule(5)
    assert (sampler.decode(X_T, C, 3) == 0).all() and calls == [2, 1, 0]

    class MyPLMS(PLMSSampler):
        def plms_sampling(self, *args, **kwargs):
            calls.append("sampling")
            return super().plms_sampling(*args, **kwargs)

        def p_sample_plms(self, x, c, t, index, old_eps=None, t_next=None, **kwargs):
            calls.append((index, len(old_eps), int(t_next[0])))
            return super().p_sample_plms(x, c, t, index, old_eps=old_eps, t_next=t_next, **kwargs)

    calls.clear()
    samples, _ = run(MyPLMS(Toy()), 5)
    assert torch.equal(samples, run(PLMSSampler(Toy()), 5)[0])
    assert calls == ["sampling", (4, 0, 601), (3, 1, 401), (2, 2, 201), (1, 3, 1), (0, 3, 1)]

    class Tables(DDIMSampler):
        def make_schedule(self, *args, **kwargs):
            super().make_schedule(*args, **kwargs)
            self.ddim_timesteps = self.ddim_timesteps[:2]  # what is set there is what is used

    model = Toy()
    run(Tables(model), 5)
    assert model.levels == [201, 1]


def test_masks_keep_x0_noised_to_every_level():
    z0 = torch.full((2, *SHAPE), 3.0)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    steps = []

    class Watched(DDIMSampler):
        def p_sample_ddim(self, x, c, t, index, **kwargs):
            steps.append((x, int(t[0])))
            return super().p_sample_ddim(x, c, t, index, **kwargs)

    torch.manual_seed(0)
    run(Watched(Toy()), 5, mask=mask, x0=z0)
    torch.manual_seed(0)
    model = Toy()
    for x, t in steps:
        assert torch.equal(x[..., :4], model.q_sample(z0, torch.tensor([t, t]))[..., :4])
        torch.randn(X_T.shape)  # the step's own noise, for eta 0 too
    assert torch.equal(steps[0][0][..., 4:], X_T[..., 4:])
    for name in ("ddim", "plms"):  # the end is not blended, as in CompVis's
        assert run(CLASSES[name](Toy()), 5, mask=mask, x0=z0)[0].isfinite().all()


def test_random_numbers_are_drawn_as_often_as_in_compvis():
    """So that the second image of a script that seeds once is the same: S draws (PLMS: S + 1), and one for x_T."""
    for name, draws in (("ddim", 11), ("plms", 12), ("dpm_solver", 1)):
        torch.manual_seed(5)
        start, _ = CLASSES[name](Toy()).sample(10, 2, SHAPE, C, x_T=None)
        after = torch.randn(3)
        torch.manual_seed(5)
        x_T, *_ = [torch.randn(2, *SHAPE) for _ in range(draws)]
        assert torch.equal(after, torch.randn(3)), name
        assert torch.equal(start, CLASSES[name](Toy()).sample(10, 2, SHAPE, C, x_T=x_T)[0])


def test_callbacks_and_intermediates():
    seen, images = [], []
    samples, kept = run(
        DDIMSampler(Toy()), 10, callback=seen.append, img_callback=lambda x0, i: images.append((i, x0)), log_every_t=4
    )
    assert seen == list(range(10)) and [i for i, _ in images] == seen
    # the start; then indices 9 (the first step), 8, 4, 0
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 5
    assert torch.equal(kept["x_inter"][0], X_T) and torch.equal(kept["x_inter"][-1], samples)
    assert torch.equal(kept["pred_x0"][-1], images[-1][1]) and torch.equal(kept["pred_x0"][1], images[0][1])
    assert DPMSolverSampler(Toy()).sample(5, 2, SHAPE, C, x_T=X_T, eta=1.0, callback=seen.append)[1] is None


def test_guidance_per_step():
    constant, _ = run(DDIMSampler(Toy()), 5, unconditional_guidance_scale=3.0)
    scheduled, _ = run(DDIMSampler(Toy()), 5, unconditional_guidance_scale=9.0, ucg_schedule=[3.0] * 5)
    assert torch.equal(constant, scheduled)
    model = Toy()
    run(DDIMSampler(model), 5, ucg_schedule=[1.0, 1.0, 4.0, 4.0, 1.0])
    assert [len(c) for c in model.conds] == [2, 2, 4, 4, 2]


def test_original_steps_and_a_part_of_the_steps():
    ab = torch.cumprod(1 - GOLDEN["betas/linear"], 0)
    sampler = DDIMSampler(Toy())
    sampler.make_schedule(10, ddim_eta=1.0)
    # CompVis looks for the sigmas on the model and fails. This is DDPM's posterior, from t = 500 to 499.
    torch.manual_seed(1)
    got, x0 = sampler.p_sample_ddim(X_T, C, torch.full((2,), 500), 500, use_original_steps=True)
    torch.manual_seed(1)
    mean = GOLDEN["ddpm/posterior_mean_coef1"][500] * x0 + GOLDEN["ddpm/posterior_mean_coef2"][500] * X_T
    wanted = mean + GOLDEN["ddpm/posterior_variance"][500].sqrt() * torch.randn(X_T.shape)
    assert relative_error(got, wanted) < 1e-5
    z = sampler.stochastic_encode(X_T, torch.tensor([500, 500]), use_original_steps=True, noise=X_T)
    assert torch.allclose(z, (ab[500].sqrt() + (1 - ab[500]).sqrt()).float() * X_T, atol=1e-6)
    model = Toy()
    sampler = DDIMSampler(model)
    sampler.make_schedule(10)
    sampler.ddim_sampling(C, (2, *SHAPE), x_T=X_T, timesteps=4)  # CompVis drops one of them
    sampler.ddim_sampling(C, (2, *SHAPE), x_T=X_T, timesteps=3, ddim_use_original_steps=True)
    assert model.levels == [301, 201, 101, 1, 2, 1, 0]


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_encode_is_the_inverse_on_the_right_levels(parameterization):
    """CompVis feeds t = 0, 1, 2 ... and takes v for eps. Up and down again misses by O(1 / S)."""
    errors = {}
    for S in (50, 250):
        model = Toy(parameterization)
        sampler = DDIMSampler(model)
        sampler.make_schedule(S)
        seen = []
        z, out = sampler.encode(X_T * 0.5, C, S // 2, callback=seen.append)
        assert model.levels == sampler.ddim_timesteps[: S // 2].tolist() and seen == list(range(S // 2))
        assert out.keys() == {"x_encoded", "intermediate_steps"} and out["x_encoded"] is z
        errors[S] = relative_error(sampler.decode(z, C, S // 2), X_T * 0.5)
    assert errors[250] < 0.01 and errors[250] < errors[50] / 3
    z, out = sampler.encode(X_T, C, 20, return_intermediates=4, unconditional_guidance_scale=2.0,
                            unconditional_conditioning=UC)  # fmt: skip
    assert out["intermediate_steps"] == [0, 5, 10, 15, 18, 19]
    assert len(out["intermediates"]) == 6 and torch.equal(out["intermediates"][-1], z)
    assert sampler.encode(X_T, C, 3, use_original_steps=True)[0].isfinite().all()


def test_one_step_of_encode_is_ddim_s_formula_upwards():
    sampler, model = DDIMSampler(Toy()), Toy()
    sampler.make_schedule(10)
    got, _ = sampler.encode(X_T, C, 1)
    a, above = float(sampler.ddim_alphas_prev[0]), float(sampler.ddim_alphas[0])
    eps = model.apply_model(X_T, torch.tensor([1, 1]), C)
    wanted = (above / a) ** 0.5 * X_T + above**0.5 * ((1 / above - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps
    assert relative_error(got, wanted) < 2e-6


def test_signatures_of_both_generations():
    names = list(inspect.signature(DDIMSampler.sample).parameters)
    assert names == [
        *("self", "S", "batch_size", "shape", "conditioning", "callback", "normals_sequence", "img_callback"),
        *("quantize_x0", "eta", "mask", "x0", "temperature", "noise_dropout", "score_corrector", "corrector_kwargs"),
        *("verbose", "x_T", "log_every_t", "unconditional_guidance_scale", "unconditional_conditioning"),
        *("dynamic_threshold", "ucg_schedule", "kwargs"),
    ]
    for cls in CLASSES.values():
        assert list(inspect.signature(cls.sample).parameters) == names
        assert run(cls(Toy()), 2, verbose=False, features_adapter=None)[0].shape == (2, *SHAPE)  # unknown: swallowed
    for method in ("decode", "encode", "stochastic_encode"):
        assert not hasattr(PLMSSampler, method)


def test_half_precision_and_wide_latents():
    for dtype in (torch.float16, torch.float64):
        samples, _ = run(DDIMSampler(Toy()), 5, x_T=X_T.to(dtype))
        assert samples.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)  # as CompVis's tables do
        assert relative_error(samples, GOLDEN["toy/ddim/S5/cfg7.5"]) < (5e-3 if dtype == torch.float16 else 5e-6)
