"""The words of prompts, and what they attend to: against the layer's own attention, under every kernel, and bounded."""

import pytest
import torch
from compvis_models import VOCABULARY, built, clip_folder, config
from conftest import TINY, randomised, refused
from ldm.models.diffusion.ddim import DDIMSampler
from PIL import Image
from test_pixel_diffusion import build

import ldm
from ldm.conditioning.bert import BERTEncoder, vocabulary_of
from ldm.editing import attention_maps, overlay
from ldm.editing.words import Words, alignment
from ldm.models.attention import CrossAttention
from ldm.models.attention_layers import attention_layers, output_of, weights_of
from ldm.models.kernels import BACKENDS, set_attention

PROMPTS = ["five (xy:1.5), five", "ab"]  # in the tiny vocabulary "five" is two tokens, other letters one each


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomised(ldm.LatentDiffusion(**TINY)).eval().requires_grad_(False)


def test_words_have_the_places_of_their_tokens(model):
    words = Words(model, PROMPTS[0])
    assert [(word.text, word.places) for word in words.found] == [
        ("five", [1, 2]),
        ("xy", [3, 4]),
        (",", [5]),
        ("five", [6, 7]),
    ]
    assert words.texts == ["five", "xy"] and words.size == 16
    assert words.places("FIVE") == [1, 2, 6, 7] and words.places("xy, five") == [3, 4, 5, 6, 7]
    assert words.find("x") == words.find("") == []
    refused("the prompt 'five .* has no word 'six'; it has five, xy", words.places, "six")
    assert Words(model, PROMPTS[0], plain=True).places("1") == [7]  # with brackets as words: ( x y : 1 . 5 )
    assert Words(model, "abcdefg hijklmn five").places("five") == [17, 18]  # in the second chunk of 1 + 14 + 1


def test_words_of_a_bert_and_of_models_without_texts(model):
    encoder = BERTEncoder(16, 1, len(vocab := vocabulary_of(["a red dog"])), 8, vocab)
    other = type("Model", (), {"cond_stage_model": encoder})
    assert Words(other, "A red dog").places("red dog") == [2, 3]
    refused("needs a model with a tokenizer: this one's condition is ClassLabels", Words, build(), "five")
    refused("condition is nothing", Words, type("Model", (), {"cond_stage_model": None}), "five")
    refused("a prompt that is text, got 5", Words, model, 5)


def test_alignment_by_hand(model):
    """Words that both have keep their columns, the one in another's place gets that one's, an added one has none."""
    moved, added = alignment(Words(model, "ab five c"), Words(model, "ab x c"))
    pairs = moved.nonzero().tolist()
    # start, a, b; five's two tokens to x; c, the end, and padding, of which one is added
    assert pairs == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 3], *([i, i - 1] for i in range(5, 16))]
    assert moved.sum() == len(pairs) and added.tolist() == [False] * 15 + [True]
    moved, added = alignment(Words(model, "ab x c"), Words(model, "ab five c"))
    assert moved[3, 3:5].tolist() == [0.5, 0.5] and not added.any()
    moved, added = alignment(Words(model, "ab c"), Words(model, "ab x c"))
    assert added.nonzero().flatten().tolist() == [3] and moved.sum(0)[:3].tolist() == [1, 1, 1]
    moved, added = alignment(*2 * (Words(model, "ab c"),))
    assert torch.equal(moved, torch.eye(16)) and not added.any()


@torch.no_grad()
def test_weights_are_those_that_the_layer_uses():
    torch.manual_seed(1)
    module = randomised(CrossAttention(12, 8, heads=3, dim_head=5))
    x, context = torch.randn(2, 7, 12), torch.randn(2, 4, 8)
    (layer,) = [type("L", (), {"module": module})]
    weights = weights_of(layer, x, context)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(output_of(layer, weights, context), module(x, context), atol=1e-6, rtol=1e-5)
    mask = torch.tensor([True, False, True, True])
    masked = output_of(layer, weights_of(layer, x, context, mask), context)
    torch.testing.assert_close(masked, module(x, context, mask.expand(2, 4)), atol=1e-6, rtol=1e-5)


def observed(model, **settings):
    with attention_maps(model, PROMPTS) as maps:
        images = model.generate(PROMPTS, batch_size=2, **settings)
    return maps, images


@pytest.mark.smoke
def test_maps_of_a_generation_are_the_means_of_what_a_layer_computed(model):
    """By hand: the conditional half of 4 calls, over heads, a word's tokens and steps. Images stay the same."""
    seen, layer = [], attention_layers(model)[1]

    def record(module, args, kwargs):
        x, context = args[0][-2:], kwargs["context"][-2:]
        q, k = (
            to(t).unflatten(-1, (module.heads, -1)).transpose(1, 2)
            for to, t in ((module.to_q, x), (module.to_k, context))
        )
        seen.append((q @ k.mT * module.scale).softmax(-1).mean(1))  # (b, n, m)

    hook = layer.module.register_forward_pre_hook(record, with_kwargs=True)
    maps, images = observed(model)
    hook.remove()
    assert [a.tobytes() for a in images] == [b.tobytes() for b in model.generate(PROMPTS)]
    assert layer.name.endswith("attn2") and len(seen) == 4 and len(maps.steps) == 4 and layer.name in maps.layers
    places = [1, 2, 6, 7]
    for step, own in zip(maps.steps, seen, strict=True):
        found = maps.of("five", layer=layer.name, step=step)
        torch.testing.assert_close(found, own[0][:, places].sum(-1).view(4, 4))
    every = torch.stack(seen)[:, 1, :, 1:3].sum(-1).mean(0).view(4, 4)
    torch.testing.assert_close(maps.of("ab", image=1, layer=layer.name), every)
    mean = torch.stack([maps.of("five", layer=name) for name in maps.layers]).mean(0)
    torch.testing.assert_close(maps.of("five"), mean)
    refused("has no word 'five'; it has ab", maps.of, "five", image=1)
    refused("no attention of layer 'none'", maps.of, "ab", image=1, layer="none")


def test_maps_are_those_of_every_kernel_and_outside_of_the_guidance_interval(model):
    expected = observed(model)[0].of("xy")
    try:
        for backend in BACKENDS:
            if backend != "xformers" or torch.cuda.is_available():
                set_attention(backend)
                torch.testing.assert_close(observed(model)[0].of("xy"), expected, atol=1e-5, rtol=1e-4)
    finally:
        set_attention("auto")
    maps = observed(model, interval=(0.1, 1))[0]  # the first calls have no unconditional half
    assert len(maps.steps) == 4 and torch.isfinite(maps.of("xy")).all()


def test_memory_does_not_grow_with_the_steps_and_hooks_go(model):
    few, many = observed(model, steps=10)[0], observed(model, steps=40)[0]
    size = [sum(total.numel() for total, _ in maps.sums.values()) for maps in (few, many)]
    assert size[0] == size[1] and sum(count for _, count in many.sums.values()) == 40 * len(many.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sizes_that_are_not_square(model):
    maps, images = observed(model, height=48, width=32)
    assert maps.of("five").shape == (6, 4)
    red = overlay(images[0], maps.of("five"))
    assert red.size == (32, 48) and red.mode == "RGB"
    heat = torch.zeros(6, 4)
    heat[0, 0] = 1
    corner = overlay(Image.new("RGB", (32, 48), "white"), heat)
    assert corner.getpixel((0, 0))[0] > corner.getpixel((0, 0))[1] + 100 and corner.getpixel((31, 47)) == (
        255,
        255,
        255,
    )


def test_what_does_not_fit_is_refused(model):
    def begin(*args):
        with attention_maps(model, *args):
            pass

    refused("prompts must be a list of prompts, not 'five'", begin, "five")
    refused("prompts must be a list of prompts, not 5", begin, 5)
    refused("prompts must be a list of prompts, not None", begin, None)
    refused("needs a prompt that is text, got 5", begin, [5])
    refused("need the prompts of the next batch, and there are none", begin, [])
    refused("there are none with words in them", begin, ["", "., !"])
    refused("parts must be at least 1, got 0", begin, ["five"], 0)
    refused("parts 'ten' is not an integer", begin, ["five"], "ten")
    with attention_maps(model, ["five"]) as maps:
        model.generate(["five"], steps=1)
    refused("a word of the prompt must be text, got 5", maps.of, 5)
    refused("image must be from 0 to 0, got 1", maps.of, "five", 1)
    refused(r"in step 9 was seen: there are the layers .*\.attn2, and the steps \[0\]", maps.of, "five", step=9)
    refused("the maps are of 1 images, got 0", maps.sheet, [])
    with attention_maps(model, ["five"]):
        refused("called on 6 images, not on 1: .* in one batch", model.generate, ["five"] * 3)
    with attention_maps(model, ["five"]):
        refused("attends to 32 vectors, and the prompt has 16 tokens", model.generate, ["five"], "abcdefghijklmnop")


def test_maps_of_compvis_own_sampler(tmp_path):
    """The drop-in `LatentDiffusion`, its tokenizer and its DDIM."""
    model = built(config(clip_folder(tmp_path / "clip")))
    words = Words(model, "a red dog, x")
    assert words.texts == ["a", "red", "dog", "x"] and words.size == 77 and words.tokens[0] == VOCABULARY - 2
    cond, null = (model.get_learned_conditioning([text]) for text in ("a red dog, x", ""))
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": null}
    with attention_maps(model, ["a red dog, x"]) as maps:
        DDIMSampler(model).sample(4, 1, (4, 8, 8), conditioning=cond, verbose=False, **guided)
    assert len(maps.steps) == 4 and maps.of("red dog").shape == (8, 8)
    total = sum(maps.of(word) for word in words.texts)
    assert 0 < total.min() and total.max() < 1
