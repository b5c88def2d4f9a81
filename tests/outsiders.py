"""Research code as outsiders write it against CompVis's `ldm`, under its old names alone: a ControlNet (Zhang et al.
2023), a denoiser in k-diffusion's form, and replacements for two `forward`s. Written for the tests, from what such code
is known to use."""

import einops
import torch
import torch.nn as nn
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, linear, timestep_embedding, zero_module

from ldm.util import default, exists, instantiate_from_config, log_txt_as_img


class ControlledUnetModel(UNetModel):
    """The UNet, with the control's features added to what the encoder hands over; its encoder is locked."""

    def forward(self, x, timesteps=None, context=None, control=None, only_mid_control=False, **kwargs):
        hs = []
        with torch.no_grad():
            t_emb = timestep_embedding(timesteps, self.model_channels, repeat_only=False)
            emb = self.time_embed(t_emb)
            h = x.type(self.dtype)
            for module in self.input_blocks:
                h = module(h, emb, context)
                hs.append(h)
            h = self.middle_block(h, emb, context)
        if control is not None:
            h = h + control.pop()
        for module in self.output_blocks:
            skip = hs.pop()
            if control is not None and not only_mid_control:
                skip = skip + control.pop()
            h = module(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlNet(nn.Module):
    """A copy of the UNet's encoder that also reads a hint, twice as large as the latents here."""

    def __init__(
        self, image_size, in_channels, model_channels, hint_channels, num_res_blocks, attention_resolutions,
        dropout=0, channel_mult=(1, 2), dims=2, use_checkpoint=False, num_heads=-1, use_scale_shift_norm=False,
        use_spatial_transformer=True, transformer_depth=1, context_dim=None, legacy=False,
    ):  # fmt: skip
        super().__init__()
        assert use_spatial_transformer and exists(context_dim) and not legacy
        self.dims, self.model_channels, self.dtype = dims, model_channels, torch.float32
        width = model_channels * 4
        self.time_embed = nn.Sequential(linear(model_channels, width), nn.SiLU(), linear(width, width))
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels, model_channels, 3, padding=1))]
        )
        self.zero_convs = nn.ModuleList([self.make_zero_conv(model_channels)])
        self.input_hint_block = TimestepEmbedSequential(
            conv_nd(dims, hint_channels, 16, 3, padding=1),
            nn.SiLU(),
            conv_nd(dims, 16, 16, 3, padding=1, stride=2),
            nn.SiLU(),
            zero_module(conv_nd(dims, 16, model_channels, 3, padding=1)),
        )

        def res(ch, out):
            options = {"dims": dims, "use_checkpoint": use_checkpoint, "use_scale_shift_norm": use_scale_shift_norm}
            return ResBlock(ch, width, dropout, out_channels=out, **options)

        def attend(ch):
            options = {"depth": transformer_depth, "context_dim": context_dim, "use_checkpoint": use_checkpoint}
            return SpatialTransformer(
                ch, num_heads, ch // num_heads, disable_self_attn=False, use_linear=False, **options
            )

        ch, ds = model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res(ch, mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    layers.append(attend(ch))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                self.zero_convs.append(self.make_zero_conv(ch))
            if level != len(channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(ch, True, dims=dims, out_channels=ch)))
                self.zero_convs.append(self.make_zero_conv(ch))
                ds *= 2
        self.middle_block = TimestepEmbedSequential(res(ch, ch), attend(ch), res(ch, ch))
        self.middle_block_out = self.make_zero_conv(ch)

    def make_zero_conv(self, channels):
        return TimestepEmbedSequential(zero_module(conv_nd(self.dims, channels, channels, 1, padding=0)))

    def forward(self, x, hint, timesteps, context, **kwargs):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        guided_hint = self.input_hint_block(hint, emb, context)
        outs = []
        h = x.type(self.dtype)
        for module, zero_conv in zip(self.input_blocks, self.zero_convs, strict=True):
            h = module(h, emb, context)
            if guided_hint is not None:
                h, guided_hint = h + guided_hint, None
            outs.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        outs.append(self.middle_block_out(h, emb, context))
        return outs


class ControlLDM(LatentDiffusion):
    def __init__(self, control_stage_config, control_key, only_mid_control, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.control_scales = [1.0] * 13
        self.sd_locked = True

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        x, c = super().get_input(batch, self.first_stage_key, *args, **kwargs)
        control = batch[self.control_key]
        if bs is not None:
            x, c, control = x[:bs], c[:bs], control[:bs]
        control = einops.rearrange(control.to(self.device), "b h w c -> b c h w").to(
            memory_format=torch.contiguous_format
        )
        return x, dict(c_crossattn=[c], c_concat=[control.float()])

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        assert isinstance(cond, dict)
        diffusion_model = self.model.diffusion_model
        context = torch.cat(cond["c_crossattn"], 1)
        if cond["c_concat"] is None:
            return diffusion_model(x=x_noisy, timesteps=t, context=context, control=None)
        control = self.control_model(x=x_noisy, hint=torch.cat(cond["c_concat"], 1), timesteps=t, context=context)
        control = [c * scale for c, scale in zip(control, self.control_scales, strict=False)]
        return diffusion_model(
            x=x_noisy, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control
        )

    @torch.no_grad()
    def get_unconditional_conditioning(self, N):
        return self.get_learned_conditioning([""] * N)

    @torch.no_grad()
    def log_images(
        self, batch, N=4, sample=False, ddim_steps=50, ddim_eta=0.0, plot_denoise_rows=False,
        unconditional_guidance_scale=9.0, **kwargs,
    ):  # fmt: skip
        log = dict()
        z, c = self.get_input(batch, self.first_stage_key, bs=N)
        c_cat, c = c["c_concat"][0][:N], c["c_crossattn"][0][:N]
        N = min(z.shape[0], N)
        log["reconstruction"] = self.decode_first_stage(z)
        log["control"] = c_cat * 2.0 - 1.0
        log["conditioning"] = log_txt_as_img((64, 64), batch[self.cond_stage_key][:N], size=8)
        if sample:
            cond = {"c_concat": [c_cat], "c_crossattn": [c]}
            samples, z_denoise_row = self.sample_log(cond, N, ddim=True, ddim_steps=ddim_steps, eta=ddim_eta)
            log["samples"] = self.decode_first_stage(samples)
            if plot_denoise_rows:
                log["denoise_row"] = self._get_denoise_row_from_list(z_denoise_row)
        uc_full = {"c_concat": [c_cat], "c_crossattn": [self.get_unconditional_conditioning(N)]}
        samples, _ = self.sample_log(
            cond={"c_concat": [c_cat], "c_crossattn": [c]},
            batch_size=N, ddim=True, ddim_steps=ddim_steps, eta=ddim_eta,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=uc_full,
        )  # fmt: skip
        log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(samples)
        return log

    @torch.no_grad()
    def sample_log(self, cond, batch_size, ddim, ddim_steps, **kwargs):
        ddim_sampler = DDIMSampler(self)
        _, _, h, w = cond["c_concat"][0].shape
        shape = (self.channels, h // 2, w // 2)
        return ddim_sampler.sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)

    def configure_optimizers(self):
        lr = self.learning_rate
        params = list(self.control_model.parameters())
        if not self.sd_locked:
            params += list(self.model.diffusion_model.output_blocks.parameters())
            params += list(self.model.diffusion_model.out.parameters())
        return torch.optim.AdamW(params, lr=lr)


class CompVisDenoiser(nn.Module):
    """denoise(x, sigma) of a CompVis model, in the form of k-diffusion (Karras et al. 2022)."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model
        sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod) ** 0.5
        self.register_buffer("log_sigmas", sigmas.log())
        self.register_buffer("sigmas", sigmas)

    def sigma_to_t(self, sigma):
        distances = sigma.log() - self.log_sigmas[:, None]
        return distances.abs().argmin(dim=0).view(sigma.shape)

    def forward(self, x, sigma, **kwargs):
        s = sigma.view(-1, 1, 1, 1)
        out = self.inner_model.apply_model(x / (s**2 + 1) ** 0.5, self.sigma_to_t(sigma), **kwargs)
        if self.inner_model.parameterization == "v":
            return x / (s**2 + 1) - out * s / (s**2 + 1) ** 0.5
        return x - out * s


def sliced_attention(self, x, context=None, mask=None):
    """In place of `CrossAttention.forward`: the scores written out, one head at a time."""
    h = self.heads
    q = self.to_q(x)
    context = default(context, x)
    k, v = self.to_k(context), self.to_v(context)
    q, k, v = (einops.rearrange(t, "b n (h d) -> (b h) n d", h=h) for t in (q, k, v))
    out = torch.zeros_like(q)
    for i in range(len(q)):
        out[i] = torch.softmax(q[i] @ k[i].T * self.scale, dim=-1) @ v[i]
    return self.to_out(einops.rearrange(out, "(b h) n d -> b n (h d)", h=h))


def long_clip_forward(self, text):
    """In place of `FrozenCLIPEmbedder.forward`: three windows of 75 tokens, and `clip_skip`'s layer."""
    pad, eos, bos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
    rows = []
    for raw in self.tokenizer(text, truncation=False, add_special_tokens=False)["input_ids"]:
        windows = [[bos] + raw[75 * i : 75 * (i + 1)] + [eos] for i in range(3)]
        rows.append([window + [pad] * (77 - len(window)) for window in windows])
    tokens = torch.IntTensor(rows).to(self.device)
    feed = einops.rearrange(tokens, "b f i -> (b f) i")
    if self.clip_skip > 1:
        rt = self.transformer(input_ids=feed, output_hidden_states=True)
        y = self.transformer.text_model.final_layer_norm(rt.hidden_states[-self.clip_skip])
    else:
        y = self.transformer(input_ids=feed, output_hidden_states=False).last_hidden_state
    return einops.rearrange(y, "(b f) i c -> b (f i) c", f=3)
