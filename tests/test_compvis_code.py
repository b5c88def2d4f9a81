"""Code written for CompVis's `ldm` runs unchanged: each piece gives the numbers of our own model with its weights."""

from contextlib import nullcontext
from pathlib import Path

import outsiders
import pytest
import torch
import torch.nn as nn
from compvis_models import a_batch, built, config, ours, randn, same, sampled
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from omegaconf import OmegaConf

from ldm.diffusion.schedule import q_sample, sampling_sigmas
from ldm.init_image import concat_condition
from ldm.util import instantiate_from_config

PROMPTS = ["a photograph of a cat", "a red dog"]
T = torch.tensor([1, 700])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, values of order 1


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


@pytest.fixture(scope="module")
def twin(model):
    return ours(model)


# replaced forwards


@torch.no_grad()
def test_replacing_attention_reaches_the_running_network(model, twin, monkeypatch):
    z, context = randn(2, 4, 8, 8), twin.condition(PROMPTS)["c_crossattn"]
    expected = twin.apply_model(z, T, {"c_crossattn": context})
    calls = []
    sliced = outsiders.sliced_attention
    monkeypatch.setattr(CrossAttention, "forward", lambda *args, **kw: calls.append(1) or sliced(*args, **kw))
    torch.testing.assert_close(model.apply_model(z, T, context), expected, **CLOSE)
    attentions = [m for m in model.model.modules() if type(m) is CrossAttention]
    assert len(calls) == len(attentions) > 4

    def blind(self, x, context=None, mask=None):
        """Every token looks at all others alike."""
        v = self.to_v(x if context is None else context).mean(dim=1, keepdim=True)
        return self.to_out(v.expand(-1, x.shape[1], -1))

    monkeypatch.setattr(CrossAttention, "forward", blind)
    found = model.apply_model(z, T, context)
    monkeypatch.undo()
    for name, p in twin.model.named_parameters():
        if name.endswith("to_q.weight"):  # equal scores
            p.data = torch.zeros_like(p)
    uniform = twin.apply_model(z, T, {"c_crossattn": context})
    twin.model.load_state_dict(model.model.state_dict())
    torch.testing.assert_close(found, uniform, **CLOSE)
    assert (found - expected).abs().max() > 1e-3


@pytest.mark.parametrize("clip_skip", [1, 2])
@torch.no_grad()
def test_replacing_the_text_encoder_s_forward_reaches_the_model(model, twin, monkeypatch, clip_skip):
    monkeypatch.setattr(FrozenCLIPEmbedder, "forward", outsiders.long_clip_forward)
    monkeypatch.setattr(FrozenCLIPEmbedder, "clip_skip", clip_skip, raising=False)
    long = " ".join(["cat"] * 80)
    found = model.get_learned_conditioning([*PROMPTS, long])
    assert found.shape == (3, 3 * 77, 16)
    expected = twin.cond_stage_model(PROMPTS, clip_skip=clip_skip)["c_crossattn"]
    torch.testing.assert_close(found[:2, :77], expected, **CLOSE)
    parts = [" ".join(["cat"] * n) for n in (75, 5, 0)]
    expected = twin.cond_stage_model(parts, clip_skip=clip_skip)["c_crossattn"]
    torch.testing.assert_close(found[2], expected.flatten(0, 1), **CLOSE)
    monkeypatch.undo()
    assert model.get_learned_conditioning(PROMPTS).shape == (2, 77, 16)


# custom diffusion


class CustomDiffusion(LatentDiffusion):
    """Trains the keys and values of cross-attention, on masked images."""

    def __init__(self, freeze_model="crossattn_kv", *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.diffusion_model.named_parameters():
            if freeze_model == "crossattn_kv":
                parameter.requires_grad = "attn2.to_k" in name or "attn2.to_v" in name

        def change_checkpoint(module):
            for layer in module.children():
                if type(layer) == BasicTransformerBlock:  # noqa: E721 - as such code has it
                    layer.checkpoint = False
                else:
                    change_checkpoint(layer)

        change_checkpoint(self.model.diffusion_model)

    def p_losses(self, x_start, cond, t, mask=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start=x_start, t=t, noise=noise)
        model_output = self.apply_model(x_noisy, t, cond)
        prefix = "train" if self.training else "val"
        target = {"x0": x_start, "eps": noise}[self.parameterization]
        loss_simple = self.get_loss(model_output, target, mean=False)
        if mask is not None:
            loss_simple = (loss_simple * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])
        else:
            loss_simple = loss_simple.mean([1, 2, 3])
        logvar_t = (self.logvar.to(self.device))[t]
        loss = self.l_simple_weight * (loss_simple / torch.exp(logvar_t) + logvar_t).mean()
        loss = loss + self.original_elbo_weight * (self.lvlb_weights[t] * loss_simple).mean()
        return loss, {f"{prefix}/loss_simple": loss_simple.mean()}

    def shared_step(self, batch, **kwargs):
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c, mask=batch["mask"] if "mask" in batch else None)

    def training_step(self, batch, batch_idx):
        loss, loss_dict = self.shared_step(batch)
        self.log_dict(loss_dict, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        self.log("global_step", self.global_step, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss


def test_custom_diffusion(clip, model, twin, monkeypatch):
    unet = {"use_checkpoint": True}
    custom = instantiate_from_config(config(clip, unet, target=f"{__name__}.CustomDiffusion"))
    custom.load_state_dict(model.state_dict(), strict=True)
    blocks = [m for m in custom.modules() if isinstance(m, BasicTransformerBlock)]
    assert blocks and not any(block.checkpoint for block in blocks)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 2:5] = 1
    batch = a_batch() | {"mask": mask.expand(-1, 4, -1, -1), "txt": PROMPTS}
    torch.manual_seed(0)
    loss = custom.train().training_step(batch, 0)
    loss.backward()
    trained = {name for name, p in custom.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {n for n, _ in custom.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert trained == expected and custom.logged["global_step"] == 0
    torch.manual_seed(0)  # the same random numbers: the posterior's sample, levels, noise
    z, _ = model.get_input(batch, "jpg")
    t, noise = torch.randint(0, 1000, (2,)), torch.randn_like(z)
    with torch.no_grad():
        output = twin.apply_model(q_sample(z, t, noise, twin.schedule), t, twin.condition(PROMPTS))
    torch.testing.assert_close(loss, (output - noise).square()[..., 2:5].mean(), **CLOSE)
    torch.testing.assert_close(custom.logged["train/loss_simple"], loss.detach())


# k-diffusion, InstructPix2Pix


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@torch.no_grad()
def test_a_denoiser_of_k_diffusion(clip, parameterization):
    model = built(config(clip, parameterization=parameterization))
    twin, start = ours(model), randn(2, 4, 8, 8)
    denoiser = outsiders.CompVisDenoiser(model)
    cond, null = model.get_learned_conditioning(PROMPTS), model.get_learned_conditioning([""] * 2)
    sigmas = sampling_sigmas(twin.schedule, 6, "trailing", "zero").float()
    x = start * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):  # Euler's method, guided
        both = {"cond": {"c_crossattn": [torch.cat([null, cond])]}}
        uncond, denoised = denoiser(torch.cat([x, x]), sigma.expand(4), **both).chunk(2)
        denoised = uncond + 3.0 * (denoised - uncond)
        x = x + (x - denoised) / sigma * (after - sigma)
    same(x, sampled(twin, cond, null, start, 6, 3.0, "trailing", "zero"))


@torch.no_grad()
def test_instruct_pix2pix(clip):
    unet = {"in_channels": 8}
    model = built(config(clip, unet, conditioning_key="hybrid"))
    own = config(clip, unet)["params"]["unet_config"]
    twin = ours(model, unet_config=own | {"target": "ldm.models.unet.UNetModel"}, concat="latents")
    z, image = randn(2, 4, 8, 8), randn(2, 3, 16, 16).clamp(-1, 1)
    cond = {
        "c_crossattn": [model.get_learned_conditioning(PROMPTS)],
        "c_concat": [model.encode_first_stage(image).mode()],
    }
    expected = twin.apply_model(z, T, twin.condition(PROMPTS) | concat_condition(twin, image, None))
    torch.testing.assert_close(model.apply_model(z, T, cond=cond), expected, **CLOSE)


# CompVis's own scripts


@pytest.fixture(scope="module")
def files(clip, model, tmp_path_factory) -> tuple[Path, Path]:
    """A yaml and a Lightning checkpoint, with averages that the yaml does not want."""
    folder = tmp_path_factory.mktemp("files")
    OmegaConf.save(OmegaConf.create({"model": {"base_learning_rate": 1e-4} | config(clip)}), folder / "v1.yaml")
    averages = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    torch.save({"state_dict": model.state_dict() | averages, "global_step": 470000}, folder / "model.ckpt")
    return folder / "v1.yaml", folder / "model.ckpt"


def load_model_from_config(config, ckpt):
    pl_sd = torch.load(ckpt, map_location="cpu")
    assert "global_step" in pl_sd
    model = instantiate_from_config(config.model)
    missing, unexpected = model.load_state_dict(pl_sd["state_dict"], strict=False)
    assert not missing and unexpected == ["model_ema.decay", "model_ema.num_updates"]
    return model.to("cpu").eval()


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_text_to_image(files, twin, scale):
    config = OmegaConf.load(f"{files[0]}")
    model = load_model_from_config(config, f"{files[1]}")
    sampler = DDIMSampler(model)
    start_code = randn(2, 4, 8, 8)
    with torch.no_grad(), nullcontext(), model.ema_scope():
        uc = model.get_learned_conditioning(2 * [""]) if scale != 1.0 else None
        c = model.get_learned_conditioning(PROMPTS)
        samples_ddim, _ = sampler.sample(
            S=5, conditioning=c, batch_size=2, shape=[4, 8, 8], verbose=False, unconditional_guidance_scale=scale,
            unconditional_conditioning=uc, eta=0.0, x_T=start_code,
        )  # fmt: skip
        x_samples_ddim = model.decode_first_stage(samples_ddim)
        null = twin.condition([""] * 2)["c_crossattn"]
        latents = sampled(twin, twin.condition(PROMPTS)["c_crossattn"], null, start_code, 5, scale)
        same(samples_ddim, latents)
        same(x_samples_ddim, twin.decode(latents))
    image = torch.clamp((x_samples_ddim + 1.0) / 2.0, min=0.0, max=1.0)
    assert image.shape == (2, 3, 16, 16) and image.std() > 0.05


def test_text_to_image_in_half_precision(files):
    """`--precision autocast` and `.half()`, as scripts have them, on the machine there is."""
    model = load_model_from_config(OmegaConf.load(f"{files[0]}"), f"{files[1]}")
    start = randn(2, 4, 8, 8)
    settings = {"S": 3, "batch_size": 2, "shape": [4, 8, 8], "verbose": False, "eta": 0.0, "x_T": start}

    def sample():
        c, uc = model.get_learned_conditioning(PROMPTS), model.get_learned_conditioning([""] * 2)
        guided = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": uc}
        return model.decode_first_stage(DDIMSampler(model).sample(conditioning=c, **guided, **settings)[0]).float()

    with torch.no_grad():
        full = sample()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = sample()
        half = model.bfloat16() and sample()
    assert model.alphas_cumprod.dtype == torch.float32 and model.model.diffusion_model.dtype == torch.bfloat16
    for found in (mixed, half):  # 8 bits, through three steps and a decoder
        assert (found - full).abs().mean() < 0.1 * full.abs().mean() and not torch.equal(found, full)


def test_modules_keep_their_kind(model):
    """What such code asks for by class, under whichever name, is what runs."""
    kinds = (outsiders.UNetModel, CrossAttention, BasicTransformerBlock, FrozenCLIPEmbedder, outsiders.ResBlock)
    for kind in kinds:
        assert any(type(module) is kind for module in model.modules()), kind
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for layer in convolutions:  # tiling, as web interfaces do it
        layer.padding_mode = "circular"
    try:
        with torch.no_grad():
            z, context = randn(1, 4, 8, 8), model.get_learned_conditioning([""])
            out = model.apply_model(z, T[:1], context)
            moved = model.apply_model(z.roll(4, dims=3), T[:1], context)
        torch.testing.assert_close(moved, out.roll(4, dims=3), rtol=1e-4, atol=1e-4)
    finally:
        for layer in convolutions:
            layer.padding_mode = "zeros"
