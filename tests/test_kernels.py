import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from ldm.models import kernels
from ldm.models.kernels import attention, set_attention

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
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad.double(), atol=2 * tolerance, rtol=0)


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


@pytest.fixture(autouse=True)
def default_backend():
    yield
    set_attention("auto")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slices", [1, 3])
def test_math_computes_in_float32(case, slices, monkeypatch):
    set_attention("math")
    if slices > 1:  # 2 images x 3 heads x 2 queries x 5 keys at a time
        monkeypatch.setattr(kernels, "MAX_MATH_SCORES", 60)
    rows = []
    plain = kernels._plain_attention
    monkeypatch.setattr(kernels, "_plain_attention", lambda q, *rest: rows.append(q.shape[2]) or plain(q, *rest))
    for dtype, rounding in ((torch.float32, 0.0), (torch.bfloat16, 2**-8)):
        q, k, v = tensors(dtype)
        expected = by_definition(q, k, v, **CASES[case])
        out = attention(q, k, v, **CASES[case])
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=rounding)  # only the result is rounded
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(attention(q, k, v, **CASES[case]), out)
    assert rows == ([5] if slices == 1 else [2, 2, 1]) * 4


def test_math_keeps_float16_finite():
    set_attention("math")
    q = torch.full((1, 1, 2, 64), 200.0, dtype=torch.float16)  # q k^T is 2,560,000; float16 ends at 65,504
    assert torch.equal(attention(q, q, q), q)


def test_sdpa_is_fused_whatever_the_dtype(monkeypatch):
    set_attention("sdpa")
    assert used_fused(monkeypatch, lambda: attention(*tensors(torch.bfloat16)))


def test_fused_kernels_get_features_side_by_side(monkeypatch):
    """Feature maps give them a row apart; torch then holds all scores, 2 GiB for the first stage at 1024 x 1024."""
    maps = [torch.randn(2, 4, 9).transpose(1, 2)[:, None] for _ in range(3)]  # (b, 1, n, c)
    fused, strides = F.scaled_dot_product_attention, []

    def spy(q, k, v, **options):
        strides.extend(t.stride(-1) for t in (q, k, v))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(attention(*maps), by_definition(*maps).float())
    assert strides == [1, 1, 1]


class FakeXformers(types.ModuleType):
    """xformers' conventions: (b, n, h, d), and a bias object for causal attention."""

    class LowerTriangularMask:
        pass

    @classmethod
    def memory_efficient_attention(cls, q, k, v, attn_bias=None):
        causal = isinstance(attn_bias, cls.LowerTriangularMask)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return by_definition(q, k, v, causal=causal).transpose(1, 2)


def test_xformers_conventions(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", FakeXformers("xformers.ops"))
    q, k, v = tensors(torch.float32)
    for causal in (False, True):
        out = kernels._xformers_attention(q, k, v, causal)
        torch.testing.assert_close(out, by_definition(q, k, v, causal=causal))
    with pytest.raises(ValueError, match="'xformers' needs a CUDA device"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        set_attention("xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    set_attention("xformers")
    assert used_fused(monkeypatch, lambda: attention(q, k, v))  # it has no kernels for a CPU


def test_backends_that_are_not_there(monkeypatch):
    refused("attention 'flash' is unknown: it is one of auto, sdpa, xformers, math", set_attention, "flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "xformers", None)  # as if it were not installed
    refused("'xformers' does not import .*pip install xformers", set_attention, "xformers")


def test_all_generate_the_same_digit():
    import ldm

    model = ldm.load(device="cpu")
    images = {}
    for backend in ("auto", "sdpa", "math"):
        set_attention(backend)
        images[backend] = torch.tensor(np.asarray(model.generate(["a handwritten digit five"])[0])).int()
    for backend in ("sdpa", "math"):
        assert (images[backend] - images["auto"]).abs().max() <= 1  # of 255: a value on the edge of two levels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "xformers", "math"])
def test_backends_on_a_gpu(backend, dtype, tolerance):
    if backend == "xformers":
        pytest.importorskip("xformers.ops")
        tolerance = max(tolerance, 2e-3)  # its float32 kernels may use TF32, of 10 bits
    set_attention(backend)
    generator = torch.Generator().manual_seed(0)
    for n, m, d, causal in ((256, 256, 40, False), (256, 77, 64, False), (77, 77, 64, True), (64, 64, 512, False)):
        shapes = ((2, 4, n, d), (2, 4, m, d), (2, 4, m, d))
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        out = attention(q.cuda(), k.cuda(), v.cuda(), causal=causal)
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=0)
