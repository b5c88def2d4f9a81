"""The base of CompVis's diffusion models: DiffusionWrapper, a UNet with its conditioning key, and DDPM. See `ddpm.py`.

The schedule's buffers are read at every use, as in CompVis's code, so replacing them works. The training methods are
plain methods: your own loop calls what a `pl.Trainer` would have called.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ldm.checkpoint.compvis import schedule_buffers
from ldm.checkpoint.compvis_config import schedule_params
from ldm.checkpoint.tensors import read_tensors
from ldm.compvis.ema import LitEma
from ldm.compvis.util import Losses, extract_into_tensor, noise_like
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
# DDPM's arguments in both versions of CompVis's code and in textual inversion's; attributes have the same names.
DDPM_SETTINGS = {
    **{"timesteps": 1000, "beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 2e-2, "cosine_s": 8e-3},
    **{"given_betas": None, "v_posterior": 0.0, "parameterization": "eps", "clip_denoised": True, "log_every_t": 100},
    **{"loss_type": "l2", "l_simple_weight": 1.0, "original_elbo_weight": 0.0, "learn_logvar": False},
    **{"logvar_init": 0.0, "monitor": "val/loss", "scheduler_config": None, "ucg_training": None},
    **{"first_stage_key": "image", "image_size": 256, "channels": 3, "use_positional_encodings": False},
    **{"use_ema": True, "reset_ema": False, "reset_num_ema_updates": False, "make_it_fit": False},
    **{"use_fp16": True},  # no effect: the network computes in its parameters' dtype
    **{"ckpt_path": None, "ignore_keys": (), "load_only_unet": False},
    **{"personalization_config": None, "embedding_reg_weight": 0.0, "unfreeze_model": False, "model_lr": 0.0},
}

# Buffers that some of CompVis's code registers (ControlNet's) and some does not: not loaded.
OPTIONAL_BUFFERS = ("logvar", "lvlb_weights")
UNSUPPORTED = ("v_posterior", "use_positional_encodings", "make_it_fit", "unfreeze_model")  # if not null, false or 0


class DiffusionWrapper(nn.Module):
    """The UNet (or its configuration), which gets the parts of the conditioning that `conditioning_key` names."""

    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"unknown conditioning_key {conditioning_key!r}; choose from {CONDITIONING_KEYS}")
        built = isinstance(diff_model_config, nn.Module)
        self.diffusion_model = diff_model_config if built else instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key
        # whether the UNet gets the list, with a context for each block, instead of one that is joined
        self.sequential_cross_attn = not built and bool(diff_model_config.get("sequential_crossattn", False))

    def forward(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, c_adm: Any = None) -> Tensor:
        """Run the UNet. Each conditioning is a tensor, or a list to concatenate along channels or tokens."""
        kinds, inputs = str(self.conditioning_key).split("-"), {}
        if kinds[0] in ("concat", "hybrid"):
            x = torch.cat([x, _joined(c_concat).to(x.dtype)], dim=1)  # (b, c + channels, h, w)
        if kinds[0] in ("crossattn", "hybrid"):
            inputs["context"] = c_crossattn if self.sequential_cross_attn else _joined(c_crossattn)  # (b, n, d)
        if kinds[-1] == "adm":
            y = c_crossattn if kinds == ["adm"] else c_adm
            inputs["y"] = y[0] if isinstance(y, list | tuple) else y
        return self.diffusion_model(x, t, **inputs)


def wanted(log: dict[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the entries of these names, or all of them if there are none."""
    return {name: log[name] for name in names or () if name in log} or log


def _joined(parts: Tensor | Sequence[Tensor]) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(list(parts), dim=1)


class DDPM(nn.Module):
    """CompVis's DDPM: schedule, losses, EMA weights and training. On its own it is a diffusion model of pixels.

    Args:
        unet_config: The UNet, or its configuration.
        _networks: The other arguments of our LatentDiffusion, for the subclass.
        settings: See `DDPM_SETTINGS`.
    """

    if TYPE_CHECKING:  # the attributes of `DDPM_SETTINGS`, networks and buffers

        def __getattr__(self, name: str) -> Any: ...

    global_step, current_epoch, logger, cond_stage_trainable = 0, 0, None, False
    device = property(lambda self: next(self.model.parameters()).device)
    parameterization = property(lambda self: self.prediction, lambda self, kind: setattr(self, "prediction", kind))

    def __init__(
        self, unet_config: Any, *, conditioning_key: str | None = None, _networks: Any = None, **settings: Any
    ) -> None:
        unknown = sorted(settings.keys() - DDPM_SETTINGS.keys())
        if unknown:
            raise TypeError(f"unknown arguments {unknown}; besides its networks it takes {list(DDPM_SETTINGS)}")
        if any(settings.get(name) for name in UNSUPPORTED):
            raise ValueError(f"{', '.join(UNSUPPORTED)} are not supported")
        settings = DDPM_SETTINGS | settings
        self._set(settings)  # for overrides of `instantiate_first_stage` and `instantiate_cond_stage`, called next
        super().__init__(**({} if _networks is None else {"unet_config": unet_config, **_networks}))
        unet = unet_config if _networks is None else self.model.diffusion_model
        self.model = DiffusionWrapper(unet, conditioning_key)
        if _networks is not None:
            self.model.sequential_cross_attn = bool(unet_config.get("sequential_crossattn", False))
        self.embedding_manager: Any = None  # of textual inversion
        self._set(settings)
        self.register_schedule(**{name: getattr(self, name) for name in list(DDPM_SETTINGS)[:6]})
        logvar = torch.full((self.num_timesteps,), float(self.logvar_init), device="cpu")
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_scheduler, self.logged, self.ucg_prng = self.scheduler_config is not None, {}, np.random.RandomState()
        if self.use_ema:
            self.model_ema = LitEma(self.model)
        if _networks is None:
            self._restore()

    def _set(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def register_schedule(
        self, given_betas: Any = None, beta_schedule: str = "linear", timesteps: int = 1000, linear_start: float = 1e-4,
        linear_end: float = 2e-2, cosine_s: float = 8e-3,
    ) -> None:  # fmt: skip
        """Make the twelve buffers of every checkpoint, and the weights of the variational bound."""
        line = {"given_betas": given_betas, "beta_schedule": beta_schedule, "timesteps": timesteps}
        line |= {"linear_start": linear_start, "linear_end": linear_end, "cosine_s": cosine_s}
        self.schedule_params, self.num_timesteps = schedule_params(line), int(timesteps)
        with torch.device("cpu"):  # the model may be built on the meta device
            for name, values in schedule_buffers(self.schedule_params).items():
                self.register_buffer(name, values)
        ab, beta = self.alphas_cumprod, self.betas
        weights = {
            "eps": beta**2 / (2 * self.posterior_variance * (1 - beta) * (1 - ab)),
            "x0": 0.5 * ab.sqrt() / (2 - ab),
            "v": torch.ones_like(ab),
        }[self.parameterization]
        weights[0] = weights[1]  # the posterior variance at t = 0 is 0
        self.register_buffer("lvlb_weights", weights, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Keep the buffers in float32 under `half()`: rounded to 16 bits they would be another schedule."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        self._buffers.update({name: buffer.to(getattr(self, name).device) for name, buffer in kept.items()})
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in OPTIONAL_BUFFERS:
            if name not in self._parameters:
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _restore(self) -> None:
        self.restarted_from_ckpt = self.ckpt_path is not None and self.device.type != "meta"
        if self.restarted_from_ckpt:
            self.init_from_ckpt(self.ckpt_path, self.ignore_keys, self.load_only_unet)
            if self.reset_ema:
                self.model_ema = LitEma(self.model)
        if self.reset_num_ema_updates:
            self.model_ema.reset_num_updates()

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load the weights that match by name, without running pickled code; a warning lists the others."""
        state = {k: v for k, v in read_tensors(path).state.items() if not k.startswith(tuple(ignore_keys))}
        state = self._fitted(state)
        wrong = (self.model if only_model else self).load_state_dict(state, strict=False)
        for kind, names in zip(("missing", "unexpected"), wrong, strict=True):
            if names:
                warnings.warn(f"{path}: {len(names)} tensors are {kind} ({', '.join(names[:5])} ...)", stacklevel=2)

    def _fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors in the shapes of this model."""
        return state

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the EMA weights of the UNet inside the block, if there are any."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    def _mix(self, first: str, a: Tensor, second: str, b: Tensor, t: Tensor) -> Tensor:
        """Add a and b (b, c, h, w), each multiplied by a buffer's values at t (b,)."""
        at = partial(extract_into_tensor, t=t, x_shape=a.shape)
        return at(getattr(self, first)) * a + at(getattr(self, second)) * b

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._mix("sqrt_alphas_cumprod", x_start, "sqrt_one_minus_alphas_cumprod", noise, t)

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._mix("sqrt_alphas_cumprod", noise, "sqrt_one_minus_alphas_cumprod", -x, t)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self._mix("sqrt_recip_alphas_cumprod", x_t, "sqrt_recipm1_alphas_cumprod", -noise, t)

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return self._mix("sqrt_alphas_cumprod", x_t, "sqrt_one_minus_alphas_cumprod", -v, t)

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return self._mix("sqrt_alphas_cumprod", v, "sqrt_one_minus_alphas_cumprod", x_t, t)

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return the x0 that the UNet's output means: eps, x0 or v."""
        if self.parameterization == "x0":
            return output
        of = {"eps": self.predict_start_from_noise, "v": self.predict_start_from_z_and_v}
        return of[self.parameterization](x_t, t, output)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean (b, c, h, w), variance (b, 1, 1, 1) and log variance of q(x_t | x0) (Ho et al. 2020, eq. 4)."""
        at = partial(extract_into_tensor, t=t, x_shape=x_start.shape)
        variance = at(1 - self.alphas_cumprod)
        return at(self.sqrt_alphas_cumprod) * x_start, variance, at(self.log_one_minus_alphas_cumprod)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of q(x_{t-1} | x_t, x0) (eq. 6 and 7)."""
        at = partial(extract_into_tensor, t=t, x_shape=x_t.shape)
        mean = self._mix("posterior_mean_coef1", x_start, "posterior_mean_coef2", x_t, t)
        return mean, at(self.posterior_variance), at(self.posterior_log_variance_clipped)

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of the model's p(x_{t-1} | x_t) (eq. 11)."""
        x0 = self.predict_start(x, t, self.model(x, t))
        return self.q_posterior(x0.clamp(-1, 1) if clip_denoised else x0, x, t)

    def _noised(self, mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Add noise of that variance to the mean, except at t = 0."""
        return mean + (t > 0).view(-1, *[1] * (mean.ndim - 1)) * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """Sample x at t - 1 (Ho et al. 2020, algorithm 2)."""
        mean, _, log_variance = self.p_mean_variance(x=x, t=t, clip_denoised=clip_denoised)
        return self._noised(mean, log_variance, t, noise_like(x.shape, x.device, repeat_noise))

    @torch.no_grad()
    def _walk(
        self, step: Callable, shape: Sequence[int], x_T: Tensor | None = None, timesteps: int | None = None,
        start_T: int | None = None, mask: Tensor | None = None, x0: Tensor | None = None, verbose: bool = True,
        log_every_t: int | None = None, callback: Any = None, img_callback: Any = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
        """Denoise from timestep min(timesteps, start_T, all) by step(x, t) -> (x, x0): x (b, ...), all x and all x0.

        Where the mask is 1, x0 is kept, noised to each timestep.
        """
        every = self.log_every_t if log_every_t is None else log_every_t
        T = min(n for n in (timesteps, start_T, self.num_timesteps) if n is not None)
        img = torch.randn(*shape, device=self.device) if x_T is None else x_T
        xs, x0s = [img], []
        for i in tqdm(range(T)[::-1], "Sampling t", disable=not verbose):
            ts = torch.full((shape[0],), i, device=self.device)
            img, predicted = step(img, ts)
            if mask is not None:
                img = self.q_sample(x0, ts) * mask + (1 - mask) * img
            if i % every == 0 or i == T - 1:
                xs.append(img)
                x0s.append(predicted)
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(img, i)
        return img, xs, x0s

    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        clip = self.clip_denoised
        x, xs, _ = self._walk(lambda x, t: (self.p_sample(x, t, clip_denoised=clip), None), shape)
        return (x, xs) if return_intermediates else x

    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        return self.p_sample_loop((batch_size, self.channels, self.image_size, self.image_size), return_intermediates)

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """Return the l1 or l2 error, by loss_type: (b, c, h, w), or its mean."""
        loss = {"l1": F.l1_loss, "l2": F.mse_loss}[self.loss_type]
        return loss(pred, target, reduction="mean" if mean else "none")

    def _losses(self, output: Tensor, x_start: Tensor, t: Tensor, noise: Tensor) -> Losses:
        """Return (loss, what is logged) of the UNet's output (b, c, h, w)."""
        target = self.get_v(x_start, noise, t) if self.parameterization == "v" else x_start
        target = noise if self.parameterization == "eps" else target
        simple = self.get_loss(output, target, mean=False).mean(dim=(1, 2, 3))  # (b,)
        weighted = (simple / self.logvar[t].exp() + self.logvar[t]).mean()
        vlb = (self.lvlb_weights[t] * simple).mean()
        loss = self.l_simple_weight * weighted + self.original_elbo_weight * vlb
        logs = {"loss_simple": simple.mean(), "loss_vlb": vlb, "loss": loss}
        logs |= {"loss_gamma": weighted, "logvar": self.logvar.mean()} if self.learn_logvar else {}
        return loss, {f"{'train' if self.training else 'val'}/{name}": value for name, value in logs.items()}

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the images of a batch, (b, h, w, c) or (b, h, w) in [-1, 1], as (b, c, h, w)."""
        x = batch[k] if batch[k].ndim == 4 else batch[k][..., None]
        return rearrange(x, "b h w c -> b c h w").contiguous().float()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Losses:
        t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.p_losses(x, t, *args, **kwargs)

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Losses:
        noise = torch.randn_like(x_start) if noise is None else noise
        return self._losses(self.model(self.q_sample(x_start, t, noise), t), x_start, t, noise)

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> Losses:
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Tensor:
        for key, dropped in ({} if self.ucg_training is None else self.ucg_training).items():
            for i in np.flatnonzero(self.ucg_prng.rand(len(batch[key])) < dropped["p"]):
                batch[key][i] = "" if dropped["val"] is None else dropped["val"]
        loss, logs = self.shared_step(batch)
        self.log_dict(logs | {"global_step": self.global_step})
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int = 0) -> None:
        self.log_dict(self.shared_step(batch)[1])
        with self.ema_scope():
            self.log_dict({f"{name}_ema": value for name, value in self.shared_step(batch)[1].items()})

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, sample: bool = True, return_keys: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return images (b, c, h, w), and rows of them (c, h, w), that show the state of training, by name."""
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        log = {"inputs": x, "diffusion_row": self._diffusion_row(x[:n_row])}
        if sample:
            with self.ema_scope("Plotting"):
                log["samples"], steps = self.sample(len(x), return_intermediates=True)
            log["denoise_row"] = self._get_rows_from_list(steps)
        return wanted(log, return_keys)

    def _diffusion_row(self, x: Tensor) -> Tensor:
        levels = [t for t in range(self.num_timesteps) if t % self.log_every_t == 0 or t == self.num_timesteps - 1]
        noised = [self.q_sample(x, torch.full((len(x),), t, device=x.device)) for t in levels]
        return self._get_denoise_row_from_list(noised)

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        """Join the images (b, c, h, w) of n steps: (c, b h, n w)."""
        return rearrange(torch.stack([*samples]), "n b c h w -> c (b h) (n w)")

    def _get_denoise_row_from_list(
        self, samples: Any, desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Do the same with latents, or with those of a sampler's intermediates."""
        steps = samples["x_inter"] if isinstance(samples, Mapping) else samples
        options = {"force_not_quantize": True} if force_no_decoder_quantization else {}
        return self._get_rows_from_list([self.decode_first_stage(x.to(self.device), **options) for x in steps])

    def decode_first_stage(self, x: Tensor) -> Tensor:
        return x

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.use_ema:
            self.model_ema(self.model)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Keep in `logged` what a Trainer would have logged."""
        self.logged[name] = value.detach() if isinstance(value, Tensor) else value

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value)

    def configure_optimizers(self) -> Any:
        """Return AdamW at `learning_rate`, which must be set; with a scheduler_config, Lightning's two lists."""
        parameters = [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]
        parameters += self.cond_stage_model.parameters() if self.cond_stage_trainable else []
        if self.embedding_manager is not None:
            parameters = self.embedding_manager.embedding_parameters()
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        if not self.use_scheduler:
            return optimizer
        schedule = LambdaLR(optimizer, instantiate_from_config(self.scheduler_config).schedule)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]
