"""Averages of weights that are chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

The average at step t with the profile p(s) = (gamma + 1) s^gamma / t^(gamma + 1) over the training so far, s in [0, t],
has the relative width sigma_rel: the standard deviation of p over t. Any profile is nearly a linear combination of
those of two widths at several steps, which `ProfileAverages` writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoint.tensors import read_tensors
from ldm.checkpoint.writing import save_file
from ldm.training.ema import wide
from ldm.training.run_folder import SNAPSHOTS, RunFolder

SIGMA_RELS = (0.05, 0.10)  # widths of the averages that snapshots have, as in the paper
LARGEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean


def gamma_of(sigma_rel: float) -> float:
    """Return the gamma of a relative width: the root of (g + 2)^2 (g + 3) sigma_rel^2 = g + 1 (eq. 4) at 0 or more."""
    if not 0 < sigma_rel <= LARGEST:
        raise ValueError(f"sigma_rel {sigma_rel} must be above 0 and at most {LARGEST:.4f}, the mean of all steps")
    v = sigma_rel**2
    return float(np.roots([v, 7 * v, 16 * v - 1, 12 * v - 1]).real.max())


class ProfileAverages:
    """Power-function averages, of each width in SIGMA_RELS, of the trainable weights of a stage's model.

    Snapshots of them are written every so many steps and after the last one. ValueError for a stage without a model.
    """

    def __init__(self, stage: Any, every: int, device: torch.device | str | None = None) -> None:
        self.every, model = every, getattr(stage, "latent_diffusion", None)
        named = () if model is None else model.named_parameters()
        self.live = {name: p for name, p in named if p.requires_grad}
        if not self.live:
            raise ValueError(f"loop.ema_snapshots: {type(stage).__name__} does not train a diffusion model's weights")
        self.shadow = {
            f"{width}/{name}": wide(p.detach()).to(device=device, copy=True)
            for width in SIGMA_RELS
            for name, p in self.live.items()
        }

    @torch.no_grad()
    def update(self, folder: RunFolder, step: int, last: bool) -> None:
        """Take in the weights after a step, counted from 1: a mean in which their profile has its exact share."""
        shadow, count = list(self.shadow.values()), len(self.live)
        for k, width in enumerate(SIGMA_RELS):
            own = shadow[k * count : (k + 1) * count]
            live = [wide(p.detach()).to(average.device) for p, average in zip(self.live.values(), own, strict=True)]
            torch._foreach_lerp_(own, live, 1 - (1 - 1 / step) ** (gamma_of(width) + 1))
        if folder.writes and (last or step % self.every == 0):
            save_file(folder.path / SNAPSHOTS / f"{step:06d}.safetensors", self.shadow, None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.shadow.items():
            average.copy_(state[name])


def profile_product(t: Any, gamma: Any, other_t: Any, other_gamma: Any) -> Any:
    """Return the integral of the product of two profiles (appendix C), elementwise."""
    shorter, longer = np.minimum(t, other_t), np.maximum(t, other_t)
    shares = (shorter / t) ** gamma * (shorter / other_t) ** other_gamma
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * shares / longer


def combination(profiles: Sequence[tuple[float, float]], t: float, sigma_rel: float) -> np.ndarray:
    """Return coefficients of averages (step, sigma_rel) whose sum is nearest to that at step t, by least squares."""
    times, gammas = np.array([(time, gamma_of(width)) for time, width in profiles]).T
    products = profile_product(times[:, None], gammas[:, None], times, gammas)  # (n, n)
    return np.linalg.lstsq(products, profile_product(times, gammas, t, gamma_of(sigma_rel)), rcond=None)[0]


def apply_average(model: nn.Module, run: Path, sigma_rel: float) -> None:
    """Give a run's model the average of that width in place of its own weights."""
    found = combine_snapshots(run, sigma_rel)
    own = dict(model.named_parameters())
    if not found.keys() <= own.keys() or any(own[name].shape != tensor.shape for name, tensor in found.items()):
        raise ValueError(f"the snapshots in {str(run / SNAPSHOTS)!r} are not of this model")
    for name, tensor in found.items():
        own[name].data.copy_(tensor)


def combine_snapshots(run: Path, sigma_rel: float) -> dict[str, Tensor]:
    """Return the average of that width at the last snapshot of a run, from all of them: {name: tensor}."""
    files = {int(path.stem): path for path in sorted((run / SNAPSHOTS).glob("[0-9]*.safetensors"))}
    if not files:
        raise ValueError(f"{str(run)!r} is not a run with snapshots: train it with loop.ema_snapshots=N")
    profiles = [(step, width) for step in files for width in SIGMA_RELS]
    weights = dict(zip(profiles, combination(profiles, max(files), sigma_rel).tolist(), strict=True))
    found: dict[str, Tensor] = {}
    for step, path in files.items():
        for key, tensor in read_tensors(path).state.items():
            width, _, name = key.partition("/")
            part = weights[step, float(width)] * tensor.double()
            found[name] = found[name] + part if name in found else part
    return {name: tensor.float() for name, tensor in found.items()}
