"""LatentDiffusion: `generate` is five steps anyone can write out; seeds, batches, guidance, sizes, precision."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, pixels, refused

import ldm
from ldm.diffusion import guidance
from ldm.diffusion.denoiser import PREDICTIONS, from_vp, target, to_vp
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import q_sample, sampling_sigmas
from ldm.images import to_pil
from ldm.latent_diffusion import LatentDiffusion, require
from ldm.pixel_diffusion import PixelDiffusion

PROMPTS = ["five", "a thin 3", "", "an eight leaning left"]


class Calls:
    """Counts the UNet's calls and keeps their batch sizes and dtypes."""

    def __init__(self, model):
        self.batches, self.dtypes = [], []
        self.handle = model.model.diffusion_model.register_forward_pre_hook(self.note)

    def note(self, module, arguments):
        self.batches.append(len(arguments[0]))
        self.dtypes.append(arguments[0].dtype)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.handle.remove()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_generate_is_five_steps(tiny_model, sampler):
    """Bit for bit; ddpm draws each step's noise from the same generator as the start."""
    model, row = tiny_model, SAMPLERS[sampler]
    prompts = [*PROMPTS[:3], "eight"]  # of one length, so that they are one batch
    with torch.inference_mode():
        cond, uncond = model.condition(prompts), model.condition(["thick"] * 4)
        denoise = guidance.classifier_free(model.denoiser(), cond, uncond, 2.5)
        sigmas = sampling_sigmas(model.schedule, 3, row.spacing)
        generators = [torch.Generator().manual_seed(7 + i) for i in range(4)]

        def draw():
            return torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])

        *_, last = row(denoise, from_vp(draw(), sigmas[0].item()), sigmas, noise=draw)
        expected = to_pil(model.decode(to_vp(last.x, sigmas[-1].item())))
    images = model.generate(prompts, negative="thick", steps=3, scale=2.5, sampler=sampler, seed=7)
    assert np.array_equal(pixels(images), pixels(expected))
    assert images[0].size == (32, 32) and images[0].mode == "L"
    assert pixels(images).std() > 5  # random weights draw something


def test_the_models_own_defaults_are_what_is_not_given(tiny_model):
    own = {"steps": 4, "scale": 2.0, "sampler": "ddim", "height": 32, "width": 32, "spacing": "trailing", "eta": 0.0}
    assert np.array_equal(pixels(tiny_model.generate(["5"])), pixels(tiny_model.generate(["5"], **own)))


def test_an_image_is_the_same_alone_and_in_any_batch(tiny_model):
    options = {"sampler": "ddpm", "steps": 3}
    whole = pixels(tiny_model.generate(PROMPTS, seed=20, **options))
    for size in (1, 3):
        assert abs(pixels(tiny_model.generate(PROMPTS, seed=20, batch_size=size, **options)) - whole).max() <= 1
    for i, prompt in enumerate(PROMPTS):
        assert abs(pixels(tiny_model.generate([prompt], seed=20 + i, **options))[0] - whole[i]).max() <= 1
    chosen = pixels(tiny_model.generate([PROMPTS[3], PROMPTS[1]], seeds=[23, 21], **options))
    assert abs(chosen - whole[[3, 1]]).max() <= 1
    assert np.array_equal(pixels(tiny_model.generate(PROMPTS, seed=20, **options)), whole)  # same batch: same bytes
    assert not np.array_equal(whole, pixels(tiny_model.generate(PROMPTS, seed=21, **options)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_fixed_code_starts_all_from_image_0s_noise(tiny_model, batch_size):
    starts = []
    options = {"steps": 2, "seed": 5, "batch_size": batch_size, "fixed_code": True}
    images = pixels(tiny_model.generate(["five"] * 4, callback=lambda s: starts.append(s.x), **options))
    assert abs(images - images[0]).max() <= 1
    others = pixels(tiny_model.generate(["five"] * 4, steps=2, seed=5))
    assert abs(others[0] - images[0]).max() <= 1 and abs(others[1] - images[1]).max() > 5
    assert [len(x) for x in starts] == [batch_size, batch_size] * (4 // batch_size)


def test_negative_prompts_one_or_many(tiny_model):
    options = {"steps": 2, "scale": 3.0, "seeds": [1, 1]}
    one = pixels(tiny_model.generate(["5", "5"], negative="bold", **options))
    many = pixels(tiny_model.generate(["5", "5"], negative=["bold", "thin"], **options))
    none = pixels(tiny_model.generate(["5", "5"], **options))
    assert np.array_equal(one[0], one[1]) and np.array_equal(many[0], one[0])
    assert not np.array_equal(many[1], one[1]) and not np.array_equal(none[0], one[0])
    assert np.array_equal(none, pixels(tiny_model.generate(["5", "5"], negative="", **options)))
    # a negative prompt that is the prompt leaves nothing to guide towards
    same = pixels(tiny_model.generate(["5"], negative="5", steps=2, scale=3.0, seed=1))
    assert abs(same - pixels(tiny_model.generate(["5"], steps=2, scale=1.0, seed=1))).max() <= 1


def test_the_unet_is_evaluated_once_per_step_and_doubled_only_under_guidance(tiny_model):
    with Calls(tiny_model) as calls:
        tiny_model.generate(["5"] * 3, steps=4, scale=1.0)
    assert calls.batches == [3, 3, 3, 3]
    with Calls(tiny_model) as calls:
        tiny_model.generate(["5"] * 3, steps=4, scale=2.0, batch_size=2)
    assert calls.batches == [4] * 4 + [2] * 4
    sigmas = sampling_sigmas(tiny_model.schedule, 4, "trailing")
    with Calls(tiny_model) as calls:
        tiny_model.generate(["5"], steps=4, scale=2.0, interval=(0.0, float(sigmas[2])))
    assert calls.batches == [1, 1, 2, 2]


@pytest.mark.parametrize(("side", "expected"), [(16, [3]), (32, [1, 1, 1])])
def test_large_images_are_decoded_one_by_one(tiny_model, side, expected):
    z, batches = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0)), []
    together = tiny_model.first_stage_model.decode(z / tiny_model.scale_factor)
    hook = tiny_model.first_stage_model.decoder.register_forward_hook(lambda *args: batches.append(len(args[2])))
    torch.testing.assert_close(tiny_model.decode(z), together, rtol=1e-4, atol=1e-5)
    hook.remove()
    assert batches == expected


def test_callback_is_given_every_step_of_every_batch(tiny_model):
    steps = []
    images = tiny_model.generate(["5"] * 3, steps=3, batch_size=2, callback=steps.append)
    sigmas = sampling_sigmas(tiny_model.schedule, 3, "trailing").tolist()
    assert [step.index for step in steps] == [0, 1, 2] * 2 and [step.sigma for step in steps] == sigmas[1:] * 2
    assert [step.x.shape for step in steps] == [(2, 4, 8, 8)] * 3 + [(1, 4, 8, 8)] * 3
    # the last sigma is 0, so that the last state is the image, and the last x0
    assert torch.equal(steps[2].x, steps[2].x0)
    assert np.array_equal(pixels(to_pil(tiny_model.decode(steps[2].x))), pixels(images[:2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1001}, "from 1 to 1000 .* got 1001"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'; choose from ddim, ddpm"),
        ({"spacing": "even"}, "unknown spacing 'even'"),
        ({"height": 34}, "height 34 .* multiple of 8"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"height": -8}, "height must be at least 1, got -8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, "seed must be from 0 .* got 18446744073709551616"),
        ({"seeds": [1]}, "2 prompts need .* got 1 seeds"),
        ({"negative": ["a", "b", "c"]}, "2 prompts need .* 3 negative prompts"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eta": 1.5}, "eta must be from 0 to 1, got 1.5"),
        ({"rescale": 2.0}, "rescale must be from 0 to 1, got 2.0"),
        ({"interval": (2.0, 1.0)}, "interval ends before it begins: got 2 to 1"),
    ],
)
def test_what_is_out_of_range_is_named(tiny_model, settings, message):
    refused(message, tiny_model.generate, ["4", "5"], **settings)


def test_one_string_is_no_list_of_prompts(tiny_model):
    refused("a list of prompts, not 'five'", tiny_model.generate, "five")
    assert tiny_model.generate([]) == []


def test_progress_is_a_bar_of_all_steps(tiny_model, capsys):
    quiet = tiny_model.generate(["5", "6", "7"], steps=2, batch_size=2)
    assert capsys.readouterr().err == ""
    assert tiny_model.generate(["5", "6", "7"], steps=2, batch_size=2, progress=True) == quiet
    assert "4/4" in capsys.readouterr().err  # two batches of two steps


def test_other_sizes(tiny_model):
    image = tiny_model.generate(["5"], steps=1, height=40, width=24)[0]
    assert image.size == (24, 40)
    assert tiny_model.latent_size(40, 24) == (4, 10, 6)


def test_latents_are_scaled_after_encoding_and_back_before_decoding(tiny_model):
    model, x = copy.deepcopy(tiny_model), torch.rand(2, 1, 32, 32) * 2 - 1
    model.scale_factor = 0.18215
    posterior = model.first_stage_model.encode(x)
    z = model.encode(x, torch.Generator().manual_seed(3))
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(z, 0.18215 * (posterior.mean + posterior.std * eps))
    assert torch.equal(model.decode(z), model.first_stage_model.decode(z / 0.18215))


def test_images_are_encoded_as_their_pixels(tiny_model):
    levels = torch.arange(1024).view(1, 1, 32, 32) % 256
    (image,), x = to_pil(levels.byte()), levels / 127.5 - 1
    expected = tiny_model.encode(x, mode=True)
    assert torch.equal(tiny_model.encode(image, mode=True), expected)
    two = tiny_model.encode([image.convert("RGB")] * 2, mode=True)
    assert torch.equal(two, tiny_model.encode(x.expand(2, -1, -1, -1), mode=True))
    padded = tiny_model.encode(image.crop((0, 0, 30, 29)), mode=True)
    assert padded.shape == expected.shape and torch.equal(tiny_model.encode(x[..., :29, :30], mode=True), padded)
    refused("is 3 x 32 pixels, too small for this model: its minimum is 4 x 4", tiny_model.encode, x[..., :3])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("encode", "a.png", "images are PIL images, .* got str"),
        ("encode", np.zeros((32, 32)), "images are PIL images, .* got ndarray"),
        ("encode", torch.zeros(1, 32, 32), r"\(b, 1, h, w\), got torch.float32 \(1, 32, 32\)"),
        ("encode", torch.zeros(1, 3, 32, 32), r"\(b, 1, h, w\), got torch.float32 \(1, 3, 32, 32\)"),
        ("encode", torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        ("decode", np.zeros((1, 4, 8, 8)), r"latents are a tensor \(b, 4, h, w\), got ndarray"),
        ("decode", torch.zeros(4, 8, 8), r"latents are floats \(b, 4, h, w\), got torch.float32 \(4, 8, 8\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_or_decoded_is_named(tiny_model, name, given, message):
    refused(message, getattr(tiny_model, name), given)


def test_the_tokenizer_reads_and_writes(tiny_model):
    assert tiny_model.tokenizer is tiny_model.cond_stage_model.tokenizer
    assert LatentDiffusion(**TINY | {"cond_stage_config": None}).tokenizer is None


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_loss_is_the_squared_error_of_what_is_predicted(tiny_model, prediction):
    model = copy.deepcopy(tiny_model)
    model.prediction = prediction
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    t, cond = torch.tensor([0, 400, 999]), model.condition(["4", "5", ""])
    ab = model.schedule.alphas_cumprod[t].float()[:, None, None, None]
    x_t = ab.sqrt() * z + (1 - ab).sqrt() * eps
    wanted = {"eps": eps, "x0": z, "v": ab.sqrt() * eps - (1 - ab).sqrt() * z}[prediction]
    expected = ((model.model.diffusion_model(x_t, t, cond["c_crossattn"], cond["c_adm"]) - wanted) ** 2).mean((1, 2, 3))
    # sqrt(ab) is rounded to float32 before or after the root: a few units in the last place
    torch.testing.assert_close(model.loss(z, cond, t, eps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_a_float32_state(tiny_model, dtype):
    model, steps = copy.deepcopy(tiny_model).to(dtype), []
    with Calls(model) as calls:
        images = pixels(model.generate(["five"], steps=3, callback=steps.append))
    assert calls.dtypes == [dtype] * 3
    assert {tensor.dtype for step in steps for tensor in (step.x, step.x0)} == {torch.float32}
    # 8 or 11 bits of precision through three networks; a bf16 state would lose the small steps and show far more
    assert abs(images - pixels(tiny_model.generate(["five"], steps=3))).mean() < (6 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": {"step": 5}}, "unknown settings \\['step'\\].*'steps'"),
        ({"unet_config": {"target": "ldm.models.unet.UNetModel", "params": {"image_sizes": 8}}}, "image_sizes"),
    ],
)
def test_unknown_settings_of_a_model_are_named(change, message):
    refused(message, LatentDiffusion, **{**TINY, **change})


def test_a_part_halves_sides_by_an_integer():
    half = SimpleNamespace(embed_dim=4, downsampling=0.5)
    refused("the first stage SimpleNamespace has the downsampling 0.5: it must be", require, "first stage", half)


def test_an_unconditional_model_has_nothing_to_guide():
    """Whatever is given as the negative prompt (scripts give the empty one): the second half would repeat the first."""
    params = copy.deepcopy(TINY) | {"cond_stage_config": None}
    for name in ("num_classes", "adm_in_channels", "context_dim", "use_spatial_transformer"):
        del params["unet_config"]["params"][name]
    model = LatentDiffusion(**params).eval()
    assert len(model.generate([""], steps=1, scale=1.0)) == 1
    for negative in (None, ""):
        with pytest.raises(ValueError, match="guidance scale 2 needs a null or negative condition; use scale 1"):
            model.generate([""], negative, steps=1)


def test_hash_is_that_of_the_file(tiny_model, tiny_checkpoint):
    import hashlib

    import ldm

    expected = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()[:10]
    assert ldm.load(tiny_checkpoint, device="cpu").hash == expected
    assert tiny_model.hash == ""


def test_prompts_of_different_lengths_in_one_run(tiny_model):
    """An image is the same whatever the lengths of the other prompts, and its negative prompt is padded to it."""
    long = "five " * 30 + "BREAK (bold:1.5)"
    prompts, options = ["five", long, "(five:1.4)", "3"], {"steps": 2, "scale": 3.0}
    together = pixels(tiny_model.generate(prompts, seed=4, **options))
    for i, prompt in enumerate(prompts):
        alone = pixels(tiny_model.generate([prompt], seed=4 + i, **options))[0]
        assert abs(alone - together[i]).max() <= 1
    literal = pixels(tiny_model.generate(["(five:1.4)"], seed=6, plain=True, **options))[0]
    assert abs(literal - together[2]).max() > 1
    refused("clip_skip 9", tiny_model.generate, ["5"], clip_skip=9, **options)


def test_what_is_set_on_a_model_is_saved(tiny_model, tmp_path):
    """The configuration follows the attributes, and the schedule its parameters."""
    model, path = copy.deepcopy(tiny_model), tmp_path / "changed.safetensors"
    assert model.schedule.T == 1000
    settings = {"scale_factor": 0.5, "prediction": "eps", "schedule_params": {"name": "linear", "T": 50}}
    for name, value in settings.items():
        setattr(model, name, value)
    model.defaults["steps"] = 7
    assert model.schedule.T == 50
    model.schedule_params["T"] = 40  # in place
    ldm.save(model, path)
    loaded = ldm.load(path, device="cpu")
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.defaults["steps"] == 7 and loaded.schedule.T == model.schedule.T == 40
    assert np.array_equal(pixels(model.generate(["5"])), pixels(loaded.generate(["5"])))
    assert copy.deepcopy(tiny_model).config == tiny_model.config  # the original was not touched


@pytest.mark.parametrize("fixed", [{"scale_factor": 0.5}, {"concat": "latents"}])
def test_what_a_pixel_model_cannot_save_is_refused(fixed, tmp_path):
    unet = {"target": "ldm.models.unet.UNetModel", "params": {**TINY["unet_config"]["params"]}}
    for name in ("num_classes", "adm_in_channels", "context_dim", "use_spatial_transformer"):
        del unet["params"][name]
    model = PixelDiffusion(unet, channels=4)
    for name, value in (fixed | {"clip": None, "learned_variance": True}).items():
        setattr(model, name, value)
    (name,) = fixed
    refused(f"a PixelDiffusion always has {name}", ldm.save, model, tmp_path / "pixel.safetensors")
    setattr(model, name, PixelDiffusion(unet, channels=4).__dict__[name])
    assert model.config["clip"] is False and model.config["learned_variance"] is True
    model.clip = 0.5
    assert PixelDiffusion(**model.config).clip == 0.5


def test_latents_have_no_limit_to_set(tiny_model):
    """It would be lost in a file."""
    with pytest.raises(AttributeError, match="property 'clip' of 'LatentDiffusion'"):
        tiny_model.clip = 1.0


@pytest.mark.parametrize("scale_factor", [0.0, -1.0, float("inf"), float("nan")])
def test_latents_are_divided_by_the_scale_factor(scale_factor):
    refused("scale_factor .* must be a number above 0", LatentDiffusion, **TINY, scale_factor=scale_factor)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_and_sampling_ask_the_network_the_same(model, prediction):
    """The loss is the error of the denoiser's own prediction at that noise level; a flow network's input differs."""
    config = {**model.config, "prediction": prediction, "schedule": {"name": "flow", "shift": 2.0}}
    model, state = LatentDiffusion(**config), model.state_dict()
    model.load_state_dict(state)
    t, generator = torch.tensor([0, 300, 900]), torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        cond, denoise = model.condition(PROMPTS[:3]), model.denoiser()
        losses, x_vp = model.loss(z, cond, t, noise), q_sample(z, t, noise, model.schedule)
        for i, sigma in enumerate(model.schedule.sigmas[t].tolist()):
            x = from_vp(x_vp[i : i + 1], sigma)
            x0 = denoise(x, sigma, {key: value[i : i + 1] for key, value in cond.items()}).x0
            output = {"eps": (x - x0) / sigma, "x0": x0, "flow": (x - x0) / sigma - x0}
            output["v"] = (output["eps"] - sigma * x0) / (1 + sigma**2) ** 0.5
            error = output[prediction] - target(prediction, z, noise, model.schedule.alphas_cumprod[t])[i : i + 1]
            assert losses[i].item() == pytest.approx(error.square().mean().item(), rel=2e-4)


def test_a_flow_model_is_saved_as_ours_alone(model, tmp_path):
    flow = LatentDiffusion(**{**model.config, "prediction": "flow", "schedule": {"name": "flow", "shift": 3.0}})
    flow.load_state_dict(model.state_dict())
    ldm.save(flow, tmp_path / "flow.safetensors")
    again = ldm.load(tmp_path / "flow.safetensors")
    assert again.prediction == "flow" and torch.equal(again.schedule.sigmas, flow.schedule.sigmas)
    images = [each.generate(["five"], steps=2, seed=1) for each in (again, flow, model)]
    assert np.array_equal(pixels(images[0]), pixels(images[1])) and not np.array_equal(
        pixels(images[0]), pixels(images[2])
    )
    with pytest.raises(ValueError, match="CompVis's format cannot say that a network predicts flow"):
        ldm.save(flow, tmp_path / "flow.ckpt", format="compvis")
    assert [path.name for path in tmp_path.iterdir()] == ["flow.safetensors"]
