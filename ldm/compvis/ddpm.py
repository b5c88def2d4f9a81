"""CompVis's `ldm.models.diffusion.ddpm`: our LatentDiffusion with CompVis's constructor and methods."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from ldm import latent_diffusion as core
from ldm.checkpoint.compvis import normalise
from ldm.checkpoint.tensors import read_tensors
from ldm.compvis.base import DDPM, DiffusionWrapper, wanted  # noqa: F401 - CompVis has both classes in this module
from ldm.compvis.samplers import DDIMSampler
from ldm.compvis.util import Losses, isimage, ismap, log_txt_as_img, noise_like
from ldm.models.distributions import DiagonalGaussianDistribution
from ldm.models.vq_autoencoder import VQModelInterface
from ldm.util import instantiate_from_config

TEXT_KEYS, CLASS_KEYS = ("caption", "txt", "coordinates_bbox"), ("class_label", "cls")  # batch keys that are not images
PER_STEP = ("quantize_denoised", "temperature", "noise_dropout", "score_corrector", "corrector_kwargs")  # p_sample's


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `train` of a module, so that it stays in eval mode."""
    return self


def _without_file(config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a first stage's configuration without the file of its weights, and that file or None."""
    params = dict(config.get("params") or {})
    file, _ = params.pop("ckpt_path", None), params.pop("ignore_keys", None)
    return {**config, "params": params}, file


def _first(cond: Any, n: int | None) -> Any:
    """Return the conditioning, in any form, of the first n images."""
    if isinstance(cond, Mapping):
        return {key: _first(value, n) for key, value in cond.items()}
    if isinstance(cond, list | tuple) and isinstance(cond[0], Tensor):
        return [part[:n] for part in cond]
    return None if cond is None else cond[:n]


class LatentDiffusion(DDPM, core.LatentDiffusion):
    """CompVis's LatentDiffusion of both versions, with our `generate`, `denoiser`, `encode` and `decode`."""

    def __init__(
        self, first_stage_config: Any, cond_stage_config: Any, num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image", cond_stage_trainable: bool = False, concat_mode: bool = True,
        cond_stage_forward: str | None = None, conditioning_key: str | None = None, scale_factor: float = 1.0,
        scale_by_std: bool = False, force_null_conditioning: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        if num_timesteps_cond not in (None, 1):
            raise ValueError(f"num_timesteps_cond {num_timesteps_cond} is not supported: it must be 1")
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        self.num_timesteps_cond, self.shorten_cond_schedule, self.bbox_tokenizer = 1, False, None
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward, self.force_null_conditioning = cond_stage_forward, force_null_conditioning
        self.concat_mode, self.scale_by_std = concat_mode, scale_by_std
        networks = {"first_stage_config": first_stage_config, "cond_stage_config": cond_stage_config}
        super().__init__(
            conditioning_key=conditioning_key, _networks={**networks, "scale_factor": scale_factor}, **settings
        )
        self.first_stage_config = _without_file(first_stage_config)[0]
        self.cond_stage_config = None if isinstance(cond_stage_config, str) else cond_stage_config
        params = self.first_stage_config["params"]
        self.num_downs, self.clip_denoised = len(params.get("ddconfig", {}).get("ch_mult", [1])) - 1, False
        self.defaults |= dict.fromkeys(("height", "width"), self.image_size * self.downsampling)
        if scale_by_std:
            del self.scale_factor
            self.register_buffer("scale_factor", torch.tensor(scale_factor, device="cpu"))
        self._restore()
        if self.personalization_config is not None:  # textual inversion trains only these words
            words = self.instantiate_embedding_manager(self.personalization_config, self.cond_stage_model)
            self.requires_grad_(False).embedding_manager = words

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Build the first stage, frozen, and load the file that its configuration names."""
        config, file = _without_file(config)
        super().instantiate_first_stage(config)
        if file is not None and self.device.type != "meta":
            self.first_stage_model.load_state_dict(normalise(read_tensors(file).state)[0])
        self.first_stage_model.eval().requires_grad_(False)

    def instantiate_cond_stage(self, config: Any) -> None:
        """Build the conditioner, frozen unless `cond_stage_trainable`; or take the first stage, or none."""
        if isinstance(config, str):  # one of CompVis's two marks
            self.cond_stage_model = self.first_stage_model if config == "__is_first_stage__" else None
            return
        super().instantiate_cond_stage(config)
        if not self.cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)

    def instantiate_embedding_manager(self, config: Mapping[str, Any], embedder: Any) -> nn.Module:
        """Build textual inversion's words, after the weights are loaded, and load those of `embedding_manager_ckpt`."""
        params = dict(config.get("params") or {})
        file = params.pop("embedding_manager_ckpt", None)
        words = instantiate_from_config({**config, "params": params}, embedder=embedder)
        if file:  # textual inversion's own program writes "" for none
            words.load(file)
        return words

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "split_input_params":  # version 1 then encodes, denoises and decodes in crops
            raise ValueError("split_input_params is not supported: ldm.inference.tiling decodes large images in tiles")
        super().__setattr__(name, value)

    def _frozen(self) -> list[nn.Module]:
        parts = (self.first_stage_model, None if self.cond_stage_trainable else self.cond_stage_model)
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the scale factor on the first batch of a run, with scale_by_std."""
        fresh = not (self.restarted_from_ckpt or self.global_step or self.current_epoch or batch_idx)
        if self.scale_by_std and fresh:
            z = self.encode_first_stage(super().get_input(batch, self.first_stage_key).to(self.device))
            self.scale_factor = 1 / (self.get_first_stage_encoding(z) / self.scale_factor).std()

    def get_learned_conditioning(self, c: Any) -> Any:
        encoder = self.cond_stage_model
        if self.cond_stage_forward is not None:
            return getattr(encoder, self.cond_stage_forward)(c)
        managed = {} if self.embedding_manager is None else {"embedding_manager": self.embedding_manager}
        c = encoder.encode(c, **managed) if callable(getattr(encoder, "encode", None)) else encoder(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        if null_label is None and self.cond_stage_key in CLASS_KEYS:
            return self.get_learned_conditioning(self.cond_stage_model.get_unconditional_conditioning(batch_size))
        c = self.get_learned_conditioning("" if null_label is None else null_label)
        return repeat(c, "1 ... -> b ...", b=batch_size)

    @property
    def null(self) -> Any:
        return getattr(self.cond_stage_model, "null", None)

    def condition(
        self,
        prompts: Any,
        chunks: Any = None,
        clip_skip: int = 1,
        plain: bool = False,
        sizes: Any = None,
        negative: bool = False,
    ) -> Any:
        """Encode prompts for `generate` as CompVis's code does, without weights or long prompts."""
        key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
        return {} if self.model.conditioning_key is None else {key: self.get_learned_conditioning(prompts)}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, return_ids: bool = False) -> Tensor:
        """Return the UNet's output for latents (b, c, h, w) at t (b,); cond is a dict, a list or a tensor."""
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: cond if isinstance(cond, list) else [cond]}
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Encode pixels (b, c, h, w) in [-1, 1] as the posterior, or as a VQ autoencoder's unscaled latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Return scaled latents (b, z, h, w) from a posterior, or from unscaled latents."""
        is_posterior = isinstance(encoder_posterior, DiagonalGaussianDistribution)
        return (encoder_posterior.sample() if is_posterior else encoder_posterior) * self.scale_factor

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        if predict_cids:
            raise ValueError("predict_cids, latents as indices of codebook entries, is not supported")
        options = (force_not_quantize,) if isinstance(self.first_stage_model, VQModelInterface) else ()
        return self.first_stage_model.decode(z / self.scale_factor, *options)

    decode_first_stage = torch.no_grad()(differentiable_decode_first_stage)

    @torch.no_grad()
    def get_input(
        self, batch: Mapping[str, Any], k: str, return_first_stage_outputs: bool = False, force_c_encode: bool = False,
        cond_key: str | None = None, return_original_cond: bool = False, bs: int | None = None, return_x: bool = False,
    ) -> list[Any]:  # fmt: skip
        """Return [latents, conditioning], and on request pixels and reconstruction, pixels, and the raw condition."""
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        c = xc = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            key = self.cond_stage_key if cond_key is None else cond_key
            xc = batch if key in CLASS_KEYS else batch[key] if key in TEXT_KEYS else x
            if xc is x and key != self.first_stage_key:
                xc = super().get_input(batch, key).to(self.device)
            raw = self.cond_stage_trainable and not force_c_encode
            c = _first(xc if raw else self.get_learned_conditioning(xc), bs)
        pixels = [x, self.decode_first_stage(z)] if return_first_stage_outputs else []
        return [z, c, *pixels, *([x] if return_x else []), *([xc] if return_original_cond else [])]

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> Losses:
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> Losses:
        t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        if self.cond_stage_trainable and self.model.conditioning_key is not None:
            c = self.get_learned_conditioning(c)
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None) -> Losses:
        noise = torch.randn_like(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start=x_start, t=t, noise=noise)
        loss, logs = self._losses(self.apply_model(x_noisy, t, cond), x_start, t, noise)
        if self.embedding_reg_weight > 0:
            prefix = "train" if self.training else "val"
            moved = self.embedding_manager.embedding_to_coarse_loss().mean()
            loss = loss + self.embedding_reg_weight * moved
            logs |= {f"{prefix}/loss_emb_reg": moved, f"{prefix}/loss": loss}
        return loss, logs

    def p_mean_variance(
        self, x: Tensor, c: Any, t: Tensor, clip_denoised: bool, return_codebook_ids: bool = False,
        quantize_denoised: bool = False, return_x0: bool = False, score_corrector: Any = None,
        corrector_kwargs: Mapping | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return (mean, variance, log variance) of p(x_{t-1} | x_t) for x (b, z, h, w) at t (b,), and x0 on request."""
        output = self.apply_model(x, t, c)
        if score_corrector is not None:
            output = score_corrector.modify_score(self, output, x, t, c, **(corrector_kwargs or {}))
        x0 = self.predict_start(x, t, output)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        x0 = self.first_stage_model.quantize(x0)[0] if quantize_denoised else x0
        return *self.q_posterior(x0, x, t), *([x0] if return_x0 else [])

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, c: Any, t: Tensor, clip_denoised: bool = False, repeat_noise: bool = False,
        return_codebook_ids: bool = False, quantize_denoised: bool = False, return_x0: bool = False,
        temperature: float = 1.0, noise_dropout: float = 0.0, score_corrector: Any = None,
        corrector_kwargs: Mapping | None = None,
    ) -> Any:  # fmt: skip
        settings: dict[str, Any] = {"quantize_denoised": quantize_denoised, "score_corrector": score_corrector}
        settings |= {"clip_denoised": clip_denoised, "corrector_kwargs": corrector_kwargs, "return_x0": True}
        mean, _, log_variance, x0 = self.p_mean_variance(x=x, c=c, t=t, **settings)
        noise = F.dropout(noise_like(x.shape, x.device, repeat_noise) * temperature, noise_dropout)
        x = self._noised(mean, log_variance, t, noise)
        return (x, x0) if return_x0 else x

    def _ancestral(self, cond: Any, shape: Sequence[int], **options: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `_walk` with `p_sample`; options are those of `_walk`, and PER_STEP for `p_sample`."""
        settings: dict[str, Any] = {"clip_denoised": self.clip_denoised, "return_x0": True}
        settings |= {name: options.pop(name) for name in PER_STEP if name in options}
        cond = _first(cond, shape[0])
        return self._walk(lambda x, t: self.p_sample(x, cond, t, **settings), shape, **options)

    def p_sample_loop(self, cond: Any, shape: Sequence[int], return_intermediates: bool = False, **options: Any) -> Any:
        """Sample latents of that shape with all steps; options: see `_ancestral`."""
        x, xs, _ = self._ancestral(cond, shape, **options)
        return (x, xs) if return_intermediates else x

    def progressive_denoising(
        self, cond: Any, shape: Sequence[int], batch_size: int | None = None, **options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Do p_sample_loop, and return the x0 of each step too; with batch_size, the shape is that of one image."""
        x, _, x0s = self._ancestral(cond, shape if batch_size is None else (batch_size, *shape), **options)
        return x, x0s

    def sample(
        self, cond: Any, batch_size: int = 16, return_intermediates: bool = False, shape: Any = None, **options: Any
    ) -> Any:
        shape = (batch_size, self.channels, self.image_size, self.image_size) if shape is None else shape
        return self.p_sample_loop(cond, shape, return_intermediates, **options)

    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int | None, **options: Any) -> Any:
        """Return (latents, intermediates), by DDIM or with all steps."""
        if not ddim:
            options.pop("eta", None)  # DDIM's
            return self.sample(cond, batch_size, return_intermediates=True, **options)
        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **options)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, sample: bool = True, ddim_steps: int | None = 50,
        ddim_eta: float = 0.0, return_keys: Sequence[str] | None = None, quantize_denoised: bool = True,
        inpaint: bool = True, plot_denoise_rows: bool = False, plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True, unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None, use_ema_scope: bool = True, **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return images (b, c, h, w), and rows of them (c, h, w), that show the state of training, by name."""
        options: dict[str, Any] = {"force_c_encode": True, "return_original_cond": True, "bs": N}
        z, c, x, xrec, xc = self.get_input(batch, self.first_stage_key, return_first_stage_outputs=True, **options)
        ddim, decode = {} if ddim_steps is None else {"eta": ddim_eta}, self.decode_first_stage
        sample_log = partial(self.sample_log, c, len(z), ddim_steps is not None, ddim_steps, **ddim)
        log = {"inputs": x, "reconstruction": xrec} | self._condition_images(batch, x, c, xc)
        if plot_diffusion_rows:
            log["diffusion_row"] = self._diffusion_row(z[:n_row])
        with self.ema_scope("Plotting") if use_ema_scope else nullcontext():
            if sample:
                samples, steps = sample_log()
                log["samples"] = decode(samples)
                if plot_denoise_rows:
                    log["denoise_row"] = self._get_denoise_row_from_list(steps)
            if sample and quantize_denoised and isinstance(self.first_stage_model, VQModelInterface):
                log["samples_x0_quantized"] = decode(sample_log(quantize_denoised=True)[0])
            if unconditional_guidance_scale > 1:
                null = self.get_unconditional_conditioning(len(z), unconditional_guidance_label)
                null = {**c, "c_crossattn": [null]} if isinstance(c, Mapping) else null
                scale = {"unconditional_guidance_scale": unconditional_guidance_scale}
                guided = sample_log(**scale, unconditional_conditioning=null)[0]
                log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = decode(guided)
            if sample and inpaint:
                (h, w), mask = z.shape[-2:], torch.ones_like(z[:, :1])
                mask[..., h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0  # 0 is generated, 1 kept
                log["mask"] = mask
                log["samples_inpainting"] = decode(sample_log(x0=z, mask=mask)[0])
                log["samples_outpainting"] = decode(sample_log(x0=z, mask=1 - mask)[0])
            if plot_progressive_rows:
                progress = self.progressive_denoising(c, z.shape, verbose=False)[1]
                log["progressive_row"] = self._get_denoise_row_from_list(progress)
        return wanted(log, return_keys)

    def _condition_images(self, batch: Mapping[str, Any], x: Tensor, c: Any, xc: Any) -> dict[str, Tensor]:
        key, images = self.cond_stage_key, {}
        words = {**dict.fromkeys(TEXT_KEYS, key), **dict.fromkeys(CLASS_KEYS, "human_label")}.get(key)
        if hasattr(self.cond_stage_model, "decode"):
            images["conditioning"] = self.cond_stage_model.decode(c)
        elif words is not None and words in batch:
            (h, w), size = x.shape[-2:], max(10, x.shape[-1] // 25)
            images["conditioning"] = log_txt_as_img((w, h), batch[words][: len(x)], size)
        elif isimage(xc):
            images["conditioning"] = xc
        if ismap(xc):
            images["original_conditioning"] = self.to_rgb(xc)
        return images

    def to_rgb(self, x: Tensor) -> Tensor:
        """Return a map (b, c, h, w) in random but fixed colours: (b, 3, h, w) in [-1, 1]."""
        if not hasattr(self, "colorize"):
            self.colorize = torch.randn(3, x.shape[1], 1, 1).to(x)
        x = F.conv2d(x, self.colorize)
        return 2 * (x - x.min()) / (x.max() - x.min()) - 1


class Layout2ImgDiffusion(LatentDiffusion):
    """latent-diffusion's model of bounding boxes and their labels; its log does not show the boxes."""

    def __init__(self, cond_stage_key: str = "coordinates_bbox", **settings: Any) -> None:
        super().__init__(cond_stage_key=cond_stage_key, **settings)
