"""Perturbed attention and autoguide, against attention with the identity as its map, and diffusers."""

import copy
import importlib
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, pixels, randomised, refused
from test_ddgan_stage import stage
from test_pixel_diffusion import build
from tiny_stable_diffusion import PROMPTS, SD1, model_config

from ldm.checkpoint.diffusers_writer import write_pipeline
from ldm.diffusion import further_guidance, guidance
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.sampling import get_sampler
from ldm.diffusion.schedule import sampling_sigmas
from ldm.inference.compile import compile_unet
from ldm.inference.guiders import (
    autoguide,
    check_weak,
    identity_attention,
    load_weak,
    make_guide,
    pag_guide,
    self_attention,
)
from ldm.inference.precision import precision_of, set_precision
from ldm.latent_diffusion import LatentDiffusion
from ldm.models import attention as attention_module
from ldm.models import blocks as blocks_module
from ldm.models.attention import CrossAttention
from ldm.models.blocks import AttentionBlock
from ldm.models.compiler import compile_calls
from ldm.models.kernels import attention
from ldm.models.unet import UNetModel
from ldm.saving import save

ALL = ("input_blocks", "middle_block", "output_blocks")


def changed(params, **changes):
    """A LatentDiffusion with some arguments of its UNet changed."""
    unet = params["unet_config"]
    params = params | {"unet_config": unet | {"params": unet["params"] | changes}}
    torch.manual_seed(0)
    return randomised(LatentDiffusion(**params)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stable_diffusion():
    return changed(SD1)


def hooks(module):
    return sum(len(part._forward_hooks) for part in module.modules())


def to_itself(q, k, v, causal=False, mask=None):
    """Compute attention in which every query sees its own position alone, so that the identity is the map."""
    if q.shape[-2] == k.shape[-2]:  # the texts of these tests are of other lengths
        mask = torch.eye(q.shape[-2], dtype=torch.bool)
    return attention(q, k, v, mask=mask)


def with_identity_maps(monkeypatch, module, *inputs):
    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "attention", to_itself)
        patch.setattr(blocks_module, "attention", to_itself)
        return module(*inputs)


@pytest.mark.parametrize(
    "make",
    [
        partial(CrossAttention, 12, heads=3, dim_head=5),
        partial(AttentionBlock, 12, num_heads=3, norm_groups=4),
        partial(AttentionBlock, 12, num_heads=3, norm_groups=4, use_new_attention_order=True),
    ],
)
@torch.no_grad()
def test_identity_attention_is_attention_with_the_identity_as_its_map(make, monkeypatch):
    torch.manual_seed(1)
    module = randomised(make())
    x = torch.randn(2, 7, 12) if isinstance(module, CrossAttention) else torch.randn(2, 12, 3, 4)
    with identity_attention([module]):
        got = module(x)
    torch.testing.assert_close(got, with_identity_maps(monkeypatch, module, x), atol=1e-6, rtol=1e-5)
    assert (got - module(x)).abs().max() > 0.01  # and that is not its usual output


@torch.no_grad()
def test_by_hand_with_the_identity_written_out():
    torch.manual_seed(2)
    module, x = CrossAttention(6, heads=2, dim_head=4), torch.randn(1, 5, 6)
    v = module.to_v(x).view(1, 5, 2, 4).transpose(1, 2)  # (b, h, n, d)
    out = module.to_out((torch.eye(5) @ v).transpose(1, 2).reshape(1, 5, 8))
    with identity_attention([module]):
        torch.testing.assert_close(module(x), out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("transformer", [True, False])
@torch.no_grad()
def test_a_unet_with_all_its_self_attention_perturbed(monkeypatch, transformer):
    own = TINY["unet_config"]["params"] | {"attention_resolutions": [1, 2]}
    if not transformer:
        own |= {"use_spatial_transformer": False, "context_dim": None}
    torch.manual_seed(0)
    unet = randomised(UNetModel(**own)).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), torch.randn(2, 24)
    context = torch.randn(2, 9, 32) if transformer else None
    with identity_attention(self_attention(unet, ALL)):
        got = unet(x, t, context, y)
    expected = with_identity_maps(monkeypatch, unet, x, t, context, y)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - unet(x, t, context, y)).abs().max() > 1e-3


def test_layers_are_named_and_those_without_self_attention_refused(stable_diffusion):
    unet = stable_diffusion.model.diffusion_model
    (middle,) = self_attention(unet, ["middle_block"])
    assert middle is unet.middle_block[1].transformer_blocks[0].attn1
    (first,) = self_attention(unet, ["input_blocks.1"])
    assert first is unet.input_blocks[1][1].transformer_blocks[0].attn1
    assert self_attention(unet, ["input_blocks.1.1.transformer_blocks.0.attn1", "input_blocks.1"]) == [first]
    every = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    assert self_attention(unet, ALL) == every and len(every) == 7
    for layer in ("input_blocks.5", "middle", "input_blocks.1.1.transformer_blocks.0.attn2", ""):
        with pytest.raises(ValueError, match=f"layer '{layer}' has no self.*input_blocks.1, .*middle_block, output_bl"):
            self_attention(unet, ["middle_block", layer])


def test_attention_to_the_context_is_no_self_attention():
    model = changed(TINY, disable_middle_self_attn=True)
    refused("in input_blocks.3, output_blocks.0, output_blocks.1$", pag_guide, model, 1.0)
    alone = changed(TINY, disable_middle_self_attn=True, disable_self_attentions=[True, True])
    refused("has it in none", pag_guide, alone, 1.0)


def test_it_ends_on_an_error_and_stays_in_its_thread():
    module, x = CrossAttention(6, heads=2, dim_head=4), torch.randn(1, 5, 6)
    usual, elsewhere = module(x), []
    with pytest.raises(KeyError), identity_attention([module]):
        thread = threading.Thread(target=lambda: elsewhere.append(module(x)))
        thread.start()
        thread.join()
        assert not torch.allclose(module(x), usual)
        raise KeyError
    assert torch.equal(elsewhere[0], usual) and torch.equal(module(x), usual)
    assert hooks(module) == 0 and "forward" not in vars(module)


def test_two_threads_may_perturb_the_same_module_and_end_in_any_order():
    module, x = CrossAttention(6, heads=2, dim_head=4), torch.randn(1, 5, 6)
    importlib.import_module("torch._dynamo")  # of which each of them leaves the state alone
    usual, inside, leave = module(x), threading.Event(), threading.Event()

    def other():
        with identity_attention([module]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with identity_attention([module]):
        thread.start()
        inside.wait(10)
        perturbed = module(x)
    assert torch.equal(module(x), usual) and not torch.allclose(perturbed, usual)
    leave.set()
    thread.join()
    assert torch.equal(module(x), usual) and hooks(module) == 0
    with compile_calls(module, "--compile", "eager"):  # a ValueError, were torch left to compute uncompiled
        assert torch.equal(module(x), usual)


@pytest.mark.parametrize("scale, cfg", [(3.0, 1.0), (2.0, 4.0)])
def test_diffusers_generates_the_same_with_perturbed_attention(stable_diffusion, tmp_path, monkeypatch, scale, cfg):
    """With classifier-free guidance and without: eps + (cfg - 1) (eps - eps_uncond) + scale (eps - eps_perturbed)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import StableDiffusionPAGPipeline

    model = stable_diffusion
    write_pipeline(tmp_path / "sd", model_config(model.config), model.state_dict())
    pipe = StableDiffusionPAGPipeline.from_pretrained(tmp_path / "sd", local_files_only=True, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 4, "guidance_scale": cfg, "pag_scale": scale, "output_type": "latent"}
    theirs = pipe(PROMPTS, negative_prompt=[""] * 2, latents=x, **options).images
    sigmas = sampling_sigmas(model.schedule, 4, "leading")
    with torch.inference_mode():
        cond = model.condition(PROMPTS)
        plain = guidance.classifier_free(model.denoiser(), cond, model.condition([""] * 2), cfg)

        def sample(denoise):
            *_, step = get_sampler("ddim")(denoise, x * (1 + sigmas[0] ** 2).sqrt().float(), sigmas)
            return step.x

        ours, unperturbed = sample(pag_guide(model, scale)(plain, cond, PROMPTS)), sample(plain)
    # float32 and other kernels over 4 steps
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (unperturbed - ours).abs().max() > 0.01


def test_scale_0_is_off_and_costs_nothing(model, monkeypatch):
    usual = pixels(model.generate(["five"], steps=3))
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", None)  # nothing is ever perturbed
    guide = pag_guide(model, 0.0)
    assert np.array_equal(pixels(model.generate(["five"], steps=3, guide=guide)), usual)
    assert make_guide(model) is None


def test_what_would_have_no_effect_is_refused(model):
    refused("pag_layers has no effect without pag", make_guide, model, pag_layers=["middle_block"])
    refused("autoguide_scale has no effect without weak", make_guide, model, pag=1, autoguide_scale=1)
    refused("classifier_scale has no effect without classifier", make_guide, model, classifier_scale=0)


def test_a_guide_acts_inside_the_interval_alone(model):
    """3 images at sigma 2^12, 2.41, 1 and 0.41: unconditional and conditional in one call, then perturbed."""
    batches = []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    guide = pag_guide(model, 2.0)
    generate = partial(model.generate, ["five"] * 3, steps=4)
    guided = pixels(generate(interval=(0.5, 2.5), guide=guide))
    assert batches == [3, 6, 3, 6, 3, 3]
    assert not np.array_equal(guided, pixels(generate(interval=(0.5, 2.5))))
    batches.clear()
    assert np.array_equal(pixels(generate(interval=(5, 6), guide=guide)), pixels(generate(scale=1.0)))
    assert batches == [3] * 8


def test_compiled_and_autocast_models_are_perturbed_too(model):
    guide = pag_guide(model, 3.0)
    generate = partial(model.generate, ["five"], steps=3, scale=1.0)
    usual, guided = pixels(generate()), pixels(generate(guide=guide))
    assert abs(guided - usual).max() > 20
    with compile_unet(model, backend="eager"):
        assert abs(pixels(generate()) - usual).max() <= 1
        assert abs(pixels(generate(guide=guide)) - guided).max() <= 1
    set_precision(model, "autocast")
    assert abs(pixels(generate(guide=guide)) - guided).mean() < 0.2 * abs(guided - usual).mean()


def test_no_hook_remains_when_sampling_fails(model):
    def fail(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(["five"], steps=2, guide=pag_guide(model, 1.0), callback=fail)
    assert hooks(model.model) == 0


def weaker(model, seed=5):
    """The model with noise in the weights of its UNet."""
    weak = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for p in weak.model.parameters():
        p.data += 0.3 * p.std(correction=0) * torch.randn(p.shape, generator=generator)
    return weak


def test_autoguidance_by_the_model_itself_changes_nothing_and_by_a_weaker_one_is_its_formula(model):
    generate = partial(model.generate, ["five", "six"], steps=3)
    same = autoguide(model, model, 3.0)
    assert np.array_equal(pixels(generate(scale=1.0, guide=same)), pixels(generate(scale=1.0)))
    assert abs(pixels(generate(guide=same)) - pixels(generate())).max() <= 1  # batches of 4 and 2 round differently
    weak = weaker(model)
    with torch.inference_mode():
        cond, uncond = model.condition(["five", "six"]), model.condition([""] * 2)
        x = 2 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        u, c, w = (m.denoiser()(x, 1.5, c).x0 for m, c in ((model, uncond), (model, cond), (weak, cond)))
        guided = guidance.classifier_free(model.denoiser(), cond, uncond, 4.0)
        got = autoguide(model, weak, 2.5)(guided, cond, ["five", "six"])(x, 1.5).x0
    torch.testing.assert_close(got, c + 3 * (c - u) + 1.5 * (c - w), atol=1e-4, rtol=1e-4)
    assert (c - w).abs().max() > 0.05


def test_a_weaker_model_may_have_another_scale_factor_schedule_and_prediction(model):
    """The weak one has latents 1.5 times as large; both denoise N(0, 0.4^2) exactly, each in its own units."""
    weak = copy.deepcopy(model)
    weak.scale_factor = 1.5 * model.scale_factor

    def gaussian(d):
        return lambda x, sigma, cond=None: Prediction(x * d**2 / (d**2 + sigma**2))

    weak.denoiser = lambda: gaussian(0.6)
    x = torch.randn(2, 4, 8, 8)
    found = autoguide(model, weak, 7.0)(gaussian(0.4), {}, ["", ""])(x, 0.9).x0
    torch.testing.assert_close(found, gaussian(0.4)(x, 0.9).x0, atol=1e-6, rtol=1e-5)


def test_load_weak(model, tmp_path):
    weak = weaker(model)
    weak.first_stage_model.half().float()  # as a file of half the size has it
    weak.first_stage_model.decoder.conv_out.weight.data += 1.0  # another decoder reads the same latents
    path = tmp_path / "weak.safetensors"
    save(weak, path)
    loaded = load_weak(path, model)
    assert torch.equal(loaded.model.diffusion_model.out[2].weight, weak.model.diffusion_model.out[2].weight)
    assert loaded.first_stage_model is None and loaded.cond_stage_model is None and precision_of(loaded) == "full"
    generate = partial(model.generate, ["five"], steps=3)
    got = pixels(generate(guide=make_guide(model, weak=path, autoguide_scale=3.0)))
    assert np.array_equal(got, pixels(generate(guide=make_guide(model, weak=loaded, autoguide_scale=3.0))))
    assert np.array_equal(got, pixels(generate(guide=autoguide(model, weak, 3.0))))
    assert not np.array_equal(got, pixels(generate()))
    set_precision(model, "autocast")
    assert precision_of(load_weak(path, model)) == "autocast"


@pytest.mark.parametrize(
    "part, words",
    [("first_stage_model.encoder.conv_in", "has other latents"), ("cond_stage_model", "text encoder has other")],
)
def test_what_cannot_guide_is_refused(model, part, words):
    other = copy.deepcopy(model)
    for p in other.get_submodule(part).parameters():
        p.data += 0.03 * p.norm() / p.numel() ** 0.5
    refused(words, check_weak, other, model)
    check_weak(copy.deepcopy(model).to(torch.bfloat16), model)


def test_another_concatenation_is_refused(model):
    other = copy.deepcopy(model)
    other.concat = "latents"
    refused("takes latents beside the latents, this model's no image", check_weak, other, model)


def test_class_conditional_models_guide_those_of_the_same_classes():
    model, cond = build(), {"target": "ldm.conditioning.classes.ClassLabels", "params": {"n_classes": 10}}
    check_weak(build(), model)
    refused("it has 10 classes, this model 11", check_weak, build(cond_stage_config=cond), model)
    refused("has other latents", check_weak, build(channels=3), model)


def test_a_denoising_gan_is_not_guided_by_itself():
    gan = stage().latent_diffusion
    for options in ({"pag": 1.0, "pag_layers": ["unet"]}, {"weak": gan}):
        refused("a denoising GAN samples its x0 at random", make_guide, gan, **options)


def test_all_at_once_are_the_guides_in_turn(model):
    weak = weaker(model)
    guide = make_guide(model, 0.9, 2.0, ["input_blocks.3", "middle_block"], weak, 3.0)
    with torch.inference_mode():
        cond, uncond = model.condition(["five"]), model.condition([""])
        x = 2 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        plain = guidance.classifier_free(model.denoiser(), cond, uncond, 4.0)
        got = guide(plain, cond, ["five"])(x, 1.5)
        denoise = pag_guide(model, 2.0, ["input_blocks.3", "middle_block"])(plain, cond, ["five"])
        denoise = autoguide(model, weak, 3.0)(denoise, cond, ["five"])
        unlimited = denoise(x, 1.5).x0
        expected = further_guidance.dynamic_threshold(denoise, 0.9, limit=None)(x, 1.5).x0
    torch.testing.assert_close(got.x0, expected, atol=1e-5, rtol=1e-5)
    assert got.x0.abs().max() < 0.9 * unlimited.abs().max()
    refused("threshold must be from 0 to 1, got 99.5", make_guide, model, threshold=99.5)
