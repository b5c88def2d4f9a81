"""The training loss: errors of a prediction, and their weights over noise levels."""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import check_prediction

ERRORS = ("l2", "l1")
WEIGHTS = ("none", "snr", "truncated_snr", "min_snr")


def mean_error(error: str, predicted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared (l2) or absolute (l1) difference of each: (b, ...) -> (b,). ValueError for an unknown name."""
    if error not in ERRORS:
        raise ValueError(f"unknown error {error!r}; choose from {', '.join(ERRORS)}")
    difference = predicted - wanted
    return (difference.square() if error == "l2" else difference.abs()).flatten(1).mean(1)


def loss_weight(name: str, prediction: str, alphas_cumprod_t: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight of a prediction's own squared error such that the error in x0 is weighed as `name` says.

      none           1: whatever weight of x0's error the prediction brings along (1 for x0, SNR for eps, SNR + 1 for v)
      snr            SNR: eps with weight 1 (Ho et al. 2020, eq. 14)
      truncated_snr  max(SNR, 1) (Salimans & Ho 2022, section 4)
      min_snr        min(SNR, gamma) (Hang et al. 2023, section 3.4)

    With SNR = ab / (1 - ab), the errors are related by |x0|^2 = |eps|^2 / SNR = |v|^2 / (SNR + 1), so a weight w of
    x0's error is w / SNR of eps's and w / (SNR + 1) of v's.

    alphas_cumprod_t: (b,), the level of each image. Returns float32 (b,); finite at zero terminal SNR (ab = 0) too,
    but for eps with truncated_snr, whose limit is infinite.
    Raises ValueError for unknown names, and for a gamma that is not above 0.
    """
    check_prediction(prediction)
    if name not in WEIGHTS:
        raise ValueError(f"unknown loss weight {name!r}; choose from {', '.join(WEIGHTS)}")
    if not gamma > 0:
        raise ValueError(f"the gamma of min-SNR must be above 0 (the paper takes 5), not {gamma}")
    ab = alphas_cumprod_t.double()
    snr = ab / (1 - ab)
    if name == "none":
        weight = torch.ones_like(snr)
    elif prediction == "eps":  # over SNR, without 0 / 0
        weight = {
            "snr": torch.ones_like(snr),
            "truncated_snr": (1 / snr).clamp(min=1),
            "min_snr": (gamma / snr).clamp(max=1),
        }[name]
    else:
        weight = {"snr": snr, "truncated_snr": snr.clamp(min=1), "min_snr": snr.clamp(max=gamma)}[name]
        weight = weight / (1 if prediction == "x0" else snr + 1)
    return weight.to(torch.float32)
