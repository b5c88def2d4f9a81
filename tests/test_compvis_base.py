"""What CompVis's models share: buffers, losses, averaged weights, training, and the UNet's conditioning keys."""

import copy
from pathlib import Path

import pytest
import torch
from compvis_models import PIXELS, UNET, Recorder, a_batch, built, config, randn
from conftest import refused
from golden_fill import GOLDEN, fill
from safetensors.torch import load_file

from ldm.compvis.base import DDPM, DiffusionWrapper
from ldm.diffusion.denoiser import target
from ldm.util import instantiate_from_config

PROMPTS = ["a photograph of a cat", ""]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, values of order 1


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


def test_buffers_are_compvis_s(model):
    golden = load_file(GOLDEN / "samplers.safetensors")
    for name in (name.removeprefix("ddpm/") for name in golden if name.startswith("ddpm/")):
        # float32 of float64 sums; CompVis's own are that too
        torch.testing.assert_close(getattr(model, name), golden[f"ddpm/{name}"].float(), rtol=2e-6, atol=1e-9)
    assert model.num_timesteps == 1000 and model.betas.dtype == torch.float32
    beta, ab = model.betas, model.alphas_cumprod
    bound = beta[1:] ** 2 / (2 * model.posterior_variance[1:] * (1 - beta[1:]) * (1 - ab[1:]))
    torch.testing.assert_close(model.lvlb_weights[1:], bound)
    assert model.lvlb_weights[0] == model.lvlb_weights[1] and "lvlb_weights" not in model.state_dict()


@torch.no_grad()
def test_what_a_prediction_means(model):
    z, noise, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([3, 990])
    noised = model.q_sample(z, t, noise)
    v = model.get_v(z, noise, t)
    torch.testing.assert_close(v, target("v", z, noise, model.schedule.alphas_cumprod[t]), rtol=1e-6, atol=1e-6)
    # at t = 990 the image is multiplied by 0.07, and its error so divided
    for found in (model.predict_start_from_noise(noised, t, noise), model.predict_start_from_z_and_v(noised, t, v)):
        torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(noised, t, v), noise, **CLOSE)


def test_buffers_that_are_replaced_are_heard(model):
    model = copy.copy(model)
    model._buffers = model._buffers | {"sqrt_alphas_cumprod": torch.zeros(1000)}
    z, noise, t = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1), torch.tensor([500])
    spread = model.sqrt_one_minus_alphas_cumprod[500]
    torch.testing.assert_close(model.q_sample(z, t, noise), spread * noise)


def test_the_loss_s_other_terms(clip):
    changes = {"loss_type": "l1", "learn_logvar": True, "logvar_init": 0.5, "original_elbo_weight": 2.0}
    model = built(config(clip, l_simple_weight=3.0, **changes))
    model.logvar.data.fill_(0.5)
    z, noise, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([1, 700])
    cond = model.get_learned_conditioning(PROMPTS)
    simple = (model.apply_model(model.q_sample(z, t, noise), t, cond) - noise).abs().mean((1, 2, 3))
    expected = 3 * (simple / torch.tensor(0.5).exp() + 0.5).mean() + 2 * (model.lvlb_weights[t] * simple).mean()
    loss, logs = model.train().p_losses(z, cond, t, noise)
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert {"train/loss_gamma", "train/logvar"} < set(logs) and "logvar" in model.state_dict()
    model.learning_rate = 1e-3
    assert any(p is model.logvar for group in model.configure_optimizers().param_groups for p in group["params"])


@pytest.mark.parametrize("form", ["tensor", "list"])
@pytest.mark.parametrize("key", ["concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm", None])
def test_conditioning_keys(key, form):
    """Which input of the UNet each part of the conditioning becomes (compvis.md, section 5)."""
    x, t = randn(2, 4, 8, 8), torch.tensor([1, 2])
    c = {"c_concat": randn(2, 5, 8, 8), "c_crossattn": randn(2, 7, 16), "c_adm": randn(2, 3)}
    wrapper = DiffusionWrapper(Recorder(), key)
    as_list = {name: [*value.split(value.shape[1] - 1, 1)] for name, value in c.items()} | {"c_adm": c["c_adm"]}
    if key == "adm":
        as_list["c_crossattn"] = [c["c_crossattn"]]
    wrapper(x, t, **(c if form == "tensor" else as_list))
    expected = {"x": torch.cat([x, c["c_concat"]], 1) if key in ("concat", "hybrid", "hybrid-adm") else x}
    if key in ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm"):
        expected["context"] = c["c_crossattn"]
    if key is not None and key.endswith("adm"):
        expected["y"] = c["c_crossattn"] if key == "adm" else c["c_adm"]
    given = wrapper.diffusion_model.given
    assert given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in expected)


def test_an_unknown_key_is_refused():
    refused("unknown conditioning_key 'cross'", DiffusionWrapper, Recorder(), "cross")


# averaged weights, files, training


def weights(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_averaged_weights(clip):
    model = built(config(clip, use_ema=True))
    live = weights(model.model)
    model.model_ema = type(model.model_ema)(model.model)
    with torch.no_grad():
        for p in model.model.parameters():
            p.add_(1.0)
    model.on_train_batch_end()
    first = min(0.9999, 2 / 11)  # of the first update: (1 + 1) / (10 + 1)
    changed = weights(model.model)
    with model.ema_scope("test"):
        for name, p in model.model.named_parameters():
            torch.testing.assert_close(p, live[name] + (1 - first), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p, changed[name]) for name, p in model.model.named_parameters())
    with pytest.raises(KeyError), model.ema_scope():
        raise KeyError
    assert all(torch.equal(p, changed[name]) for name, p in model.model.named_parameters())
    with built(config(clip)).ema_scope():
        pass


def save_ckpt(path: Path, state: dict) -> Path:
    torch.save({"state_dict": state, "global_step": 7}, path)
    return path


def test_a_checkpoint_named_in_the_configuration(clip, model, tmp_path):
    state = model.state_dict()
    path = save_ckpt(tmp_path / "whole.ckpt", state)
    loaded = instantiate_from_config(config(clip, ckpt_path=str(path)))
    assert loaded.restarted_from_ckpt and not model.restarted_from_ckpt
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    with pytest.warns(UserWarning, match="tensors are missing"):
        ignoring = instantiate_from_config(config(clip, ckpt_path=str(path), ignore_keys=["model.diffusion_model.out"]))
    out = "model.diffusion_model.out.2.weight"
    assert not ignoring.state_dict()[out].any() and state[out].any()
    unet = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    only = config(clip, ckpt_path=str(save_ckpt(tmp_path / "unet.ckpt", unet)), load_only_unet=True)
    assert torch.equal(instantiate_from_config(only).state_dict()[out], state[out])
    with pytest.warns(UserWarning, match="1 tensors are unexpected .stray"):
        model.init_from_ckpt(str(save_ckpt(tmp_path / "more.ckpt", state | {"stray": torch.ones(1)})))
    averaged = config(clip, ckpt_path=str(path), use_ema=True, reset_ema=True, reset_num_ema_updates=True)
    with pytest.warns(UserWarning, match="tensors are missing"):
        averaged = instantiate_from_config(averaged)
    assert torch.equal(averaged.model_ema.diffusion_modelout2weight, state[out])


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_a_checkpoint_is_executed(model, tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": model.state_dict(), "callbacks": Harm()}, path)
    with pytest.raises(SystemExit):  # it would be, by torch's own loader
        torch.load(path, weights_only=False)
    model.init_from_ckpt(str(path))


@pytest.mark.parametrize("learned", [False, True])
def test_buffers_of_controlnet_s_checkpoints(clip, model, learned):
    """ControlNet's code saves `logvar` and CompVis's does not: either file loads strictly."""
    state = model.state_dict() | {"logvar": torch.full((1000,), 0.25)}
    fresh = instantiate_from_config(config(clip, learn_logvar=learned))
    fresh.load_state_dict(state, strict=True)
    assert fresh.logvar.unique().tolist() == [0.25 if learned else 0.0]
    if not learned:
        fresh.load_state_dict(model.state_dict(), strict=True)


def test_sequential_cross_attention(clip):
    """With `sequential_crossattn` beside the UNet's target, it gets the conditionings as a list."""
    section = config(clip)
    section["params"]["unet_config"]["sequential_crossattn"] = True
    wrapper = instantiate_from_config(section).model
    wrapper.diffusion_model = Recorder()
    parts = [randn(2, 7, 16), randn(2, 3, 16)]
    wrapper(randn(2, 4, 8, 8), torch.tensor([1, 2]), c_crossattn=parts)
    assert wrapper.diffusion_model.given["context"] is parts


def test_a_first_stage_with_a_file_of_its_own(clip, model, tmp_path):
    own = {name: tensor + 1 for name, tensor in model.first_stage_model.state_dict().items()}
    path = save_ckpt(tmp_path / "kl.ckpt", own | {"loss.logvar": torch.zeros(())})
    section = config(clip)
    section["params"]["first_stage_config"]["params"]["ckpt_path"] = str(path)
    state = instantiate_from_config(section).first_stage_model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    section["params"]["first_stage_config"]["params"]["ckpt_path"] = str(tmp_path / "none.ckpt")
    refused("none.ckpt", instantiate_from_config, section, error=FileNotFoundError)


def test_training_by_a_loop_of_one_s_own(clip):
    warm_up = {"warm_up_steps": [2], "f_min": [1.0], "f_max": [1.0], "f_start": [0.5], "cycle_lengths": [100]}
    scheduler = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": warm_up}
    model = built(config(clip, use_ema=True, scheduler_config=scheduler)).train()
    model.learning_rate = 1e-3
    (optimizer,), (schedule,) = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and schedule["interval"] == "step"
    frozen, losses = weights(model.first_stage_model) | weights(model.cond_stage_model), []
    for step in range(20):
        torch.manual_seed(0)  # the same noise and levels, so that the loss must fall
        loss = model.training_step(a_batch(), step)
        loss.backward()
        optimizer.step()
        schedule["scheduler"].step()
        optimizer.zero_grad()
        model.on_train_batch_end()
        model.global_step += 1
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert model.logged["global_step"] == 19 and not model.logged["train/loss"].requires_grad
    assert int(model.model_ema.num_updates) == 20
    both = weights(model.first_stage_model) | weights(model.cond_stage_model)
    assert all(torch.equal(both[name], p) for name, p in frozen.items())
    model.eval().validation_step(a_batch(), 0)
    assert {"val/loss", "val/loss_ema", "val/loss_simple_ema"} < set(model.logged)


def test_what_is_trained(clip):
    model = built(config(clip, cond_stage_trainable=True))
    model.learning_rate = 1e-3
    optimizer = model.configure_optimizers()
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    parts = (model.model, model.cond_stage_model)
    assert count == sum(p.numel() for part in parts for p in part.parameters())
    model.requires_grad_(True).train().training_step(a_batch()).backward()
    assert model.cond_stage_model.transformer.text_model.final_layer_norm.weight.grad.any()


def test_captions_are_dropped(clip):
    model = built(config(clip, ucg_training={"txt": {"p": 0.25, "val": ""}}))
    model.shared_step, n = lambda batch: (torch.zeros(()), {}), 4000
    batch = {"txt": ["a cat"] * n}
    model.training_step(batch)
    share = batch["txt"].count("") / n
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5 and batch["txt"].count("a cat") == n - batch["txt"].count(
        ""
    )


def test_the_scale_is_measured(clip):
    model = built(config(clip, scale_by_std=True, scale_factor=1.0))
    assert model.state_dict()["scale_factor"] == 1
    batch = a_batch(3)
    model.on_train_batch_start(batch, 0)
    torch.manual_seed(0)
    wide = torch.cat([model.get_input(batch, "jpg")[0] for _ in range(8)]).std()
    torch.testing.assert_close(wide, torch.tensor(1.0), rtol=0.05, atol=0)  # another sample of the posterior
    measured = model.scale_factor.clone()
    model.global_step = 1
    model.on_train_batch_start(batch, 0)
    assert torch.equal(model.state_dict()["scale_factor"], measured)


def test_a_model_of_pixels(tmp_path):
    section = {"target": UNET, "params": PIXELS}
    model = fill(DDPM(section, timesteps=100, image_size=8, use_ema=False, loss_type="l2"), 0)
    x, noise, t = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([3, 90])
    loss, _ = model.p_losses(x, t, noise)
    expected = (model.model(model.q_sample(x, t, noise), t) - noise).square().mean()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert torch.isfinite(model.training_step({"image": x.permute(0, 2, 3, 1)})) and model.device.type == "cpu"
    grey = DDPM.get_input(model, {"image": x[:, 0].double()}, "image")
    assert grey.shape == (2, 1, 8, 8) and grey.dtype == torch.float32
    again = DDPM(
        section, timesteps=100, use_ema=False, ckpt_path=str(save_ckpt(tmp_path / "p.ckpt", model.state_dict()))
    )
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    refused("timestep", DDPM, section, error=TypeError, timestep=10)


@torch.no_grad()
def test_a_model_of_pixels_draws(tmp_path):
    """DDPM (Ho et al. 2020, algorithm 2) from the buffers; x0 within the pixels' range."""
    section = {"target": UNET, "params": PIXELS}
    model = fill(DDPM(section, timesteps=6, image_size=8, linear_end=0.5, log_every_t=2), 0)
    torch.manual_seed(0)
    x, noises = torch.randn(2, 3, 8, 8), [torch.randn(2, 3, 8, 8) for _ in range(6)]
    for i, noise in zip(reversed(range(6)), noises, strict=True):
        t = torch.full((2,), i)
        x0 = model.predict_start_from_noise(x, t, model.model(x, t)).clamp(-1, 1)
        x = model.posterior_mean_coef1[i] * x0 + model.posterior_mean_coef2[i] * x
        x = x + (i > 0) * model.posterior_variance[i].sqrt() * noise
    torch.manual_seed(0)
    found, kept = model.sample(2, return_intermediates=True)
    torch.testing.assert_close(found, x, **CLOSE)
    assert len(kept) == 5  # the start, and levels 5, 4, 2, 0
    torch.manual_seed(0)
    assert torch.equal(model.p_sample_loop((2, 3, 8, 8)), found)
    log = model.log_images({"image": randn(3, 8, 8, 3)}, N=2)
    assert {name: tuple(value.shape) for name, value in log.items()} == {
        **{"inputs": (2, 3, 8, 8), "samples": (2, 3, 8, 8)},
        **{"diffusion_row": (3, 2 * 8, 4 * 8), "denoise_row": (3, 2 * 8, 5 * 8)},
    }
    assert set(model.log_images({"image": randn(3, 8, 8, 3)}, sample=False, return_keys=["inputs"])) == {"inputs"}


@torch.no_grad()
def test_moments_are_those_of_the_forward_process(model):
    """q's moments, and that q(x_{t-1}) results from q(x_t) by the posterior, as both are Gaussian."""
    x0, x, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([3, 700])
    mean, variance, log_variance = model.q_mean_variance(x0, t)
    ab = model.alphas_cumprod[t].view(2, 1, 1, 1)
    torch.testing.assert_close(mean, ab.sqrt() * x0)
    torch.testing.assert_close(variance, 1 - ab)
    torch.testing.assert_close(log_variance, (1 - ab).log())
    of_zero, spread, log_spread = model.q_posterior(torch.zeros_like(x0), x, t)
    weight = of_zero / x  # of x_t in the posterior's mean
    before = model.alphas_cumprod_prev[t].view(2, 1, 1, 1)
    torch.testing.assert_close(weight**2 * (1 - ab) + spread, (1 - before).expand_as(weight), **CLOSE)
    centred, _, _ = model.q_posterior(x0, ab.sqrt() * x0, t)
    torch.testing.assert_close(centred, before.sqrt() * x0, **CLOSE)
    torch.testing.assert_close(log_spread.exp(), spread)
