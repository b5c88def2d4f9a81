"""Attention as one pure function of tensors: the place where a network's choice of kernel is made."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PLAIN_SCORES = 1024 * 1024  # query x key positions up to which the plain form is faster, and its memory harmless


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    q is (b, h, n, d); k and v are (b, h, m, d); the result is (b, h, n, d). `mask` is boolean, broadcastable to
    (b, h, n, m), True where a query may look; `causal` lets query i look at keys 0..i. They exclude each other.

    In bfloat16 on a CPU the softmax is written out: there the backward pass of torch's fused attention is 6 to 10
    times slower than this (and than its own float32 form), and the forward pass up to 3 times.
    """
    assert mask is None or not causal, "mask and causal exclude each other"
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= MAX_PLAIN_SCORES and _computes_in_bfloat16(q):
        return _plain_attention(q, k, v, causal, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _computes_in_bfloat16(q: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return q.dtype == torch.bfloat16


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    # scaling the scores and not q, which is smaller: q in another layout than k made this a third slower
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # (b, h, n, m)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()  # (n, m)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v  # torch sums a bfloat16 softmax in float32
