"""LatentDiffusion in CompVis's terms: published names, and the numbers of our own model."""

import copy
from pathlib import Path

import pytest
import torch
from compvis_models import ENCODERS, VQ, Recorder, a_batch, built, config, ours, randn
from conftest import refused
from meta_models import TINY_1
from PIL import Image
from torch import nn

from ldm.compvis import ddpm
from ldm.diffusion import guidance, sampling
from ldm.diffusion.denoiser import from_vp, to_vp
from ldm.diffusion.schedule import q_sample, sampling_sigmas
from ldm.util import instantiate_from_config

PROMPTS = ["a photograph of a cat", ""]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, values of order 1
PLAIN = {"use_spatial_transformer": False, "context_dim": None}


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


# names


def test_a_published_file_loads_strictly_with_or_without_position_ids(clip, model):
    state = model.state_dict()
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert torch.equal(state[ids], torch.arange(77)[None])
    for left_out in ((), (ids,)):
        other = built(config(clip), seed=5)
        file = {name: tensor for name, tensor in state.items() if name not in left_out}
        assert tuple(map(len, other.load_state_dict(file, strict=True))) == (0, 0)
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(RuntimeError, match="out.2.bias"):
        model.load_state_dict({k: v for k, v in state.items() if not k.endswith("diffusion_model.out.2.bias")})


def test_attributes(model):
    assert model.model.diffusion_model.in_channels == 4 and model.model.conditioning_key == "crossattn"
    assert (model.channels, model.image_size, model.first_stage_key, model.cond_stage_key) == (4, 8, "jpg", "txt")
    assert (model.global_step, model.current_epoch, model.logger, model.scale_factor) == (0, 0, None, 0.18215)
    assert model.device == torch.device("cpu") and not model.clip_denoised and model.parameterization == "eps"
    assert isinstance(model, ddpm.DDPM) and ddpm.DiffusionWrapper is type(model.model)
    model.train()
    parts = (model.training, model.model.training, model.first_stage_model.training, model.cond_stage_model.training)
    model.eval()
    assert parts == (True, True, False, False)
    assert not any(
        p.requires_grad for p in [*model.first_stage_model.parameters(), *model.cond_stage_model.parameters()]
    )


# numbers


def test_our_own_verbs_are_there(model):
    twin = ours(model)
    settings = {"steps": 3, "height": 16, "width": 16, "scale": 3.0}
    mine, theirs = model.generate(PROMPTS, **settings), twin.generate(PROMPTS, plain=True, **settings)
    assert [image.tobytes() for image in mine] == [image.tobytes() for image in theirs]
    assert model.defaults["height"] == 16 and len(set(mine[0].tobytes())) > 16


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@torch.no_grad()
def test_losses_and_levels_are_ours(clip, model, parameterization):
    model = copy.copy(model)
    model.parameterization = parameterization
    twin = ours(model)
    z, noise, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([1, 700])
    noised = model.q_sample(x_start=z, t=t, noise=noise)
    torch.testing.assert_close(noised, q_sample(z, t, noise, twin.schedule), rtol=1e-6, atol=1e-6)
    cond = model.get_learned_conditioning(PROMPTS)
    assert torch.equal(cond, twin.condition(PROMPTS)["c_crossattn"])
    output = model.apply_model(noised, t, cond)
    assert torch.equal(output, twin.apply_model(noised, t, {"c_crossattn": cond}))
    loss, logs = model.p_losses(z, cond, t, noise=noise)
    per_image = twin.loss(z, {"c_crossattn": cond}, t, noise)
    torch.testing.assert_close(loss, per_image.mean(), **CLOSE)
    assert torch.equal(logs["val/loss"], loss) and set(logs) == {"val/loss_simple", "val/loss_vlb", "val/loss"}
    torch.testing.assert_close(logs["val/loss_vlb"], (model.lvlb_weights[t] * per_image).mean(), **CLOSE)


# conditioning


def test_conditioning_without_a_dict_goes_where_the_key_says(clip, model):
    x, t = randn(2, 4, 8, 8), torch.tensor([1, 2])
    c = randn(2, 77, 16)
    forms = (c, [c], [c[:, :9], c[:, 9:]], {"c_crossattn": [c]}, {"c_crossattn": c})
    asked = [model.apply_model(x, t, cond) for cond in forms]
    assert all(torch.equal(out, asked[0]) for out in asked)
    concat = built(config(clip, {"in_channels": 8}, conditioning_key="concat"))
    concat.model.diffusion_model = Recorder()
    concat.apply_model(x, t, -x)
    assert torch.equal(concat.model.diffusion_model.given["x"], torch.cat([x, -x], 1))


def test_the_encoder_is_asked_as_compvis_asks_it(clip, model):
    class Encoder(nn.Module):
        def other(self, c):
            return c, "other"

        def forward(self, c):
            return c, "called"

    model = copy.copy(model)
    model._modules = model._modules | {"cond_stage_model": Encoder()}
    assert model.get_learned_conditioning("c") == ("c", "called")
    model.cond_stage_model.encode = lambda c: (c, "encoded")
    assert model.get_learned_conditioning("c") == ("c", "encoded")
    model.cond_stage_forward = "other"
    assert model.get_learned_conditioning("c") == ("c", "other")


def test_nothing_said(clip, model):
    null = model.get_unconditional_conditioning(3)
    assert torch.equal(null, model.get_learned_conditioning([""] * 3))
    assert torch.equal(model.get_unconditional_conditioning(2, ["cat"]), model.get_learned_conditioning(["cat", "cat"]))
    classes = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"embed_dim": 16, "n_classes": 5, "key": "class_label"}}
    model = built(config(clip, cond_stage_config=classes, cond_stage_key="class_label"))
    assert torch.equal(model.get_unconditional_conditioning(2), model.cond_stage_model.embedding.weight[[4, 4], None])


# first stage and batches


@torch.no_grad()
def test_the_first_stage(model):
    twin, x = ours(model), randn(2, 3, 16, 16)
    posterior = model.encode_first_stage(x)
    assert torch.equal(model.scale_factor * posterior.mode(), twin.encode(x, mode=True))
    torch.manual_seed(1)
    z = model.get_first_stage_encoding(posterior)
    torch.manual_seed(1)
    assert torch.equal(z, twin.encode(x)) and z.shape == (2, 4, 8, 8)
    torch.testing.assert_close(model.decode_first_stage(z), twin.decode(z), **CLOSE)
    z.requires_grad_()
    assert not model.decode_first_stage(z).requires_grad
    with torch.enable_grad():
        assert model.differentiable_decode_first_stage(z).requires_grad


@torch.no_grad()
def test_a_vq_first_stage(clip):
    model = built(config(clip, first_stage_config=VQ, scale_factor=1.0))
    z = model.get_first_stage_encoding(model.encode_first_stage(randn(2, 3, 16, 16)))
    assert torch.equal(model.decode_first_stage(z), model.first_stage_model.decode(z))
    exact = model.decode_first_stage(z, force_not_quantize=True)
    assert torch.equal(exact, model.first_stage_model.decode(z, force_not_quantize=True))
    assert not torch.equal(exact, model.decode_first_stage(z))
    log = model.log_images({"jpg": randn(1, 16, 16, 3), "txt": ["x"]}, ddim_steps=2, plot_progressive_rows=False)
    assert log["samples_x0_quantized"].shape == (1, 3, 16, 16)


def test_batches(model):
    batch = a_batch(3)
    z, c = model.get_input(batch, "jpg")
    assert z.shape == (3, 4, 8, 8) and torch.equal(c, model.get_learned_conditioning(batch["txt"]))
    options = {"return_first_stage_outputs": True, "return_x": True, "return_original_cond": True, "bs": 2}
    z, c, x, rec, x_again, said = model.get_input(batch, "jpg", **options)
    assert torch.equal(x, batch["jpg"][:2].permute(0, 3, 1, 2)) and x_again is x and said == batch["txt"]
    assert torch.equal(rec, model.decode_first_stage(z)) and len(c) == len(z) == 2


def test_batches_of_images_classes_and_what_is_trained(clip, model):
    rescaler = {"target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 1, "in_channels": 3, "out_channels": 4}}
    wide, default = PLAIN | {"in_channels": 8}, {"conditioning_key": None}
    mapped = built(config(clip, wide, cond_stage_config=rescaler, cond_stage_key="LR", **default))
    batch = a_batch() | {"LR": randn(2, 16, 16, 3, seed=3)}
    assert mapped.model.conditioning_key == "concat" and mapped.get_input(batch, "jpg")[1].shape == (2, 4, 8, 8)
    assert torch.isfinite(mapped.training_step(batch))
    trained = built(config(clip, cond_stage_trainable=True))
    assert trained.get_input(batch, "jpg")[1] == PROMPTS and trained.cond_stage_model.train().training
    encoded = trained.get_input(batch, "jpg", force_c_encode=True)[1]
    assert torch.equal(encoded, trained.get_learned_conditioning(PROMPTS))
    own = built(config(clip, wide, cond_stage_config="__is_first_stage__", cond_stage_key="masked", **default))
    assert own.cond_stage_model is own.first_stage_model
    c = own.get_input(batch | {"masked": batch["jpg"]}, "jpg")[1]
    latents = own.encode_first_stage(batch["jpg"].permute(0, 3, 1, 2)).mode()
    torch.testing.assert_close(c, latents, **CLOSE)  # unscaled, as there
    none = built(config(clip, PLAIN, cond_stage_config="__is_unconditional__"))
    assert none.model.conditioning_key is None and none.get_input(batch, "jpg")[1] is None
    assert torch.isfinite(none.training_step(batch)) and len(none.generate([None], steps=2, scale=1)) == 1


# sampling


def ancestral(model, cond, x, levels, noises):
    """DDPM (Ho et al. 2020, algorithm 2) in the variance-preserving frame, from the buffers: x, and every x0."""
    x0s = []
    for t in reversed(range(levels)):
        output = model.apply_model(x, torch.full((len(x),), t), cond)
        predict = {"eps": model.predict_start_from_noise, "v": model.predict_start_from_z_and_v}
        x0s.append(predict[model.parameterization](x, torch.full((len(x),), t), output))
        mean = model.posterior_mean_coef1[t] * x0s[-1] + model.posterior_mean_coef2[t] * x
        x = mean + (t > 0) * (0.5 * model.posterior_log_variance_clipped[t]).exp() * next(noises)
    return x, x0s


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@torch.no_grad()
def test_ancestral_sampling(clip, parameterization):
    model = built(config(clip, parameterization=parameterization, timesteps=8, log_every_t=3, linear_end=0.5))
    cond, start = model.get_learned_conditioning(PROMPTS), randn(2, 4, 8, 8)
    torch.manual_seed(0)
    noises = iter([torch.randn(2, 4, 8, 8) for _ in range(8)])
    expected, x0s = ancestral(model, cond, start, 8, noises)
    calls = []
    torch.manual_seed(0)
    options = {"x_T": start, "verbose": False, "callback": calls.append}
    x, kept = model.p_sample_loop(cond, (2, 4, 8, 8), return_intermediates=True, **options)
    # of eight steps in float32, each amplified by the network
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    assert calls == [7, 6, 5, 4, 3, 2, 1, 0] and len(kept) == 5 and torch.equal(kept[0], start)
    torch.manual_seed(0)
    x_again, found = model.progressive_denoising(cond, (4, 8, 8), batch_size=2, x_T=start, verbose=False)
    assert torch.equal(x_again, x) and len(found) == 4  # at 7, 6, 3 and 0
    for found_x0, i in zip(found, (0, 1, 4, 7), strict=True):
        torch.testing.assert_close(found_x0, x0s[i], rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(model.sample(cond, 2, x_T=start, verbose=False), x)
    torch.manual_seed(0)
    assert torch.equal(model.sample_log(cond, 2, ddim=False, ddim_steps=None, x_T=start, verbose=False)[0], x)


@torch.no_grad()
def test_ancestral_sampling_of_a_part(clip):
    model = built(config(clip, timesteps=8))
    z, mask = randn(3, 4, 8, 8), torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1  # stays
    cond = {"c_crossattn": [model.get_learned_conditioning([*PROMPTS, "x", "y"])]}
    noised, q_sample = [], model.q_sample
    model.q_sample = lambda x0, t, **more: noised.append((t.tolist(), q_sample(x0, t, **more))) or noised[-1][1]
    x = model.p_sample_loop(cond, (3, 4, 8, 8), mask=mask, x0=z, start_T=5, verbose=False)
    assert [t for t, _ in noised] == [[i] * 3 for i in (4, 3, 2, 1, 0)]  # kept at every level, noised to it
    assert torch.equal(x[..., :4], noised[-1][1][..., :4]) and (x - noised[-1][1])[..., 4:].abs().min() > 1e-6


@torch.no_grad()
def test_steps_of_ancestral_sampling(clip):
    """What subclasses override of it, and its settings."""
    model = built(config(clip, timesteps=8, linear_end=0.5))
    cond, x, t = model.get_learned_conditioning(PROMPTS), randn(2, 4, 8, 8), torch.tensor([5, 0])
    predicted = model.predict_start_from_noise(x, t, model.apply_model(x, t, cond))
    mean, variance, log_variance, x0 = model.p_mean_variance(x, cond, t, clip_denoised=True, return_x0=True)
    torch.testing.assert_close(x0, predicted.clamp(-1, 1))
    torch.testing.assert_close(mean, model.q_posterior(x0, x, t)[0])
    assert torch.equal(variance.flatten(), model.posterior_variance[t]) and variance.shape == (2, 1, 1, 1)
    assert torch.equal(log_variance.flatten(), model.posterior_log_variance_clipped[t])
    assert len(model.p_mean_variance(x, cond, t, clip_denoised=False)) == 3
    noise = {seed: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0,)}[0]
    torch.manual_seed(0)
    stepped, x0 = model.p_sample(x, cond, t, temperature=2.0, return_x0=True)
    mean = model.q_posterior(predicted, x, t)[0]
    torch.testing.assert_close(stepped[0], mean[0] + 2 * model.posterior_variance[5].sqrt() * noise[0], **CLOSE)
    torch.testing.assert_close(stepped[1], mean[1], **CLOSE)  # no noise at the last level
    torch.testing.assert_close(x0, predicted)
    alike = model.p_sample(x[:1].expand(2, -1, -1, -1), cond[:1].expand(2, -1, -1), t[:1].expand(2), repeat_noise=True)
    torch.testing.assert_close(alike[0], alike[1])
    corrector = type("", (), {"modify_score": lambda self, model, e, x, t, c, by: e + by})()
    corrected = {"score_corrector": corrector, "corrector_kwargs": {"by": 1.0}, "return_x0": True}
    _, x0 = model.p_sample(x, cond, t, **corrected)
    torch.testing.assert_close(x0, predicted - model.sqrt_recipm1_alphas_cumprod[t].view(2, 1, 1, 1), **CLOSE)

    steps = []
    own = type(model).p_sample
    model.p_sample = lambda x, c, t, **settings: steps.append((t.tolist(), settings)) or own(model, x, c, t, **settings)
    model.progressive_denoising(cond, (2, 4, 8, 8), verbose=False, temperature=0.5, noise_dropout=0.1)
    assert [t for t, _ in steps] == [[i, i] for i in reversed(range(8))] and steps[0][1]["temperature"] == 0.5


@torch.no_grad()
def test_ddim_as_ours(model):
    """CompVis's levels, last level and guidance, by our own sampler."""
    twin, start = ours(model), randn(2, 4, 8, 8)
    cond, null = twin.condition(PROMPTS), twin.condition([""] * 2)
    sigmas = sampling_sigmas(twin.schedule, 10, "compvis", "sigma_min").tolist()
    denoise = guidance.classifier_free(twin.denoiser(), cond, null, 3.0)
    *_, last = sampling.sample(denoise, from_vp(start, sigmas[0]), sigmas)
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": null["c_crossattn"]}
    found, _ = model.sample_log(cond["c_crossattn"], 2, True, 10, eta=0.0, x_T=start, **guided)
    expected = to_vp(last.x, sigmas[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_images_of_the_training(clip):
    model = built(config(clip, timesteps=10, log_every_t=4, use_ema=True))
    asked = []
    model.ema_scope = lambda context=None: asked.append(context) or ddpm.nullcontext()
    options = {"ddim_steps": 2, "unconditional_guidance_scale": 3.0, "plot_denoise_rows": True}
    log = model.log_images(a_batch(3), N=2, n_row=1, **options)
    names = {"inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_3.00"}
    names |= {"samples_inpainting", "samples_outpainting"}
    rows = {"diffusion_row": (3, 16, 4 * 16), "denoise_row": (3, 32, 3 * 16), "progressive_row": (3, 32, 4 * 16)}
    found = {name: tuple(image.shape) for name, image in log.items()}
    assert found == {"mask": (2, 1, 8, 8)} | rows | dict.fromkeys(names, (2, 3, 16, 16))
    assert asked == ["Plotting"] and all(torch.isfinite(image).all() for image in log.values())
    assert log["mask"].mean() == 0.75 and torch.equal(log["inputs"], a_batch()["jpg"].permute(0, 3, 1, 2))
    few = {"sample": False, "inpaint": False, "plot_diffusion_rows": False, "plot_progressive_rows": False}
    assert set(model.log_images(a_batch(), **few)) == {"inputs", "reconstruction", "conditioning"}
    assert set(model.log_images(a_batch(), **few, return_keys=["inputs", "none"])) == {"inputs"}
    assert len(asked) == 3 and not model.log_images(a_batch(), **few, use_ema_scope=False).keys() & {"samples"}


def test_a_map_is_logged_in_colours(clip):
    rescaler = {"target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 1, "in_channels": 5, "out_channels": 4}}
    unet = PLAIN | {"in_channels": 8}
    model = built(config(clip, unet, cond_stage_config=rescaler, cond_stage_key="map", conditioning_key=None))
    few = {"sample": False, "plot_diffusion_rows": False, "plot_progressive_rows": False}
    log = model.log_images(a_batch() | {"map": randn(2, 16, 16, 5)}, **few)
    colours = log["original_conditioning"]
    assert colours.shape == (2, 3, 16, 16) and (colours.min(), colours.max()) == (-1, 1)


# other models


def inpainting(clip: Path):
    changes = {"conditioning_key": "hybrid", "finetune_keys": None, "timesteps": 10}
    return built(config(clip, {"in_channels": 9}, f"{ddpm.__name__}.LatentInpaintDiffusion", **changes))


def test_inpainting(clip):
    model = inpainting(clip)
    mask = (randn(2, 16, 16, 1, seed=1) > 0).float()
    batch = a_batch() | {"mask": mask, "masked_image": randn(2, 16, 16, 3, seed=2)}
    z, cond = model.get_input(batch, "jpg", bs=2)
    assert cond["c_concat"][0].shape == (2, 5, 8, 8) and z.shape == (2, 4, 8, 8)
    assert torch.equal(cond["c_concat"][0][:, 0], mask[:, ::2, ::2, 0])  # the mask first, the nearest pixel
    assert torch.equal(cond["c_crossattn"][0], model.get_learned_conditioning(PROMPTS))
    output = model.apply_model(z, torch.tensor([1, 2]), cond)
    expected = ours_inpainting(model).apply_model(
        z, torch.tensor([1, 2]), {"c_concat": cond["c_concat"][0], "c_crossattn": cond["c_crossattn"][0]}
    )
    assert torch.equal(output, expected)
    assert torch.isfinite(model.training_step(batch))
    log = model.log_images(batch, ddim_steps=2, plot_progressive_rows=False, unconditional_guidance_scale=2.0)
    assert {"samples", "samples_inpainting", "samples_cfg_scale_2.00"} < set(log)
    init_image, where = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16))
    where.paste(255, (0, 0, 8, 16))
    settings = {"steps": 3, "scale": 2.0, "image": init_image, "mask": where}
    twin = ours_inpainting(model, timesteps=10)
    mine, theirs = model.generate(PROMPTS, **settings), twin.generate(PROMPTS, plain=True, **settings)
    assert [image.tobytes() for image in mine] == [image.tobytes() for image in theirs]


def ours_inpainting(model, timesteps: int = 1000):
    unet = copy.deepcopy(TINY_1["params"]["unet_config"])
    unet["params"]["in_channels"] = 9
    schedule = TINY_1["params"]["schedule"] | {"T": timesteps}
    return ours(model, unet_config=unet, concat="mask_latents", schedule=schedule)


def test_layouts(clip):
    bert = {"n_embed": 16, "n_layer": 1, "vocab_size": 50, "max_seq_len": 9, "use_tokenizer": False}
    encoder = {"target": f"{ENCODERS}.BERTEmbedder", "params": bert}
    section = config(clip, target=f"{ddpm.__name__}.Layout2ImgDiffusion", cond_stage_config=encoder)
    del section["params"]["cond_stage_key"]
    model, boxes = built(section), torch.arange(18).view(2, 9)
    c = model.get_input(a_batch() | {"coordinates_bbox": boxes}, "jpg")[1]
    assert torch.equal(c, model.cond_stage_model(boxes)) and c.shape == (2, 9, 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_timesteps_cond": 4}, "num_timesteps_cond 4"),
        ({"given_betas": [0.1]}, "given_betas"),
        ({"make_it_fit": True}, "make_it_fit"),
        ({"beta_schedule": "steep"}, "beta_schedule 'steep'"),
        ({"timestep": 10}, "timestep"),
    ],
)
def test_what_is_not_here_is_refused(clip, changes, sentence):
    refused(sentence, instantiate_from_config, config(clip, **changes))


@pytest.mark.parametrize("ema", [False, True])
def test_an_inpainting_model_goes_on_from_one_without(clip, tmp_path, ema):
    """The weights of the mask's channels start at zero, in the averages too."""
    plain = built(config(clip, use_ema=ema))
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.ckpt")
    target = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    section = config(clip, {"in_channels": 9}, target, conditioning_key="hybrid", use_ema=ema)
    section["params"]["ckpt_path"] = str(tmp_path / "plain.ckpt")
    wide, state = instantiate_from_config(section), plain.state_dict()
    for name, tensor in wide.state_dict().items():
        expected = state[name]
        if tensor.shape != expected.shape:
            assert "input_blocks" in name and tensor.shape[1] == 9 and not tensor[:, 4:].any()
            tensor = tensor[:, :4]
        assert torch.equal(tensor, expected), name
    section["params"]["finetune_keys"] = None
    refused("size mismatch for model.diffusion_model.input_blocks.0.0.weight", instantiate_from_config, section)


class Building(ddpm.LatentDiffusion):
    """As research code extends the parts: reads the model's settings, and changes what was built."""

    def instantiate_first_stage(self, config):
        assert isinstance(self.model, nn.Module) and self.first_stage_key == "jpg" and "ddconfig" in config["params"]
        super().instantiate_first_stage(config)
        self.first_stage_model.marked = True

    def instantiate_cond_stage(self, config):
        assert self.first_stage_model.marked and not self.cond_stage_trainable and self.image_size == 8
        self.cond_stage_model = instantiate_from_config(config)
        self.cond_stage_model.layer = "pooled"

    def instantiate_embedding_manager(self, config, embedder):
        return super().instantiate_embedding_manager(config, embedder).double()


def test_overrides_that_build_the_parts_are_called(clip):
    words = {"target": "ldm.modules.embedding_manager.EmbeddingManager", "params": {"placeholder_strings": ["*"]}}
    model = instantiate_from_config(config(clip, target=f"{__name__}.Building", personalization_config=words))
    assert model.get_learned_conditioning(["a"]).shape == (1, 1, 16)
    assert model.embedding_manager.string_to_param_dict["*"].dtype == torch.float64
    assert model.num_downs == 1 and model.bbox_tokenizer is None
    assert model.num_timesteps_cond == 1 and not model.shorten_cond_schedule
