"""CompVis's samplers: the signatures of both versions of its code, over the steps of `ldm.diffusion.sampling`.

Here x is variance-preserving, as the network sees it; the steps work on x0 + sigma noise. CompVis's noise levels end at
the schedule's first alpha-bar, not at 1. Noise is sampled as often as in CompVis's code, for eta 0 too, so that a seed
gives the same images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout
from tqdm import tqdm

from ldm.compvis.util import make_ddim_sampling_parameters, make_ddim_timesteps, noise_like, norm_thresholding
from ldm.diffusion.denoiser import from_vp, make_denoiser, scalings, to_vp
from ldm.diffusion.sampling import sample
from ldm.diffusion.sampling.first_order import Point, add_noise, euler, euler_to
from ldm.diffusion.sampling.multistep import correction, dpmpp_2m, uniform_moments
from ldm.diffusion.schedule import MIN_ALPHA_BAR, Schedule, signal_and_noise_levels


class CompVisSampler:
    """The base of CompVis's samplers: the tables of the schedule and the sampling loop. Any method can be overridden.

    Args:
        model: Has apply_model(x, t, cond), num_timesteps, parameterization, betas, alphas_cumprod and
            alphas_cumprod_prev; q_sample for masks, first_stage_model for quantize_x0.
        schedule, device: Have no effect; the device is the model's.
    """

    walk, step = "ddim_sampling", "p_sample_ddim"  # the methods that `sample` and the loop call
    if TYPE_CHECKING:  # the tables of `make_schedule`

        def __getattr__(self, name: str) -> Any: ...

    multistep = False  # whether the step takes the last eps and returns its own; such steps add no noise

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, **kwargs: Any) -> None:
        self.model, self.schedule, self.ddpm_num_timesteps = model, schedule, model.num_timesteps

    @property
    def device(self) -> torch.device:
        return self.model.betas.device

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute; move tensors to the model's device, in float32 if that has no float64."""
        if isinstance(attr, Tensor):
            attr = attr.detach().to(self.device, torch.float32 if self.device.type == "mps" else attr.dtype)
        setattr(self, name, attr)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set `ddim_timesteps` (int64, ascending), `ddim_alphas` and CompVis's other tables."""
        if self.multistep and ddim_eta != 0:
            raise ValueError(f"ddim_eta must be 0 for PLMS, got {ddim_eta}")
        names = ("betas", "alphas_cumprod", "alphas_cumprod_prev")
        tables = {name: getattr(self.model, name).float().cpu() for name in names}
        _, ab, before = tables.values()
        self.ddim_timesteps = make_ddim_timesteps(ddim_discretize, ddim_num_steps, self.ddpm_num_timesteps)
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(ab, self.ddim_timesteps, ddim_eta)
        tables |= {"sqrt_alphas_cumprod": ab.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - ab).sqrt()}
        tables |= {"log_one_minus_alphas_cumprod": (1 - ab).log(), "sqrt_recip_alphas_cumprod": ab.rsqrt()}
        tables |= {"sqrt_recipm1_alphas_cumprod": (1 / ab - 1).sqrt(), "ddim_sigmas": sigmas, "ddim_alphas": alphas}
        tables |= {"ddim_alphas_prev": alphas_prev, "ddim_sqrt_one_minus_alphas": (1 - alphas).sqrt()}
        original = ddim_eta * ((1 - before) / (1 - ab) * (1 - ab / before)).sqrt()
        for name, table in {**tables, "ddim_sigmas_for_original_num_steps": original}.items():
            self.register_buffer(name, table)

    @torch.no_grad()
    def sample(
        self, S: int, batch_size: int, shape: Sequence[int], conditioning: Any = None, callback: Callable | None = None,
        normals_sequence: Any = None, img_callback: Callable | None = None, quantize_x0: bool = False, eta: float = 0.0,
        mask: Tensor | None = None, x0: Tensor | None = None, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: Mapping | None = None, verbose: bool = True,
        x_T: Tensor | None = None, log_every_t: int = 100, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None, dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Return (latents (batch_size, *shape), {"x_inter": [...], "pred_x0": [...]}), from x_T or noise."""
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose)
        new = {"dynamic_threshold": dynamic_threshold, "ucg_schedule": ucg_schedule}  # not in older overrides
        return getattr(self, self.walk)(
            conditioning, (batch_size, *shape), callback=callback, img_callback=img_callback,
            quantize_denoised=quantize_x0, mask=mask, x0=x0, ddim_use_original_steps=False, noise_dropout=noise_dropout,
            temperature=temperature, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs, x_T=x_T,
            log_every_t=log_every_t, unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning, **{k: v for k, v in new.items() if v is not None},
        )  # fmt: skip

    @torch.no_grad()
    def _walk(
        self, cond: Any, shape: Sequence[int], x_T: Tensor | None = None, ddim_use_original_steps: bool = False,
        callback: Callable | None = None, timesteps: int | None = None, quantize_denoised: bool = False,
        mask: Tensor | None = None, x0: Tensor | None = None, img_callback: Callable | None = None,
        log_every_t: int = 100, ucg_schedule: Sequence[float] | None = None, **settings: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:  # fmt: skip
        """Denoise from the first `timesteps` levels, or all; where the mask is 1, x0 is kept. settings: of a step."""
        img, eps = torch.randn(shape, device=self.device) if x_T is None else x_T, []
        levels = self._levels(timesteps, ddim_use_original_steps)[::-1]
        settings |= {"use_original_steps": ddim_use_original_steps, "quantize_denoised": quantize_denoised}
        intermediates = {"x_inter": [img], "pred_x0": [img]}
        for i, t in enumerate(tqdm(levels, type(self).__name__, disable=None)):
            index, ts = len(levels) - i - 1, self._full(shape[0], t)
            if mask is not None:
                img = self.model.q_sample(x0, ts) * mask + (1 - mask) * img
            if ucg_schedule is not None:
                settings["unconditional_guidance_scale"] = ucg_schedule[i]
            if self.multistep:
                settings |= {"old_eps": eps, "t_next": self._full(shape[0], levels[min(i + 1, len(levels) - 1)])}
            img, pred_x0, *new = getattr(self, self.step)(img, cond, ts, index=index, **settings)
            eps = [*eps, *new][-3:]
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(img)
                intermediates["pred_x0"].append(pred_x0)
        return img, intermediates

    @torch.no_grad()
    def _p_sample(
        self, x: Tensor, c: Any, t: Tensor, index: int, repeat_noise: bool = False, use_original_steps: bool = False,
        quantize_denoised: bool = False, temperature: float = 1.0, noise_dropout: float = 0.0,
        score_corrector: Any = None, corrector_kwargs: Mapping | None = None,
        unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Any = None,
        old_eps: Sequence[Tensor] | None = None, t_next: Tensor | None = None, dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return (x at the next noise level, x0, eps) for x (b, c, h, w) at `index` of the tables and timesteps t (b,).

        old_eps: None for Euler's step, else the previous eps, newest last; without any, the step evaluates t_next too.
        """
        sigmas = self._sigmas(index, use_original_steps)
        guidance = (c, unconditional_guidance_scale, unconditional_conditioning, score_corrector, corrector_kwargs)
        how = (repeat_noise, quantize_denoised, temperature, noise_dropout, dynamic_threshold)
        eps, x0 = self._predict(x, t, sigmas[0], *guidance)
        if old_eps is None:
            return *self._step(eps, x0, sigmas, *how), eps
        if past := list(old_eps)[:-4:-1]:
            mean = eps + correction(eps, past, [-1, -2, -3][: len(past)], uniform_moments(len(past)))
        else:
            ahead, _ = self._step(eps, x0, sigmas, *how)
            mean = (eps + self._predict(ahead, t_next, sigmas[1], *guidance)[0]) / 2
        return *self._step(mean, x0 + sigmas[0] * (eps - mean), sigmas, *how), eps

    def _levels(self, count: int | None, original: bool) -> np.ndarray:
        return (np.arange(self.ddpm_num_timesteps) if original else self.ddim_timesteps)[:count]

    def _full(self, batch: int, t: int) -> Tensor:
        return torch.full((batch,), int(t), device=self.device, dtype=torch.long)

    def _sigmas(self, index: int, original: bool) -> tuple[float, float, float]:
        """Return (sigma at `index`, the next sigma, the deviation of the noise added between them)."""
        tables = (self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas)
        if original:
            tables = (self.alphas_cumprod, self.alphas_cumprod_prev, self.ddim_sigmas_for_original_num_steps)
        ab, before, up = (float(table[index]) for table in tables)
        return math.sqrt(1 / max(ab, MIN_ALPHA_BAR) - 1), math.sqrt(1 / before - 1), up / math.sqrt(before)

    def _guided(self, x: Tensor, t: Tensor, c: Any, scale: float = 1.0, uncond: Any = None) -> Tensor:
        """Return the network's output with classifier-free guidance, from one call on both conditionings."""
        if uncond is None or scale == 1:
            return self.model.apply_model(x, t, c)
        without, output = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), _both(uncond, c)).chunk(2)
        return without + scale * (output - without)

    def _predict(
        self, x: Tensor, t: Tensor, sigma: float, c: Any, scale: float, uncond: Any, corrector: Any, extra: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted (eps, x0) of x (b, c, h, w)."""
        output = self._guided(x, t, c, scale, uncond)
        if corrector is not None:
            output = corrector.modify_score(self.model, output, x, t, c, **(extra or {}))
        x = from_vp(x.to(torch.promote_types(x.dtype, torch.float32)), sigma)
        c_skip, c_out = scalings(self.model.parameterization, sigma)
        x0 = c_skip * x + c_out * output
        return output if self.model.parameterization == "eps" else (x - x0) / sigma, x0

    def _step(
        self, eps: Tensor, x0: Tensor, sigmas: tuple, repeat: bool, quantize: bool, heat: float, drop: float, top: Any
    ) -> tuple[Tensor, Tensor]:
        """Return (x at the next noise level, the x0 used) (Song et al. 2021, eq. 12); sigmas: from `_sigmas`."""
        sigma, sigma_next, up = sigmas
        x0 = self.model.first_stage_model.quantize(x0)[0] if quantize else x0
        x0 = x0 if top is None else norm_thresholding(x0, top)
        noise = dropout(noise_like(x0.shape, x0.device, repeat) * heat, drop)
        x = euler_to(Point(sigma, x0 + sigma * eps, x0), math.sqrt(max(sigma_next**2 - up**2, 0)))
        return to_vp(add_noise(x, up, lambda: noise), sigma_next), x0


def _both(uncond: Any, cond: Any) -> Any:
    """Concatenate two conditionings on the batch axis: (b, ...) -> (2b, ...), also within dicts and lists."""
    if isinstance(cond, Mapping):
        return {key: _both(uncond[key], cond[key]) for key in cond}
    if isinstance(cond, list | tuple):
        return [_both(u, c) for u, c in zip(uncond, cond, strict=True)]
    return torch.cat([uncond, cond])


class DDIMSampler(CompVisSampler):
    """DDIM (Song et al. 2021): `sample` calls `ddim_sampling`, which calls `p_sample_ddim` in every step."""

    ddim_sampling = CompVisSampler._walk

    def p_sample_ddim(self, x: Tensor, c: Any, t: Tensor, index: int, *args: Any, **kwargs: Any) -> tuple:
        """Return (x at the next noise level, x0); the arguments are those of `_p_sample`."""
        return self._p_sample(x, c, t, index, *args, **kwargs)[:2]

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Add noise to x0 up to index t (b,) of the tables, at most the last; `decode(..., t)` starts at t - 1."""
        ab = (self.alphas_cumprod if use_original_steps else self.ddim_alphas).cpu()
        signal_level, noise_level = signal_and_noise_levels(ab[t.cpu().clamp(max=len(ab) - 1)], x0)
        return signal_level * x0 + noise_level * (torch.randn_like(x0) if noise is None else noise)

    @torch.no_grad()
    def decode(
        self, x_latent: Tensor, cond: Any, t_start: int, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None, use_original_steps: bool = False, callback: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        guidance: dict[str, Any] = {"unconditional_guidance_scale": unconditional_guidance_scale, "callback": callback}
        guidance |= {"unconditional_conditioning": unconditional_conditioning, "timesteps": t_start}
        return self._walk(cond, x_latent.shape, x_latent, use_original_steps, **guidance)[0]

    @torch.no_grad()
    def encode(
        self, x0: Tensor, c: Any, t_enc: int, use_original_steps: bool = False, return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0, unconditional_conditioning: Any = None,
        callback: Callable | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Invert DDIM, t_enc steps up; each step's eps is predicted from its lower x at its upper timestep."""
        x, steps, kept = x0, [], []
        guidance = (c, unconditional_guidance_scale, unconditional_conditioning, None, None)
        for i, t in enumerate(self._levels(t_enc, use_original_steps)):
            top, sigma, _ = self._sigmas(i, use_original_steps)
            eps, _ = self._predict(x, self._full(len(x), t), top, *guidance)
            x = to_vp(from_vp(x, sigma) + (top - sigma) * eps, top)
            if return_intermediates and (i % max(1, t_enc // return_intermediates) == 0 or i >= t_enc - 2):
                steps.append(i)
                kept.append(x)
            if callback:
                callback(i)
        return x, {"x_encoded": x, "intermediate_steps": steps} | ({"intermediates": kept} if kept else {})


class PLMSSampler(CompVisSampler):
    """PLMS (Liu et al. 2022), eta 0: `sample` calls `plms_sampling`, which calls `p_sample_plms` in every step."""

    walk, step, multistep = "plms_sampling", "p_sample_plms", True
    plms_sampling, p_sample_plms = CompVisSampler._walk, CompVisSampler._p_sample


class DPMSolverSampler(CompVisSampler):
    """DPM-Solver++(2M) (Lu et al. 2022), evenly spaced in time; the last of fewer than 15 steps is Euler's."""

    walk = "dpm_sampling"

    @torch.no_grad()
    def dpm_sampling(
        self, cond: Any, shape: Sequence[int], x_T: Tensor | None = None, unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None, **ignored: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Return (latents, None). As in CompVis's code, the other arguments of `sample` have no effect."""
        schedule, steps = Schedule(self.model.alphas_cumprod.detach().cpu().double()), len(self.ddim_timesteps)
        sigmas = [schedule.sigma_at(t) for t in np.linspace(schedule.T - 1, 0, steps + 1).tolist()]

        def network(x: Tensor, t: Tensor, c: Any) -> Tensor:
            return self._guided(x, t, c, unconditional_guidance_scale, unconditional_conditioning)

        def step(denoise: Any, points: Any, sigma_next: float, *noise: Any) -> Tensor:
            ends = steps < 15 and sigma_next == sigmas[-1]
            return (euler if ends else dpmpp_2m)(denoise, points, sigma_next, *noise)

        denoise = make_denoiser(network, schedule, self.model.parameterization)
        x = from_vp(torch.randn(shape, device=self.device) if x_T is None else x_T, sigmas[0])
        *_, last = sample(lambda x, sigma: denoise(x, sigma, cond), x, sigmas, step)
        return to_vp(last.x, sigmas[-1]), None
