"""LatentDiffusion.generate over an image: levels, noise, what a mask keeps, models that take it as input, mistakes."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY, pixels, randomised, refused
from PIL import Image

from ldm.diffusion.denoiser import Prediction, from_vp, to_vp
from ldm.diffusion.schedule import sampling_sigmas
from ldm.images import to_pil
from ldm.latent_diffusion import LatentDiffusion

PROMPTS = ["five", "a thin 3", "", "an eight leaning left"]


def make_image(seed=0, width=32, height=32, mode="L") -> Image.Image:
    """Smooth random blobs, as the first stage can more or less carry."""
    small = torch.rand(len(mode), 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    large = torch.nn.functional.interpolate(small[None], (height, width), mode="bicubic")
    return to_pil(large)[0]


def top_half(width=32, height=32) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width, height // 2))
    return mask


def seen_latents(model, image) -> torch.Tensor:
    """The first stage's latents (1, 4, h, w) of an image, most likely ones."""
    x = torch.tensor(pixels([image.convert("L")]), dtype=torch.float32)[:, None] / 127.5 - 1
    return model.scale_factor * model.first_stage_model.encode(x).mode()


def spied(model, x0=None):
    """A copy whose denoiser notes each (x, sigma) and always finds x0 (zeros); the notes."""
    model, notes = copy.copy(model), []

    def denoise(x, sigma, cond):
        notes.append((x, sigma))
        return Prediction(torch.zeros_like(x) if x0 is None else x0.expand_as(x))

    model.denoiser = lambda seeds=None: denoise
    return model, notes


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("strength", [0.25, 0.8, 1])
def test_an_oracle_finds_its_image_from_any_strength(tiny_model, sampler, strength):
    """A network that gives the exact eps for a known x0 leads from any image at any level to that x0."""
    model, z = copy.copy(tiny_model), seen_latents(tiny_model, make_image(1))
    model.prediction = "eps"

    def exact_eps(x_vp, t, cond):
        sigma = model.schedule.sigma_at(float(t[0]))
        return (x_vp * (1 + sigma**2) ** 0.5 - z) / sigma

    model.apply_model = exact_eps
    options = {"steps": 8, "sampler": sampler, "scale": 1.0, "seed": 3}
    (found,) = model.generate(["five"], image=make_image(2), strength=strength, **options)
    assert abs(pixels([found]) - pixels(to_pil(tiny_model.decode(z)))).max() <= 1


@pytest.mark.parametrize(("strength", "taken"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.99, 7), (1, 8)])
@pytest.mark.parametrize("spacing", ["trailing", "compvis", "karras"])
def test_noised_exactly_to_the_first_level_that_is_denoised(tiny_model, strength, taken, spacing):
    model, notes = spied(tiny_model)
    options = {"steps": 8, "spacing": spacing, "scale": 1.0, "strength": strength, "seeds": [5, 9]}
    model.generate(["a", "b"], image=make_image(), **options)
    sigmas = sampling_sigmas(model.schedule, 8, spacing).tolist()
    assert [sigma for _, sigma in notes] == sigmas[8 - taken : 8]
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 9)])
    expected = seen_latents(model, make_image()) + sigmas[8 - taken] * noise
    torch.testing.assert_close(notes[0][0], expected, rtol=1e-6, atol=1e-6)


def test_strength_0_gives_the_image_back_through_the_first_stage(tiny_model):
    model, notes = spied(tiny_model)
    (image,) = model.generate(["five"], image=make_image(), strength=0)
    expected = to_pil(tiny_model.decode(seen_latents(tiny_model, make_image())))
    assert notes == [] and np.array_equal(pixels([image]), pixels(expected))
    # under a mask, all that is black is the image's own
    (image,) = model.generate(["five"], image=make_image(), mask=top_half(), strength=0)
    assert np.array_equal(np.asarray(image)[:16], pixels(expected)[0, :16])
    assert np.array_equal(np.asarray(image)[16:], np.asarray(make_image())[16:])


def test_more_strength_leaves_less_of_the_image(tiny_model):
    """It starts at a higher level, with more noise on it."""
    model, notes = spied(tiny_model)
    for strength in (0.25, 0.5, 0.75, 1):
        model.generate(["five"], steps=4, image=make_image(), strength=strength)
    levels = [sigma for _, sigma in notes]
    starts = [levels[0], levels[1], levels[3], levels[6]]
    assert starts == sorted(starts) and starts == sampling_sigmas(model.schedule, 4, "trailing").tolist()[3::-1]


def test_its_default_strength_is_three_quarters_and_all_under_a_mask(tiny_model):
    for mask, strength in ((None, 0.75), (top_half(), 1.0)):
        usual, given = (
            tiny_model.generate(["five"], steps=4, image=make_image(), mask=mask, **options)
            for options in ({}, {"strength": strength})
        )
        assert tiny_model.default_strength(mask is not None) == strength
        assert np.array_equal(pixels(usual), pixels(given))


@pytest.mark.parametrize("mask", [None, top_half()], ids=["whole", "masked"])
def test_over_an_image_seeds_and_batches_are_as_from_text(tiny_model, mask):
    options = {"sampler": "ddpm", "steps": 4, "image": make_image(), "mask": mask, "strength": 0.8}
    whole = pixels(tiny_model.generate(PROMPTS, seed=20, **options))
    for size in (1, 3):
        assert abs(pixels(tiny_model.generate(PROMPTS, seed=20, batch_size=size, **options)) - whole).max() <= 1
    for i, prompt in enumerate(PROMPTS):
        assert abs(pixels(tiny_model.generate([prompt], seed=20 + i, **options))[0] - whole[i]).max() <= 1
    assert np.array_equal(pixels(tiny_model.generate(PROMPTS, seed=20, **options)), whole)  # same batch: same bytes
    assert not np.array_equal(pixels(tiny_model.generate(PROMPTS, seed=21, **options)), whole)
    fixed = pixels(tiny_model.generate(["5", "5"], **(options | {"sampler": "ddim"}), fixed_code=True))
    assert np.array_equal(fixed[0], fixed[1])


def test_an_image_and_a_mask_for_each_prompt(tiny_model):
    images, masks = (
        [make_image(1), make_image(2), make_image(3)],
        [top_half(), top_half().rotate(180), top_half().rotate(90)],
    )
    options = {"steps": 3, "seeds": [4, 4, 4]}
    together = pixels(tiny_model.generate(["5"] * 3, image=images, mask=masks, batch_size=2, **options))
    for i in range(3):
        alone = tiny_model.generate(["5"], image=images[i], mask=masks[i], steps=3, seed=4)
        assert abs(pixels(alone)[0] - together[i]).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("strength", [0.5, 1])
def test_what_the_mask_keeps_is_kept_at_every_step_and_to_the_byte(tiny_model, sampler, strength):
    steps, original = [], make_image()
    options = {"steps": 6, "sampler": sampler, "strength": strength, "callback": steps.append, "seed": 2}
    (image,) = tiny_model.generate(["five"], image=original, mask=top_half(), **options)
    known = seen_latents(tiny_model, original)
    assert len(steps) == 6 * strength
    for step in steps:
        assert torch.equal(step.x0[:, :, 4:], known[:, :, 4:])
        assert (step.x0[:, :, :4] - known[:, :, :4]).abs().max() > 0.1
    assert np.array_equal(np.asarray(image)[16:], np.asarray(original)[16:])
    assert abs(pixels([image]) - pixels([original]))[0, :16].mean() > 5


def test_what_is_kept_has_the_right_noise_at_every_level(tiny_model):
    """Without fresh noise, known + sigma (the start's noise); at strength 1 the part to draw starts as noise alone."""
    model, notes = spied(tiny_model)
    model.generate(["five"], steps=5, scale=1.0, image=make_image(), mask=top_half(), seed=8)
    known = seen_latents(model, make_image())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    for x, sigma in notes:
        kept = (known + sigma * noise)[:, :, 4:]
        torch.testing.assert_close(x[:, :, 4:], kept, rtol=1e-4, atol=1e-4)  # float32 at sigmas of thousands
    x, sigma = notes[0]
    torch.testing.assert_close(x[:, :, :4], from_vp(noise, sigma)[:, :, :4])


def test_a_latent_is_new_if_half_white_pixels_reach_into_it(tiny_model):
    mask = Image.new("L", (32, 32))
    mask.putpixel((9, 14), 128)  # latent (x 2, y 3): 4 pixels a latent
    mask.paste(127, (20, 20, 32, 32))  # not even half white
    model, notes = spied(tiny_model, seen_latents(tiny_model, make_image(4)))
    steps = []
    model.generate(["five"], steps=1, image=make_image(), mask=mask, callback=steps.append)
    expected = seen_latents(model, make_image())
    expected[:, :, 3, 2] = seen_latents(model, make_image(4))[:, :, 3, 2]
    assert torch.equal(steps[0].x0, expected)


def test_greys_of_the_mask_blend_what_was_drawn_with_the_image(tiny_model):
    white = Image.new("L", (32, 32), 255)
    soft = Image.fromarray(np.linspace(128, 255, 1024).astype(np.uint8).reshape(32, 32))
    options = {"steps": 2, "image": make_image(), "seed": 1}
    (new,), (blend,) = (tiny_model.generate(["five"], mask=mask, **options) for mask in (white, soft))
    share = pixels([soft]) / 255
    assert abs(pixels([blend]) - (share * pixels([new]) + (1 - share) * pixels([make_image()]))).max() <= 0.501


def test_a_mask_that_is_all_white_or_all_black(tiny_model):
    """White draws as from text, the same image; black gives the image back."""
    plain = tiny_model.generate(["five"], seed=6)
    white = tiny_model.generate(["five"], seed=6, image=make_image(), mask=Image.new("L", (32, 32), 255))
    assert np.array_equal(pixels(plain), pixels(white))
    (black,) = tiny_model.generate(["five"], seed=6, image=make_image(), mask=Image.new("L", (32, 32)))
    assert np.array_equal(np.asarray(black), np.asarray(make_image()))


def test_an_image_whose_size_does_not_divide(tiny_model):
    original, mask = make_image(width=29, height=35), top_half(29, 35)
    model, notes = spied(tiny_model)
    (image,) = model.generate(["five"], image=original, steps=1)
    assert image.size == (29, 35) and notes[0][0].shape[2:] == (10, 8)
    padded = Image.fromarray(np.pad(np.asarray(original), ((0, 5), (0, 3)), mode="edge"))
    options = {"steps": 2, "strength": 0.5}
    whole, cut = (tiny_model.generate(["five"], image=one, **options)[0] for one in (padded, original))
    assert np.array_equal(np.asarray(whole)[:35, :29], np.asarray(cut))
    (image,) = tiny_model.generate(["five"], image=original, mask=mask, steps=2)
    assert np.array_equal(np.asarray(image)[17:], np.asarray(original)[17:])


@pytest.fixture(scope="module")
def colour_model():
    """TINY with a first stage of three channels."""
    config = copy.deepcopy(TINY)
    config["first_stage_config"]["params"]["ddconfig"] |= {"in_channels": 3, "out_ch": 3}
    torch.manual_seed(1)
    return randomised(LatentDiffusion(**config)).eval().requires_grad_(False)


def test_colours_for_a_grey_model_and_grey_for_one_of_colours(tiny_model, colour_model):
    rgb, grey = make_image(mode="RGB"), make_image()
    (image,) = tiny_model.generate(["five"], image=rgb, steps=2)
    assert image.mode == "L" and image == tiny_model.generate(["five"], image=rgb.convert("L"), steps=2)[0]
    (image,) = colour_model.generate(["five"], image=grey, steps=2)
    assert image.mode == "RGB" and image == colour_model.generate(["five"], image=grey.convert("RGB"), steps=2)[0]
    for model, original in ((tiny_model, rgb), (colour_model, grey)):
        (image,) = model.generate(["five"], image=original, mask=top_half(), steps=2)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[16:], np.asarray(original.convert("RGB"))[16:])


@pytest.mark.parametrize("mask", [None, top_half()], ids=["whole", "masked"])
def test_over_an_image_with_half_precision_weights(tiny_model, mask):
    model, steps = copy.deepcopy(tiny_model).to(torch.bfloat16), []
    options = {"image": make_image(), "mask": mask, "steps": 4}
    half = pixels(model.generate(["five"], callback=steps.append, **options))
    assert {tensor.dtype for step in steps for tensor in (step.x, step.x0)} == {torch.float32}
    assert abs(half - pixels(tiny_model.generate(["five"], **options))).mean() < 6  # 8 bits through three networks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": make_image(), "strength": 1.5}, "strength must be from 0 to 1, got 1.5"),
        ({"image": make_image(), "strength": float("nan")}, "strength nan is not a finite number"),
        ({"mask": top_half()}, "need an init image"),
        ({"strength": 0.5}, "need an init image"),
        ({"image": make_image(), "mask": top_half(16, 32)}, "the mask is 16 x 32 pixels and the image 32 x 32"),
        ({"image": make_image(width=7)}, "7 x 32 pixels, too small for this model: its minimum is 8 x 8"),
        ({"image": make_image(), "width": 64}, "width 64 differs from the init image's 32"),
        ({"image": make_image(), "height": 31}, "height 31 differs from the init image's 32"),
        ({"image": [make_image()] * 3}, "2 results need one or 2 images"),
    ],
)
def test_mistakes_about_the_image_are_named(tiny_model, settings, message):
    refused(message, tiny_model.generate, ["4", "5"], **settings)


def concat_model(concat: str, channels: int) -> LatentDiffusion:
    config = copy.deepcopy(TINY) | {"concat": concat, "scale_factor": 0.5}
    config["unet_config"]["params"]["in_channels"] = channels
    torch.manual_seed(2)
    return randomised(LatentDiffusion(**config)).eval().requires_grad_(False)


class Inputs:
    """Keeps what the UNet is given."""

    def __init__(self, model):
        self.given = []
        self.handle = model.model.diffusion_model.register_forward_pre_hook(lambda _, arguments: self.note(arguments))

    def note(self, arguments):
        self.given.append(arguments[0])


def odd_mask() -> Image.Image:
    """White on a region whose edges lie inside latents, with a grey just too dark and one just bright enough."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (3, 5, 21, 18))
    mask.paste(127, (22, 0, 32, 8))
    mask.paste(128, (22, 24, 32, 32))
    return mask


def blanked(mask: Image.Image, level: int) -> Image.Image:
    """make_image() with that level, -1 to 1, where the mask is half white or more; the first stage sees it as it is."""
    return np.where(np.asarray(mask) >= 128, level, np.asarray(make_image()) / 127.5 - 1)


@pytest.mark.parametrize(
    ("concat", "channels", "blank"), [("mask_latents", 9, 0), ("latents_mask", 9, -1), ("latents", 8, None)]
)
@pytest.mark.parametrize("count", [1, 2])
def test_models_with_concat_are_given_image_and_mask_in_their_order(concat, channels, blank, count):
    model, mask = concat_model(concat, channels), odd_mask()
    inputs, steps = Inputs(model), []
    options = {"steps": 2, "scale": 3.0, "callback": steps.append}
    images = model.generate(["five"] * count, image=make_image(), mask=mask, **options)

    seen = np.asarray(make_image()) / 127.5 - 1 if blank is None else blanked(mask, blank)
    latents = model.first_stage_model.encode(torch.tensor(seen, dtype=torch.float32)[None, None]).mode()
    at_latents = torch.tensor(np.asarray(mask)[::4, ::4] >= 128).float()[None, None]  # nearest: the first of 4 pixels
    expected = {
        "mask_latents": [at_latents, 0.5 * latents],
        "latents_mask": [0.5 * latents, 2 * at_latents - 1],
        "latents": [latents],  # unscaled
    }[concat]
    assert [x.shape for x in inputs.given] == [(2 * count, channels, 8, 8)] * 2  # both halves of guidance, two steps
    for x in inputs.given:
        torch.testing.assert_close(x[:, 4:], torch.cat(expected, 1).expand(2 * count, -1, -1, -1), rtol=1e-5, atol=1e-5)
    for image in images:
        assert np.array_equal(np.asarray(image)[np.asarray(mask) == 0], np.asarray(make_image())[np.asarray(mask) == 0])
    # Those that are told of the mask draw freely; InstructPix2Pix is not, and has the rest put back.
    kept = torch.nn.functional.max_pool2d(torch.tensor(np.asarray(mask) >= 128).float()[None, None], 4) == 0
    difference = (
        (steps[0].x0 - seen_latents(model, make_image())).abs().amax(1, keepdim=True)[kept.expand(count, 1, 8, 8)]
    )
    assert (difference == 0).all() if concat == "latents" else (difference > 0).all()


@pytest.mark.parametrize(("concat", "channels"), [("mask_latents", 9), ("latents_mask", 9), ("latents", 8)])
def test_models_with_concat_draw_from_text_alone(concat, channels):
    """An image that is masked everywhere; for InstructPix2Pix the zeros that stand for no image."""
    model = concat_model(concat, channels)
    inputs = Inputs(model)
    model.generate(["five", "six"], steps=1, scale=1.0)
    blank = torch.full((1, 1, 32, 32), -1.0 if concat == "latents_mask" else 0.0)
    latents, ones = 0.5 * model.first_stage_model.encode(blank).mode(), torch.ones(1, 1, 8, 8)
    expected = {"mask_latents": [ones, latents], "latents_mask": [latents, ones], "latents": [torch.zeros(1, 4, 8, 8)]}[
        concat
    ]
    assert inputs.given[0].shape == (2, channels, 8, 8)
    torch.testing.assert_close(
        inputs.given[0][:, 4:], torch.cat(expected, 1).expand(2, -1, -1, -1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("concat", "channels"), [("mask_latents", 9), ("latents_mask", 9), ("latents", 8)])
def test_where_models_with_concat_start(concat, channels):
    """Below strength 1 from the image with noise. At 1 from noise alone, where the model has in its input what is kept;
    what it has not (the kept part of an instruction model's image, all without a mask) starts from the image."""
    model = concat_model(concat, channels)
    inputs = Inputs(model)
    noise, known = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        seen_latents(model, make_image()),
    )
    for mask, strength in ((None, 0.5), (top_half(), 0.5), (None, 1), (top_half(), 1)):
        model.generate(["five"], steps=2, scale=1.0, image=make_image(), mask=mask, strength=strength)
        x = inputs.given[-int(2 * strength)][:, :4]
        sigma = sampling_sigmas(model.schedule, 2, "trailing").tolist()[-int(2 * strength) - 1]
        noised = to_vp(known + sigma * noise, sigma)
        new = torch.zeros(1, 1, 8, 8)
        rows = {None: 8, 1: 4} if concat == "latents" else {None: 0, 1: 8}
        new[:, :, : rows[None if mask is None else 1]] = strength == 1
        torch.testing.assert_close(x, torch.where(new == 1, noise, noised), rtol=1e-5, atol=1e-5)
    assert model.default_strength(False) == (1.0 if concat == "latents" else 0.75)


def test_models_with_concat_in_half_precision():
    model = concat_model("mask_latents", 9).to(torch.bfloat16)
    inputs = Inputs(model)
    (image,) = model.generate(["five"], steps=2, image=make_image(), mask=top_half())
    assert inputs.given[0].dtype == torch.bfloat16
    assert np.array_equal(np.asarray(image)[16:], np.asarray(make_image())[16:])
