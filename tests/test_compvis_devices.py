"""CompVis's samplers, training and encoders on whatever device the model is on, with the CPU's numbers."""

import copy

import pytest
import torch
from compvis_models import a_batch, built, config, randn
from ldm.models.diffusion.ddim import DDIMSampler, PLMSSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler

PROMPTS = ["a photograph of a cat", "x"]
DEVICES = [
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    pytest.param("mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an MPS device")),
]


@pytest.fixture(scope="module")
def model(clip):
    words = {"placeholder_strings": ["*"], "initializer_words": ["dog"]}
    personal = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": words}
    return built(config(clip, use_ema=True, timesteps=8, personalization_config=personal, embedding_reg_weight=0.1))


@torch.no_grad()
def numbers(model) -> dict[str, torch.Tensor]:
    """What depends on no random number of the device, and whether the rest runs."""
    device, start = model.device, randn(2, 4, 8, 8)
    cond, null = model.get_learned_conditioning(PROMPTS), model.get_learned_conditioning([""] * 2)
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": null, "verbose": False}
    found = {"cond": cond}
    for cls in (DDIMSampler, PLMSSampler, DPMSolverSampler):
        found[cls.__name__] = cls(model).sample(4, 2, (4, 8, 8), cond, x_T=start.to(device), **guided)[0]
    sampler = DDIMSampler(model)
    sampler.make_schedule(4, verbose=False)
    noised = sampler.stochastic_encode(start.to(device), torch.tensor([2, 3]).to(device), noise=start.to(device))
    found["noised"], found["decoded"] = noised, sampler.decode(noised, cond, 2)
    found["encoded"] = sampler.encode(start.to(device), cond, 2)[0]
    t, noise = torch.tensor([1, 6], device=device), randn(2, 4, 8, 8, seed=1).to(device)
    found["loss"] = model.p_losses(start.to(device), cond, t, noise=noise)[0]
    with model.ema_scope():
        found["ema"] = model.apply_model(noised, t, cond)
    found["images"] = model.decode_first_stage(found["DDIMSampler"])
    log = model.log_images(a_batch(), N=2, ddim_steps=2, inpaint=False)  # draws noise of its own
    assert all(torch.isfinite(image).all() for image in log.values())
    model.training_step(a_batch())
    model.on_train_batch_end()
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_the_cpu(model, device):
    expected, found = numbers(copy.deepcopy(model)), numbers(copy.deepcopy(model).to(device))
    for name, value in expected.items():  # relative to the largest: an untrained network amplifies
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3 * float(value.abs().max()), msg=name)


def test_the_sequence_itself(model):
    """On the CPU, so that what other devices are asked is known to run; buffers follow the model."""
    found = numbers(copy.deepcopy(model))
    assert all(torch.isfinite(value).all() for value in found.values())
    sampler = DDIMSampler(model, device=torch.device("cuda"))
    sampler.make_schedule(4)
    assert sampler.device == sampler.ddim_alphas.device == sampler.betas.device == model.betas.device
