"""Prompt-to-Prompt: its identities, what each interval takes over, local blends, CompVis's own sampler, the digits."""

from functools import partial

import numpy as np
import pytest
import torch
from compvis_models import built, clip_folder, config
from conftest import TINY, randomised, refused
from ldm.models.diffusion.ddim import DDIMSampler

import ldm
from ldm.data.measure import slant, stroke_weight
from ldm.editing import prompt_to_prompt
from ldm.editing.words import Words
from ldm.models.attention_layers import attention_layers

A, B = "five ab", "five xy"
CROSS = {"cross_steps": (0, 1), "self_steps": (0, 0), "pooled_steps": (0, 0)}
NOTHING = CROSS | {"cross_steps": (0, 0)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomised(ldm.LatentDiffusion(**TINY)).eval().requires_grad_(False)


def pairs_of(model, prompt=A, edited=B, seeds=(0, 1), steps=3, **editing):
    """The images of a prompt and their edited versions, as float arrays."""
    n, texts = len(seeds), [prompt] * len(seeds) + [prompt if edited is None else edited] * len(seeds)
    with prompt_to_prompt(model, prompt, edited, pairs=n, **editing):
        images = model.generate(texts, seeds=[*seeds, *seeds], batch_size=2 * n, steps=steps)
    images = [np.asarray(image, np.float32) for image in images]
    return images[:n], images[n:]


def alone(model):
    """The same batch without an edit."""
    images = model.generate([A, A, B, B], seeds=[0, 1, 0, 1], steps=3)
    images = [np.asarray(image, np.float32) for image in images]
    return images[:2], images[2:]


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def outputs(model, editing, change=None):
    """What the UNet returns for an edited image in one call: (1, c, h, w). change: of the layers, undone afterwards."""
    unet, torch_seed = model.model.diffusion_model, torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=torch_seed).expand(2, -1, -1, -1)
    cond = model.condition([A, B])
    hooks = [] if change is None else change(model)
    with torch.no_grad(), prompt_to_prompt(model, A, B, **editing):
        found = unet(x, torch.tensor([600.0, 600.0]), cond["c_crossattn"], y=cond["c_adm"])
    for hook in hooks:
        hook.remove()
    return found[1:]


def values(model, factor):
    """Scale the values of the word "xy" in every cross-attention, of the edited image."""
    places = Words(model, B).places("xy")

    def scale(module, args, output):
        output = output.clone()
        output[-1, places] *= factor
        return output

    cross = [layer.module.to_v for layer in attention_layers(model) if layer.cross]
    return [module.register_forward_hook(scale) for module in cross]


@pytest.mark.parametrize("factor", [2.0, 0.0, -1.0, 0.5])
@pytest.mark.parametrize("steps", [CROSS, NOTHING])
def test_scaling_a_column_is_scaling_its_value(model, factor, steps):
    """M_j (c V_j) = (c M_j) V_j, whatever the attention is of."""
    weighted = outputs(model, steps | {"weights": {"xy": factor}})
    torch.testing.assert_close(weighted, outputs(model, steps, partial(values, factor=factor)), atol=2e-5, rtol=1e-4)
    assert (weighted - outputs(model, steps)).abs().max() > 1e-3


@pytest.mark.smoke
def test_what_changes_nothing_is_bit_identical(model):
    """A weight of 1; the first image of any edit; the edited image where nothing is taken over."""
    first, same = pairs_of(model, edited=None, weights={"ab": 1.0})
    assert equal(first, same) and not equal(first, pairs_of(model, edited=None, weights={"ab": 1.5})[1])
    first, edited = pairs_of(model)
    assert equal(first, alone(model)[0]) and not equal(edited, alone(model)[1])
    assert equal(pairs_of(model, **NOTHING)[1], alone(model)[1])


def context_change(model):
    """Change what the edited image's cross-attention reads at the word "xy"."""
    places = Words(model, B).places("xy")

    def change(module, args, kwargs):
        context = kwargs["context"].clone()
        context[-1, places] += 5.0
        return args, kwargs | {"context": context}

    cross = [layer.module for layer in attention_layers(model) if layer.cross]
    return [module.register_forward_pre_hook(change, with_kwargs=True) for module in cross]


@pytest.mark.parametrize("steps", [CROSS, NOTHING])
def test_silencing_a_word_is_not_weight_0(model, steps):
    """A silenced token decides nothing, and the others' attention adds up to 1; with weight 0 its share is missing."""
    silenced = outputs(model, steps | {"silence": ["xy"]})
    again = outputs(model, steps | {"silence": ["xy"]}, context_change)
    torch.testing.assert_close(silenced, again, atol=1e-6, rtol=1e-5)
    zero = steps | {"weights": {"xy": 0.0}}
    assert (outputs(model, zero) - silenced).abs().max() > 1e-3
    changed = outputs(model, NOTHING | {"weights": {"xy": 0.0}}, context_change)  # its key still takes attention away
    assert (changed - outputs(model, NOTHING | {"weights": {"xy": 0.0}})).abs().max() > 1e-3


def test_taken_over_whole_the_attention_is_the_first_images(model):
    """With the same values, too (the prompts differ in one word, whose weight is 0), the outputs are the same."""
    layer = next(layer for layer in attention_layers(model) if layer.cross)
    seen = []
    hook = layer.module.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs(model, CROSS)  # the layer's own outputs differ
    hook.remove()
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-3
    every = {"cross_steps": (0, 1), "self_steps": (0, 1), "pooled_steps": (0, 1)}
    first, edited = pairs_of(model, edited="five ab", silence=[], weights={"ab": 1.001}, **every)
    assert max(np.abs(a - b).max() for a, b in zip(first, edited, strict=True)) <= 1


@pytest.mark.parametrize("name", ["cross_steps", "self_steps", "pooled_steps"])
def test_each_interval_has_an_effect_in_its_part_of_the_time(model, name):
    plain = pairs_of(model, **NOTHING)[1]
    early, late, every = (pairs_of(model, **NOTHING | {name: part})[1] for part in ((0, 0.3), (0.3, 1), (0, 1)))
    assert not any(equal(one, other) for one, other in ((early, plain), (late, plain), (early, late), (late, every)))
    assert equal(pairs_of(model, **NOTHING | {name: (0.01, 0.3)})[1], plain)  # no step begins there


def test_a_local_blend_keeps_what_its_words_do_not_reach(model):
    """In latents: threshold 1 keeps all from the first step that is blended on, 0 changes all."""
    edited, kept, changed = (
        pairs_of(model, **CROSS | blend)
        for blend in ({}, {"blend": ["xy", "ab"], "threshold": 1}, {"blend": ["xy"], "threshold": 0})
    )
    assert equal(edited[1], changed[1]) and equal(kept[0], edited[0])
    assert equal(kept[1], kept[0])  # at the end x is x0, so that earlier differences are gone, too
    some = pairs_of(model, **CROSS, blend=["xy"], threshold=0.97)[1]
    assert not equal(some, edited[1]) and not equal(some, kept[1])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_a_blended_output_means_the_first_images_x0(prediction):
    torch.manual_seed(0)
    own = randomised(ldm.LatentDiffusion(**TINY | {"prediction": prediction})).eval().requires_grad_(False)
    found = []
    with prompt_to_prompt(own, A, B, blend=["xy"], threshold=1):
        own.generate([A, B], seeds=[0, 0], steps=4, callback=lambda step: found.append(step.x0))
    assert (found[0][0] - found[0][1]).abs().max() > 1e-3  # before the blend begins
    for x0 in found[1:]:
        torch.testing.assert_close(x0[0], x0[1], atol=1e-4, rtol=1e-3)


def test_mistakes_are_one_sentence(model):
    def begin(*args, **options):
        with prompt_to_prompt(model, *args, **options):
            pass

    refused("the prompt 'five xy' has no word 'ab'; it has five, xy", begin, A, B, weights={"ab": 2})
    refused("has no word 'six'", begin, A, B, silence=["six"])
    refused("has no word 'six'", begin, A, B, blend=["six"])
    for options in ({"weights": {"xy": 2, "XY": 3}}, {"weights": {"five xy": 2, "xy": 2}}):
        refused("is weighted twice, or silenced too", begin, A, B, **options)
    refused("'xy' is weighted twice, or silenced too", begin, A, B, weights={"xy": 2}, silence=["five xy"])
    refused("threshold has no effect without blend", begin, A, B, threshold=0.3)
    refused("threshold has no effect without blend", begin, A, B, threshold=0.3, blend=[])
    refused("cross_steps must be from 0 to 1, got", begin, A, B, cross_steps=(0, 1.5))
    refused("self_steps ends before it begins: got 0.5 to 0.2", begin, A, B, self_steps=(0.5, 0.2))
    refused("the weight of 'xy' 'much' is not a finite number", begin, A, B, weights={"xy": "much"})
    refused("the weight of 'xy' must be from -1000 to 1000, got 1e.30", begin, A, B, weights={"xy": 1e30})
    refused("encoded as 16 and 32 tokens", begin, A, "abcdefghijklm ab")
    refused("needs a prompt that is text, got 5", begin, 5)
    refused(r"needs a prompt that is text, got \[1, 2\]", begin, A, [1, 2])
    refused("needs a prompt that is text, got None", begin, None, B)
    refused(r"weights must be a mapping of words to numbers, got \['xy'\]", begin, A, B, weights=["xy"])
    refused("weights must be a mapping of words to numbers, got 2", begin, A, B, weights=2)
    refused("the weight of 'xy' None is not a finite number", begin, A, B, weights={"xy": None})
    refused("a word of the prompt must be text, got 5", begin, A, B, weights={5: 2})
    refused("silenced words must be a list of silenced words, not 'xy'", begin, A, B, silence="xy")
    refused("silenced words must be a list of silenced words, not None", begin, A, B, silence=None)
    refused("a word of the prompt must be text, got 5", begin, A, B, silence=[5])
    refused(r"blend \[5\] is not a list of names", begin, A, B, blend=[5])
    refused("pairs must be at least 1, got 0", begin, A, B, pairs=0)
    refused("pairs None is not an integer", begin, A, B, pairs=None)
    refused("cross_steps 0.5 is not two numbers", begin, A, B, cross_steps=0.5)
    refused("unknown setting 'cross_step'; did you mean cross_steps", begin, A, B, cross_step=(0, 1), error=TypeError)


def test_a_blend_without_effect_is_refused(model, monkeypatch):
    refused("blend had no effect: no step began after 0.2 of the time", pairs_of, model, steps=1, blend=["xy"])
    assert pairs_of(model, steps=1)  # without one
    monkeypatch.setattr("ldm.editing.prompts.SMALL_LAYER", 3)
    refused("this model has none", pairs_of, model, blend=["xy"])


def test_pairs_of_other_seeds_are_refused(model):
    for seeds in ([0, 1], [0, 1, 1, 0]):
        with prompt_to_prompt(model, A, B, pairs=len(seeds) // 2):
            texts = [A] * (len(seeds) // 2) + [B] * (len(seeds) // 2)
            refused("begin at other noise: give both the same seed", model.generate, texts, seeds=seeds, steps=2)


def test_half_the_pairs_with_guidance_are_not_the_pairs_without(model):
    """The UNet is called on as many images."""
    with prompt_to_prompt(model, A, B):
        refused("called on half of 2 images, guided: generate these in one batch", model.generate, [A], steps=2)
    with prompt_to_prompt(model, A, B, pairs=2):
        refused("called on half of 4 images, guided", model.generate, [A, B], seeds=[0, 0], steps=2)
    with prompt_to_prompt(model, A, B):  # two batches
        first, second = (model.generate([A, B], seeds=[0, 0], steps=2, scale=scale) for scale in (1, 2))
    assert not equal(first, second)


def test_on_compvis_own_sampler(tmp_path):
    """The drop-in `LatentDiffusion` with its DDIM: the first image is as alone, a weight of 1 is bit-identical."""
    model = built(config(clip_folder(tmp_path / "clip")))
    prompts = ["a red dog", "a red cat"]
    cond, null = (model.get_learned_conditioning(texts) for texts in (prompts, ["", ""]))
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": null}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).expand(2, -1, -1, -1)

    def sample(cond=cond, **editing):
        def run():
            return DDIMSampler(model).sample(4, 2, (4, 8, 8), conditioning=cond, x_T=x, verbose=False, **guided)[0]

        if not editing:
            return run()
        with prompt_to_prompt(model, **editing):
            return run()

    plain, edited = sample(), sample(prompt=prompts[0], edited=prompts[1])
    assert torch.equal(plain[0], edited[0]) and not torch.equal(plain[1], edited[1])
    twice = cond[:1].expand(2, -1, -1)
    same, more = (sample(twice, prompt=prompts[0], weights={"dog": weight}) for weight in (1.0, 3.0))
    assert torch.equal(same[0], same[1]) and not torch.equal(more[0], more[1])
    refused("pooled_steps has no effect: this model's UNet", sample, prompt="a dog", pooled_steps=(0, 0.5))
    kept = sample(prompt=prompts[0], edited=prompts[1], blend=["dog", "cat"], threshold=1)
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-3, atol=1e-3 * float(kept.abs().max()))


@pytest.mark.smoke
def test_digits_become_bold_and_stay_what_they_were():
    """Against the same seeds by the edited prompt alone: nearer to the first image, and bolder than it."""
    model, seeds = ldm.load(device="cpu"), (0, 1)
    thin, bold = "a thin digit seven", "a bold digit seven"
    first, edited = pairs_of(model, thin, bold, seeds, steps=10)
    other = [np.asarray(image, np.float32) for image in model.generate([bold] * 2, seeds=seeds, steps=10)]
    near, far = (np.abs(np.stack(some) - np.stack(first)).mean() for some in (edited, other))
    assert near < 0.85 * far
    weights = [stroke_weight(torch.from_numpy(np.stack(some)[:, 2:30, 2:30]).byte()).mean() for some in (first, edited)]
    assert weights[1] > 1.2 * weights[0]
    tilt = [slant(torch.from_numpy(np.stack(some)[:, 2:30, 2:30]).byte()) for some in (first, edited)]
    assert (tilt[0] - tilt[1]).abs().max() < 3  # degrees
