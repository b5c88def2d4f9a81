"""Weights of the training loss over noise levels."""

import torch
from torch import Tensor

from ldm.diffusion.denoiser import check_prediction


def min_snr_weight(prediction: str, alphas_cumprod_t: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) as a weight of the error in x0 (Hang et al. 2023, section 3.4), for each prediction's own error.

    With SNR = ab / (1 - ab), the errors are related by |x0|^2 = |eps|^2 / SNR = |v|^2 / (SNR + 1), so the weight is
    min(SNR, gamma) for x0, min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v; all are finite, at zero
    terminal SNR (ab = 0) too.

    alphas_cumprod_t: (b,), the level of each picture. Returns float32 (b,).
    Raises ValueError for an unknown prediction and for a gamma that is not above 0.
    """
    check_prediction(prediction)
    if not gamma > 0:
        raise ValueError(f"the gamma of min-SNR must be above 0 (the paper takes 5), not {gamma}")
    ab = alphas_cumprod_t.double()
    snr = ab / (1 - ab)
    if prediction == "eps":
        weight = (gamma / snr).clamp(max=1)  # gamma / 0 is infinity, so 1: the limit
    else:
        weight = snr.clamp(max=gamma) / (1 if prediction == "x0" else snr + 1)
    return weight.to(torch.float32)
