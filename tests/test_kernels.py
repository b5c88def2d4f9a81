import pytest
import torch
import torch.nn.functional as F

from ldm.models import kernels
from ldm.models.kernels import attention

CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
CASES = {"plain": {}, "causal": {"causal": True}, "mask": {"mask": MASK}}


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def by_definition(q, k, v, causal=False, mask=None):
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 4**0.5
    mask = CAUSAL if causal else mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v.double())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_equals_its_definition(case, dtype, tolerance):
    q, k, v = tensors(dtype)
    out = attention(q, k, v, **CASES[case])
    expected = by_definition(q, k, v, **CASES[case])
    assert out.dtype == dtype
    # bfloat16 keeps 8 bits: values of about 2 are rounded to 1/128, scores and weights likewise
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    out.double().sin().sum().backward()
    grads = [t.grad.double() for t in (q, k, v)]
    expected_grads = torch.autograd.grad(expected.sin().sum(), [q, k, v])
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted.double(), atol=2 * tolerance, rtol=0)


def used_fused(monkeypatch, call) -> bool:
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: calls.append(1) or q)
    call()
    return bool(calls)


def test_kernel_choice(monkeypatch):
    fp32, bf16 = tensors(torch.float32), tensors(torch.bfloat16)
    assert used_fused(monkeypatch, lambda: attention(*fp32))
    assert not used_fused(monkeypatch, lambda: attention(*bf16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not used_fused(monkeypatch, lambda: attention(*fp32))
    with torch.autocast("cpu", torch.float16):
        assert used_fused(monkeypatch, lambda: attention(*fp32))
    monkeypatch.setattr(kernels, "MAX_PLAIN_SCORES", 24)  # 5 x 5 positions: too large to write the scores out
    assert used_fused(monkeypatch, lambda: attention(*bf16))


def test_mask_and_causal_exclude_each_other():
    with pytest.raises(AssertionError):
        attention(*tensors(torch.float32), causal=True, mask=MASK)
