"""The training loss of a denoiser: the error of its prediction, weighted over noise levels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import check_prediction, target

ERRORS = ("l2", "l1")
WEIGHTINGS = ("none", "snr", "truncated_snr", "min_snr")


def prediction_loss(
    prediction: str,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    alphas_cumprod_t: Tensor,
    error: str = "l2",
    weight: Mapping[str, Any] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the weighted mean error of a network's output (b, ...) for x_t: (b,), one loss for each image.

    Args:
        prediction: What the network predicts: eps, x0, v or flow.
        x0, noise: What x_t consists of, (b, ...) each.
        alphas_cumprod_t: ab at the timestep of each image, (b,).
        weight: Arguments of `loss_weight`; None is a weight of 1.
        mask: As in `weighted_mean`.
    """
    losses = mean_error(error, output, target(prediction, x0, noise, alphas_cumprod_t), mask)
    if weight is None:
        return losses
    return losses * loss_weight(prediction=prediction, alphas_cumprod_t=alphas_cumprod_t, **weight).to(losses)


def mean_error(error: str, predicted: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the `weighted_mean` of the squared (l2) or absolute (l1) difference of each image: (b, ...) -> (b,)."""
    if error not in ERRORS:
        raise ValueError(f"unknown error {error!r}; choose from {', '.join(ERRORS)}")
    difference = predicted - wanted
    return weighted_mean(difference.square() if error == "l2" else difference.abs(), mask)


def weighted_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of each image's values (b, c, h, w), weighted by a mask (b, 1, h, w) in [0, 1] if given: (b,).

    The mean is over the mask's weight, so that an image counts the same however much of it the mask shows; OneTrainer's
    "normalize masked area loss" does so too, while kohya's scripts divide by the whole area. A black mask gives 0.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    weight = mask.flatten(1).mean(1).clamp(min=torch.finfo(mask.dtype).tiny)
    return (values * mask).flatten(1).mean(1) / weight


def loss_weight(name: str, prediction: str, alphas_cumprod_t: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the weight of a prediction's own squared error, such that the error of x0 has the weight `name`.

      none           1: the weight of x0's error that the prediction implies (1 for x0, SNR for eps, SNR + 1 for v,
                     (sqrt(SNR) + 1)^2 for flow)
      snr            SNR: eps with weight 1 (Ho et al. 2020, eq. 14)
      truncated_snr  max(SNR, 1) (Salimans & Ho 2022, section 4)
      min_snr        min(SNR, gamma) (Hang et al. 2023, section 3.4)

    With SNR = ab / (1 - ab), the errors are related by |x0|^2 = |eps|^2 / SNR = |v|^2 / (SNR + 1) = |flow|^2 /
    (sqrt(SNR) + 1)^2, so a weight w of x0's error is w / SNR of eps's, w / (SNR + 1) of v's and so on. The weights,
    float32 (b,), are finite at zero terminal SNR (ab = 0) too, except for eps with truncated_snr.

    Args:
        name: none, snr, truncated_snr or min_snr.
        prediction: eps, x0, v or flow.
        alphas_cumprod_t: (b,).
        gamma: of min_snr; the paper takes 5.
    """
    check_prediction(prediction)
    if name not in WEIGHTINGS:
        raise ValueError(f"unknown loss weight {name!r}; choose from {', '.join(WEIGHTINGS)}")
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
        weight = weight / {"x0": 1, "v": snr + 1, "flow": (snr.sqrt() + 1) ** 2}[prediction]
    return weight.to(torch.float32)
