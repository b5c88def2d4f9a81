"""Code written for CompVis's `ldm` runs unchanged: each piece gives the numbers of our own model with its weights."""

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

import outsiders
import pytest
import torch
import torch.nn as nn
from compvis_models import a_batch, built, clip_folder, config, ours, randn
from golden_fill import fill
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from omegaconf import OmegaConf

from ldm.diffusion import guidance, sampling
from ldm.diffusion.denoiser import from_vp, to_vp
from ldm.diffusion.schedule import q_sample, sampling_sigmas
from ldm.util import instantiate_from_config

PROMPTS = ["a photograph of a cat", "a red dog"]
T = torch.tensor([1, 700])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, values of order 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def model(clip):
    return built(config(clip))


@pytest.fixture(scope="module")
def twin(model):
    return ours(model)


def drawn(twin, cond, null, start, steps, scale, spacing="compvis", final="sigma_min") -> torch.Tensor:
    """DDIM by our own sampler on CompVis's levels: latents."""
    sigmas = sampling_sigmas(twin.schedule, steps, spacing, final).tolist()
    denoise = guidance.classifier_free(twin.denoiser(), {"c_crossattn": cond}, {"c_crossattn": null}, scale)
    *_, last = sampling.sample(denoise, from_vp(start, sigmas[0]), sigmas)
    return to_vp(last.x, sigmas[-1])


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of a run of several steps in float32: relative to the largest, as an untrained network amplifies."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# ControlNet


def control_section(clip: Path) -> dict:
    section = config(clip, target="outsiders.ControlLDM")
    params = section["params"]
    unet = params["unet_config"]["params"]
    own = {name: unet[name] for name in ("image_size", "in_channels", "model_channels", "num_res_blocks")}
    own |= {name: unet[name] for name in ("attention_resolutions", "channel_mult", "num_heads", "context_dim")}
    control = {"target": "outsiders.ControlNet", "params": own | {"hint_channels": 3, "transformer_depth": 1}}
    params["unet_config"]["target"] = "outsiders.ControlledUnetModel"
    return section | {
        "params": params | {"control_stage_config": control, "control_key": "hint", "only_mid_control": False}
    }


@pytest.fixture
def controlled(clip, model) -> outsiders.ControlLDM:
    """As ControlNet's authors add a control to a checkpoint: its copies by name, the rest as it was made, strictly."""
    control = instantiate_from_config(control_section(clip))
    pretrained, scratch, target = model.state_dict(), control.state_dict(), {}
    new = []
    for name in scratch:
        source = "model.diffusion_" + name.removeprefix("control_") if name.startswith("control_") else name
        target[name] = pretrained.get(source, scratch[name]).clone()
        new += [] if source in pretrained else [name]
    assert new and all(".zero_convs." in n or "_hint_block." in n or ".middle_block_out." in n for n in new)
    control.load_state_dict(target, strict=True)
    return control.eval()


def hinted(n: int = 2) -> dict:
    return a_batch(n) | {
        "txt": PROMPTS[:n],
        "hint": torch.rand(n, 16, 16, 3, generator=torch.Generator().manual_seed(1)),
    }


@torch.no_grad()
def test_controlnet_begins_as_the_model_itself(controlled, twin):
    z, cond = controlled.get_input(hinted(), "jpg")
    context = cond["c_crossattn"][0]
    assert torch.equal(context, twin.condition(PROMPTS)["c_crossattn"])
    expected = twin.apply_model(z, T, {"c_crossattn": context})
    torch.testing.assert_close(controlled.apply_model(z, T, cond), expected, **CLOSE)
    torch.testing.assert_close(controlled.apply_model(z, T, cond | {"c_concat": None}), expected, **CLOSE)
    noise = randn(2, 4, 8, 8)
    loss, _ = controlled.p_losses(z, cond, T, noise=noise)
    torch.testing.assert_close(loss, twin.loss(z, {"c_crossattn": context}, T, noise).mean(), **CLOSE)


@torch.no_grad()
def test_controlnet_s_control_arrives(controlled, twin):
    """A control that is a constant in the middle is our UNet with that constant in its middle block."""
    z, cond = controlled.get_input(hinted(), "jpg")
    controlled.control_model.middle_block_out[0].bias.fill_(0.5)
    controlled.control_scales = [2.0] * 13
    hook = twin.model.diffusion_model.middle_block.register_forward_hook(lambda module, inputs, out: out + 2 * 0.5)
    expected = twin.apply_model(z, T, {"c_crossattn": cond["c_crossattn"][0]})
    hook.remove()
    found = controlled.apply_model(z, T, cond)
    torch.testing.assert_close(found, expected, **CLOSE)
    fill(controlled.control_model, 3)  # now the hint is read
    other = controlled.apply_model(z, T, cond | {"c_concat": [1 - cond["c_concat"][0]]})
    assert (controlled.apply_model(z, T, cond) - other).abs().max() > 1e-3


def test_controlnet_trains_its_control_alone(controlled):
    controlled.learning_rate = 1e-3
    optimizer = controlled.train().configure_optimizers()
    before = {name: p.detach().clone() for name, p in controlled.named_parameters()}
    controlled.training_step(hinted(), 0).backward()
    optimizer.step()
    changed = {name for name, p in controlled.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("control_model.") for name in changed)
    controlled.sd_locked = False
    out = controlled.model.diffusion_model.out[2].weight
    assert any(p is out for group in controlled.configure_optimizers().param_groups for p in group["params"])


def test_controlnet_logs_pictures(controlled, twin):
    torch.manual_seed(0)
    log = controlled.log_images(hinted(), N=2, ddim_steps=4, unconditional_guidance_scale=3.0)
    assert set(log) == {"reconstruction", "control", "conditioning", "samples_cfg_scale_3.00"}
    torch.manual_seed(0)
    controlled.get_input(hinted(), "jpg")  # draws the posterior's sample, as log_images did
    start = torch.randn(2, 4, 8, 8)
    cond, null = (twin.condition(prompts)["c_crossattn"] for prompts in (PROMPTS, [""] * 2))
    same(log["samples_cfg_scale_3.00"], twin.decode(drawn(twin, cond, null, start, 4, 3.0)))


CREATE_MODEL = """
from omegaconf import OmegaConf
from ldm.util import instantiate_from_config

def create_model(config_path):
    config = OmegaConf.load(config_path)
    return instantiate_from_config(config.model).cpu()
"""


@pytest.fixture
def cldm(tmp_path, monkeypatch) -> Path:
    """ControlNet's checkout: a folder `cldm` of modules, without `__init__.py`."""
    (tmp_path / "cldm").mkdir()
    (tmp_path / "cldm" / "model.py").write_text(CREATE_MODEL)
    (tmp_path / "cldm" / "cldm.py").write_text(Path(outsiders.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "cldm"]:
        del sys.modules[name]


@torch.no_grad()
def test_controlnet_s_create_model(cldm, clip, model, twin):
    """The program imports `cldm.model` alone, and the yaml names classes of `cldm.cldm`."""
    section = control_section(clip)
    params = section["params"]
    for part in (section, params["unet_config"], params["control_stage_config"]):
        part["target"] = part["target"].replace("outsiders.", "cldm.cldm.")
    OmegaConf.save(OmegaConf.create({"model": section}), cldm / "cldm_v15.yaml")
    with pytest.raises(ValueError, match="target 'cldm.cldm.ControlLDM' is not an allowed class"):
        instantiate_from_config(section)
    create_model = importlib.import_module("cldm.model").create_model
    control = create_model(cldm / "cldm_v15.yaml")
    assert type(control).__module__ == "cldm.cldm"
    control.load_state_dict(model.state_dict(), strict=False)
    z, cond = control.eval().get_input(hinted(), "jpg")
    expected = twin.apply_model(z, T, {"c_crossattn": twin.condition(PROMPTS)["c_crossattn"]})
    torch.testing.assert_close(control.apply_model(z, T, cond), expected, **CLOSE)


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
    """Trains the keys and values of cross-attention, on masked pictures."""

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
    torch.manual_seed(0)  # what was drawn: the posterior's sample, levels, noise
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
    same(x, drawn(twin, cond, null, start, 6, 3.0, "trailing", "zero"))


@torch.no_grad()
def test_instruct_pix2pix(clip):
    unet = {"in_channels": 8}
    model = built(config(clip, unet, conditioning_key="hybrid"))
    own = config(clip, unet)["params"]["unet_config"]
    twin = ours(model, unet_config=own | {"target": "ldm.models.unet.UNetModel"}, concat="latents")
    z, picture = randn(2, 4, 8, 8), randn(2, 3, 16, 16).clamp(-1, 1)
    cond = {
        "c_crossattn": [model.get_learned_conditioning(PROMPTS)],
        "c_concat": [model.encode_first_stage(picture).mode()],
    }
    expected = twin.apply_model(z, T, twin.condition(PROMPTS) | twin.concat_picture(picture, torch.ones(2, 1, 16, 16)))
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
        latents = drawn(twin, twin.condition(PROMPTS)["c_crossattn"], null, start_code, 5, scale)
        same(samples_ddim, latents)
        same(x_samples_ddim, twin.decode(latents))
    picture = torch.clamp((x_samples_ddim + 1.0) / 2.0, min=0.0, max=1.0)
    assert picture.shape == (2, 3, 16, 16) and picture.std() > 0.05


def test_text_to_image_in_half_precision(files):
    """`--precision autocast` and `.half()`, as scripts have them, on the machine there is."""
    model = load_model_from_config(OmegaConf.load(f"{files[0]}"), f"{files[1]}")
    start = randn(2, 4, 8, 8)
    settings = {"S": 3, "batch_size": 2, "shape": [4, 8, 8], "verbose": False, "eta": 0.0, "x_T": start}

    def draw():
        c, uc = model.get_learned_conditioning(PROMPTS), model.get_learned_conditioning([""] * 2)
        guided = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": uc}
        return model.decode_first_stage(DDIMSampler(model).sample(conditioning=c, **guided, **settings)[0]).float()

    with torch.no_grad():
        full = draw()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = draw()
        half = model.bfloat16() and draw()
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
