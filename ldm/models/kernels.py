"""Attention as one pure function of tensors, and the choice of its kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "xformers", "math")
MAX_PLAIN_SCORES = 1024 * 1024  # query x key positions up to which the plain form is faster and takes little memory
MAX_MATH_SCORES = 2**26  # scores that "math" holds at a time: 256 MiB of float32
MAX_XFORMERS_WIDTH = 256  # of a head; the autoencoder's one head of 512 has no flash kernel

_backend = "auto"


def set_attention(backend: str) -> None:
    """Choose the attention kernel of this process; all give the same result up to rounding.

    Args:
        backend: "sdpa": torch's fused attention, which is flash attention on recent GPUs. "auto": "sdpa", except for
            bfloat16 on a CPU (see `attention`). "xformers": its memory-efficient attention for CUDA tensors without a
            mask and with heads of at most 256 channels, "auto" for others. "math": matrix product, softmax, matrix
            product in float32 whatever the dtype, a slice of the queries at a time; try it where others give NaN.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"attention {backend!r} is unknown: it is one of {', '.join(BACKENDS)}")
    if backend == "xformers":
        if not torch.cuda.is_available():
            raise ValueError("attention 'xformers' needs a CUDA device, and there is none: use auto, sdpa or math")
        try:
            import xformers.ops  # noqa: F401 - only here: importing it takes seconds
        except (ImportError, OSError, RuntimeError) as error:  # a build for another torch fails in any of these ways
            raise ValueError(
                f"attention 'xformers' does not import ({error}): pip install xformers, or use auto, sdpa or math"
            ) from None
    _backend = backend


def chosen_attention() -> str:
    """Return the kernel that `set_attention` chose."""
    return _backend


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1), by the kernel that `set_attention` chose.

    In bfloat16 on a CPU the softmax is written out: there the backward pass of torch's fused attention is 6 to 10
    times slower than this (and than its own float32 form), and the forward pass up to 3 times.

    Args:
        q, k, v: (b, h, n, d), (b, h, m, d) and (b, h, m, d).
        causal: query i attends to keys 0..i.
        mask: boolean, broadcastable to (b, h, n, m), True where a query may attend; not together with `causal`.
    """
    assert mask is None or not causal, "mask and causal exclude each other"
    if _backend == "math":
        return _math_attention(q, k, v, causal, mask)
    if _backend == "xformers" and q.is_cuda and mask is None and q.shape[-1] <= MAX_XFORMERS_WIDTH:
        return _xformers_attention(q, k, v, causal)
    small = q.shape[-2] * k.shape[-2] <= MAX_PLAIN_SCORES
    if _backend != "sdpa" and small and q.device.type == "cpu" and _computes_in_bfloat16(q):
        return _plain_attention(q, k, v, causal, mask)
    # torch's fused kernels need contiguous features; for others torch writes out all the scores, which is slower
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class AttentionOp:
    """CompVis's attribute of blocks that call xformers: None, as the kernel is chosen for all of them at once."""

    def __get__(self, block: object, owner: type) -> None:
        """Return what CompVis's blocks have at first."""

    def __set__(self, block: object, op: object) -> None:
        if op is not None:
            raise ValueError(f"attention_op {op!r} is not used here: ldm.models.kernels.set_attention chooses a kernel")


def _computes_in_bfloat16(q: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return q.dtype == torch.bfloat16


def attention_weights(q: Tensor, k: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), (b, h, n, m), of the arguments of `attention`, whose kernels do not show it."""
    # scale the scores and not q, which is smaller: q in another layout than k made this a third slower
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # (b, h, n, m)
    if causal:
        mask = _causal_mask(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)  # torch sums a bfloat16 softmax in float32


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    return attention_weights(q, k, causal, mask) @ v


def _math_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """The plain form in float32 or wider, for as many queries at a time as MAX_MATH_SCORES allows."""
    wide = torch.promote_types(q.dtype, torch.float32)
    b, h, n, _ = q.shape
    rows = max(1, MAX_MATH_SCORES // (b * h * k.shape[-2]))
    if causal:
        mask = _causal_mask(q, k)
    if mask is not None and mask.shape[-2] == 1:  # the same for every query
        mask = mask.expand(*mask.shape[:-2], n, -1)
    with torch.autocast(q.device.type, enabled=False):  # it would compute the products in half precision
        wide_k, wide_v = k.to(wide), v.to(wide)
        parts = []
        for part in (slice(first, first + rows) for first in range(0, n, rows)):
            own_mask = None if mask is None else mask[..., part, :]
            parts.append(_plain_attention(q[:, :, part].to(wide), wide_k, wide_v, False, own_mask).to(v.dtype))
    return torch.cat(parts, dim=2)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (b, n, h, d), as xformers has it
    out = memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)
    return out.transpose(1, 2)  # (b, h, n, d)


def _causal_mask(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()  # (n, m)
