"""What else CompVis's modules contain: schedules as arrays, and small helpers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from inspect import isfunction
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint.compvis_config import BETA_SCHEDULES
from ldm.diffusion.schedule import betas, betas_from_alpha_bar, compvis_quad, timesteps
from ldm.util import instantiate_from_config

Losses = tuple[Tensor, dict[str, Tensor]]  # a loss, and what to log


class AbstractDistribution:
    def sample(self) -> Any:
        raise NotImplementedError

    def mode(self) -> Any:
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    def __init__(self, value: Any) -> None:
        self.value = value

    def sample(self) -> Any:
        return self.value

    mode = sample


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Return the betas of the schedule that CompVis calls so: float64 (n_timestep,)."""
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(BETA_SCHEDULES)}")
    if BETA_SCHEDULES[schedule] == "cosine":
        return betas_for_alpha_bar(n_timestep, lambda u: cos((u + cosine_s) / (1 + cosine_s) * pi / 2) ** 2)
    return betas(BETA_SCHEDULES[schedule], n_timestep, linear_start, linear_end).numpy()


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Return the betas of a curve alpha_bar on [0, 1], each at most max_beta: float64."""
    return betas_from_alpha_bar(lambda u: u.apply_(alpha_bar), num_diffusion_timesteps, max_beta).numpy()


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """Return ascending timesteps, int64: CompVis's "quad", or "uniform", here always as many as requested."""
    if ddim_discr_method == "quad":
        return np.array(compvis_quad(num_ddim_timesteps, num_ddpm_timesteps))
    if ddim_discr_method != "uniform":
        raise ValueError(f"unknown ddim_discr_method {ddim_discr_method!r}; choose from uniform, quad")
    return np.array(timesteps("compvis", num_ddim_timesteps, num_ddpm_timesteps)[::-1])


def make_ddim_sampling_parameters(
    alphacums: Any, ddim_timesteps: np.ndarray, eta: float, verbose: bool = True
) -> tuple:
    """Return (sigmas, alphas, alphas_prev) (Song et al. 2021, eq. 16); alphas_prev is a float64 array."""
    alphas = alphacums[ddim_timesteps]
    now, before = np.asarray(alphas, np.float64), np.asarray([alphacums[0], *alphas[:-1]], np.float64)
    sigmas = eta * np.sqrt((1 - before) / (1 - now) * (1 - now / before))
    return torch.from_numpy(sigmas) if isinstance(alphacums, Tensor) else sigmas, alphas, before


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a[t] shaped to multiply x: (T,), (b,) -> (b, 1, ...)."""
    return a.gather(-1, t).view(len(t), *[1] * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: Any, repeat: bool = False) -> Tensor:
    """Sample unit normal noise; with `repeat` the same for every image."""
    noise = torch.randn((1, *shape[1:]) if repeat else tuple(shape), device=device)
    return noise.repeat(shape[0], *[1] * (len(shape) - 1)) if repeat else noise


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    return x[(..., *[None] * (target_dims - x.ndim))]


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each image of x0 (b, ...) to a root mean square of at most `value`."""
    s = x0.square().flatten(1).mean(1).sqrt().clamp(min=value)
    return x0 * append_dims(value / s, x0.ndim)


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Do the same for the channels at each position of x0 (b, c, h, w)."""
    return x0 * (value / x0.square().mean(1, keepdim=True).sqrt().clamp(min=value))


def exists(x: Any) -> bool:
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Return val, or if it is None d, called if it is a function."""
    return val if val is not None else d() if isfunction(d) else d


def ismap(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).mean(1)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter by `scale`, and return the module."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


def count_params(model: nn.Module, verbose: bool = False) -> int:
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        print(f"{type(model).__name__} has {total * 1e-6:.2f} M params.")
    return total


def log_txt_as_img(wh: Sequence[int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Render texts, black on white: (b, 3, h, w) in [-1, 1], for wh = (w, h)."""
    from PIL import Image, ImageDraw, ImageFont

    images, columns = [], max(1, int(40 * wh[0] / 256))
    for text in xc:
        image = Image.new("RGB", (wh[0], wh[1]), "white")
        lines = "\n".join(text[i : i + columns] for i in range(0, len(text), columns))
        ImageDraw.Draw(image).text((0, 0), lines, fill="black", font=ImageFont.load_default(size))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)  # (3, h, w)
    return torch.stack(images)


def parallel_data_prefetch(
    func: Callable, data: Any, n_proc: int, target_data_type: str = "ndarray", cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:  # fmt: skip
    """Map func over n_proc parts of the data, in processes or threads; return an array or a list ("list")."""
    data = list(data.values()) if isinstance(data, dict) else data
    parts = [[data[i] for i in part] for part in np.array_split(range(len(data)), n_proc) if len(part) > 0]
    with (ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor)(n_proc) as pool:
        jobs = [pool.submit(func, part, **{"worker_id": i} if use_worker_id else {}) for i, part in enumerate(parts)]
        results = [job.result() for job in jobs]
    return np.concatenate(results) if target_data_type == "ndarray" else [row for part in results for row in part]


def autocast(f: Callable) -> Callable:
    """Run f in mixed precision if there is a CUDA device."""
    return torch.autocast("cuda", enabled=torch.cuda.is_available())(f)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


class HybridConditioner(nn.Module):
    """Two conditioners, for concatenated channels and for cross-attention."""

    def __init__(self, c_concat_config: Any, c_crossattn_config: Any) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list]:
        given = {"c_concat": self.concat_conditioner(c_concat), "c_crossattn": self.crossattn_conditioner(c_crossattn)}
        return {key: [value] for key, value in given.items()}


class IdentityFirstStage(nn.Module):
    """CompVis's first stage of pixel models: latents are pixels."""

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x

    decode = forward = encode

    def quantize(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return (x, None, [None, None, None]) if self.vq_interface else x
