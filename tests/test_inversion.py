"""Inversion of images and null-text optimisation: orders, exact cases, a closed form, CompVis's sampler, the digits."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from compvis_models import built, clip_folder, config
from conftest import pixels, refused
from ldm.models.diffusion.ddim import DDIMSampler
from PIL import Image
from torch import nn

import ldm
from ldm.diffusion.denoiser import from_vp, to_vp
from ldm.diffusion.sampling import SAMPLERS
from ldm.editing import invert_images, null_text, null_text_guidance, prompt_to_prompt
from ldm.interpolation import slerp

STD = 0.7  # of the Gaussian data


class Network(nn.Module):
    """In place of a UNet: eps = function(x_vp, sigma, y), with sigma of the timestep."""

    downsampling = 1

    def __init__(self, schedule, function):
        super().__init__()
        self.schedule, self.function = schedule, function
        self.weight = nn.Parameter(torch.ones(1))  # which says on which device it is, and its dtype

    def forward(self, x, timesteps, context=None, y=None):
        unused = 0 if context is None else 0 * context.mean()  # whose gradient is 0, not missing
        return self.function(x, self.schedule.sigma_at(float(timesteps[0])), y) + unused


@pytest.fixture
def with_eps(model):
    """`with_eps(function)` is the tiny model with that network."""

    def make(function):
        model.model.diffusion_model, model.prediction = Network(model.schedule, function), "eps"
        return model

    return make


@pytest.fixture(scope="module")
def images():
    levels = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    return [Image.fromarray(one) for one in levels]


def back(found, denoise):
    """Sample from an inversion's noise -> the latents."""
    *_, last = SAMPLERS["ddim"](denoise, from_vp(found.noise, found.sigmas[0]), found.sigmas)
    return last.x


@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_the_error_of_a_gaussian_falls_with_the_steps(with_eps, images, corrections):
    """With the exact denoiser of N(0, STD^2) the flow is x(sigma) = x(0) sqrt(STD^2 + sigma^2) / STD. Euler's error of
    the noise is of first order in the step; that of the way up and down is of one more with each correction."""
    model = with_eps(lambda x, sigma, y: x * sigma * math.sqrt(1 + sigma * sigma) / (STD**2 + sigma * sigma))
    denoise, noise, again = model.denoiser(), [], []
    for steps in (40, 80, 160):
        sigmas = ",".join(f"{10 * (0.007 / 10) ** (i / (steps - 1))}" for i in range(steps))
        settings = {"steps": steps, "spacing": f"sigmas {sigmas}", "final_sigma": "sigma_min"}
        found = invert_images(model, images, ["five", "ab"], corrections=corrections, **settings)
        top, low = found.sigmas[0], found.sigmas[-1]
        exact = found.states[-1] * math.sqrt((STD**2 + top * top) / (STD**2 + low * low))
        latents = back(found, lambda x, sigma: denoise(x, sigma, {}))
        noise.append(float((found.states[0] - exact).norm()))
        again.append(float((latents - found.states[-1]).norm()))
    orders = [[math.log2(errors[i] / errors[i + 1]) for i in range(2)] for errors in (noise, again)]
    assert orders[0] == pytest.approx([1, 1], abs=0.25)
    assert orders[1] == pytest.approx([1 + corrections] * 2, abs=0.25)


def test_a_network_that_predicts_one_noise_is_inverted_exactly(with_eps, images):
    """eps does not depend on x, so that every step up is the inverse of the one down; guided, too."""
    model = with_eps(lambda x, sigma, y: torch.linspace(-1, 1, 256).view(4, 8, 8) + 0.1 * y.mean(1).view(-1, 1, 1, 1))
    for scale in (1.0, 3.0):
        found = invert_images(model, images, ["five", "ab"], steps=5, scale=scale, corrections=0)
        made = model.generate(["five", "ab"], noise=found.noise, steps=5, scale=scale)
        coded = model.encode(images, mode=True)
        torch.testing.assert_close(found.states[-1], coded)
        exact = ((model.decode(coded).clamp(-1, 1) + 1) * 127.5).round()[:, 0]
        assert np.abs(pixels(made) - exact.numpy()).max() <= 2  # at sigma 20,000 a float32 has three decimals


def test_corrections_invert_a_network_exactly(with_eps, images):
    """Its slope is below 1 / 2, so that the corrections of a step are a contraction, whatever the noise levels."""
    model, errors = with_eps(lambda x, sigma, y: 0.5 * torch.sin(x)), []
    denoise = model.denoiser()
    for corrections in (0, 3, 30):
        found = invert_images(model, images, ["five", "ab"], corrections=corrections, steps=8)
        latents = back(found, lambda x, sigma: denoise(x, sigma, {}))
        errors.append(float((latents - found.states[-1]).norm() / latents.norm()))
    assert errors[0] > errors[1] > 50 * errors[2] and errors[2] < 0.01  # the step to sigma 20,000 needs them most
    refused("corrections must be at least 0, got -1", invert_images, model, images, ["five", "ab"], corrections=-1)


def test_null_text_finds_the_condition_that_it_must(with_eps, images):
    """eps is the pooled text's mean: guided sampling goes the inversion's way only where the null's is the prompt's."""
    model = with_eps(lambda x, sigma, y: y.mean(1).view(-1, 1, 1, 1).expand_as(x))
    prompts = ["five", "ab"]
    found = invert_images(model, images, prompts, steps=6)
    nulls = null_text(model, found, scale=4, null_steps=300)
    means = model.condition(prompts)["c_adm"].mean(1)
    start = model.condition(["", ""])["c_adm"].mean(1)
    assert (start - means).abs().min() > 0.02
    assert len(nulls.conds) == 6
    for cond in nulls.conds[1:]:  # each starts from the one before
        assert ((cond["c_adm"].mean(1) - means).abs() < 0.1 * (start - means).abs()).all()


@pytest.mark.smoke
def test_null_text_brings_guided_sampling_back(tiny_model, images):
    prompts, settings = ["five ab", "ab"], {"steps": 6, "scale": 4}
    found = invert_images(tiny_model, images, prompts, steps=6, corrections=5)
    errors: list = []
    nulls = null_text(tiny_model, found, null_steps=25, callback=lambda i, error: errors.append(error), **settings)
    ends: list = []

    def sample(**options):
        tiny_model.generate(prompts, noise=found.noise, callback=lambda s: ends.append(s.x), **settings, **options)
        return (ends[-1] - found.states[-1]).square().flatten(1).mean(1)

    plain = sample()
    with null_text_guidance(tiny_model, nulls):
        optimised = sample()
    torch.testing.assert_close(optimised, errors[-1], rtol=1e-3, atol=1e-6)  # as it was found
    assert (optimised < 0.5 * plain).all()
    assert torch.equal(sample(), plain)  # nothing stays


def test_null_conditions_that_are_not_changed_change_nothing(tiny_model, images):
    """The hook with the null condition itself: bit for bit, in an interval of guidance and in pairs, too."""
    prompts, settings = ["five ab", "five xy"], {"steps": 4, "scale": 3, "interval": (0, 5.0)}
    found = invert_images(tiny_model, images[0], prompts[:1], steps=4)
    nulls = null_text(tiny_model, found, **settings)
    null = tiny_model.condition([""])
    assert torch.equal(nulls.conds[0]["c_adm"], null["c_adm"])  # above the interval nothing is optimised
    assert not torch.equal(nulls.conds[-1]["c_adm"], null["c_adm"])
    same = nulls._replace(conds=[null] * 4)
    made = []
    for conds in (same, nulls):
        with null_text_guidance(tiny_model, conds, 2), prompt_to_prompt(tiny_model, *prompts):
            made.append(pixels(tiny_model.generate(prompts, noise=found.noise.expand(2, -1, -1, -1), **settings)))
    with prompt_to_prompt(tiny_model, *prompts):
        plain = pixels(tiny_model.generate(prompts, noise=found.noise.expand(2, -1, -1, -1), **settings))
    assert (made[0] == plain).all() and (made[1] != plain).any()


def test_noise_is_what_sampling_starts_from(tiny_model, images):
    """That of the seeds is bit-identical to these; between two images' noise there are images."""
    seeds = [3, 8]
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    prompts, settings = ["5", "6"], {"steps": 3, "sampler": "ddpm"}
    plain = pixels(tiny_model.generate(prompts, seeds=seeds, **settings))
    assert (pixels(tiny_model.generate(prompts, seeds=seeds, noise=noise, **settings)) == plain).all()
    single = pixels(tiny_model.generate(prompts, seeds=seeds, noise=noise.numpy(), batch_size=1, **settings))
    assert np.abs(single - plain).max() <= 1
    first, last = invert_images(tiny_model, images, prompts, steps=3).noise
    assert (pixels(tiny_model.generate(["5"], noise=slerp(first, last, 0.5)[None], steps=3)) != plain[0]).any()
    refused(r"a tensor \(2, 4, 8, 8\), got \(4, 8, 8\)", tiny_model.generate, prompts, noise=noise[0])
    refused(r"a tensor \(2, 4, 8, 8\), got \(\)", tiny_model.generate, prompts, noise=[1, 2])
    refused("fixed_code would have no effect", tiny_model.generate, prompts, noise=noise, fixed_code=True)


def test_images_of_other_sizes_are_padded(tiny_model, images):
    image = images[0].crop((0, 0, 29, 33))
    found = invert_images(tiny_model, image, ["5"], steps=3)
    assert found.noise.shape == (1, 4, 10, 8)
    (made,) = tiny_model.generate(["5"], noise=found.noise, steps=3, width=29, height=33)
    assert made.size == (29, 33)


def test_on_compvis_own_sampler(tmp_path):
    """Its DDIM goes the way of `generate` from the noise found, guided away from the optimised null conditions, too."""
    model = built(config(clip_folder(tmp_path / "clip")))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    settings = {"steps": 5, "spacing": "compvis", "final_sigma": "sigma_min"}
    found = invert_images(model, image, ["a red dog"], **settings)
    nulls = null_text(model, found, scale=5)
    cond, null = (model.get_learned_conditioning([text]) for text in ("a red dog", ""))
    ends = []
    for scale, hooks in ((1, nullcontext()), (5, nullcontext()), (5, null_text_guidance(model, nulls))):
        guided = {"unconditional_guidance_scale": float(scale), "unconditional_conditioning": null}
        with hooks:
            ours: list = []
            model.generate(["a red dog"], noise=found.noise, scale=scale, callback=ours.append, **settings)
            theirs, _ = DDIMSampler(model).sample(
                5, 1, tuple(found.noise.shape[1:]), conditioning=cond, x_T=found.noise, verbose=False, **guided
            )
        ends.append(to_vp(ours[-1].x, found.sigmas[-1]))
        torch.testing.assert_close(theirs, ends[-1], rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    latents = to_vp(found.states[-1], found.sigmas[-1])
    plain, optimised = ((end - latents).norm() for end in ends[1:])
    assert optimised < 0.9 * plain


def test_mistakes_are_one_sentence(tiny_model, images):
    prompts = ["five", "ab"]
    refused("inversion is of the sampler ddim with eta 0", invert_images, tiny_model, images, prompts, sampler="unipc")
    refused("inversion is of the sampler ddim with eta 0", invert_images, tiny_model, images, prompts, eta=0.5)
    for settings in ({"strength": 0.5}, {"strength": 0}, {"fixed_code": True}, {"width": 32}):
        refused(f"{next(iter(settings))} would have no effect", invert_images, tiny_model, images, prompts, **settings)
    guided = {"negative": "ab", "interval": (0, 1), "rescale": 0.5}
    refused("negative, interval, rescale would have no effect at", invert_images, tiny_model, images, prompts, **guided)
    invert_images(tiny_model, images, prompts, steps=1, scale=2, **guided)
    refused("1 results need one or 1 images", invert_images, tiny_model, images, prompts[:1])
    concat = copy.copy(tiny_model)
    concat.concat = "latents"
    refused("without an image in its input", invert_images, concat, images, prompts)
    refused("needs the prompts of the images, and there are none", invert_images, tiny_model, images, [])
    found = invert_images(tiny_model, images, prompts, steps=3)
    refused("2 prompts need as many negative prompts, or one; got 3", null_text, tiny_model, found, ["a", "b", "c"])
    refused("what null_text returns, got Inversion", null_text_guidance(tiny_model, found).__enter__)
    refused("has no effect at guidance scale 1", null_text, tiny_model, found, scale=1)
    refused("or outside of its interval", null_text, tiny_model, found, interval=(1e-9, 1e-8))
    refused("leave out what changes its noise levels", null_text, tiny_model, found, steps=4)
    refused("null_steps must be at least 1, got 0", null_text, tiny_model, found, null_steps=0)
    nulls = null_text(tiny_model, found, null_steps=1)
    with null_text_guidance(tiny_model, nulls):
        refused("of 2 images and 3 steps", tiny_model.generate, ["five"] * 5, steps=3)
        refused("of 2 images and 3 steps", tiny_model.generate, prompts, steps=7)
    with pytest.raises(ValueError, match="the null conditions had no effect"), null_text_guidance(tiny_model, nulls):
        tiny_model.generate(prompts, steps=3, scale=1)
    refused("copies must be at least 1, got 0", null_text_guidance(tiny_model, nulls, 0).__enter__)


@pytest.mark.smoke
def test_a_digit_is_inverted_and_edited():
    """A three that is made again from the noise found, and becomes an eight where it lies."""
    model, three, eight = ldm.load(device="cpu"), "a handwritten digit three", "a handwritten digit eight"
    (image,) = model.generate([three], seed=4)
    found = invert_images(model, image, [three], steps=10)
    with prompt_to_prompt(model, three, eight):
        made = model.generate([three, eight], noise=found.noise.expand(2, -1, -1, -1), steps=10)
    alone = model.generate([eight], seed=5, steps=10)
    same, edited, other = (np.abs(one - pixels([image])[0]).mean() for one in pixels([*made, *alone]))
    assert same < 6 and same < 0.5 * edited and edited < 0.9 * other
