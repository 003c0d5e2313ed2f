"""Dense attention under forward mode, against torch's plain formula in float64."""

import goldens
import pytest
import torch
from devices import DEVICE
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbodiffusion_pack.kernels import dense_attention
from turbodiffusion_pack.kernels.dense_attention import attention_with_jvp

SHAPES = [(1, 1, 1), (2, 65, 65), (1, 130, 30)]  # batch, queries, keys


def heads(batch, length, dtype=torch.float64):
    return torch.randn(batch, length, 2, 64, device=DEVICE).to(dtype)


def inputs(batch, queries, keys, dtype=torch.float64):
    """q, k, v and a tangent of each."""
    return [heads(batch, n, dtype) for n in (queries, keys, keys) * 2]


def plain(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tangent_is_that_of_the_formula(shape, monkeypatch):
    monkeypatch.setattr(dense_attention, "SCORES", 1000)  # so that queries come in parts
    *x, tq, tk, tv = inputs(*shape)
    expected = torch.func.jvp(plain, tuple(x), (tq, tk, tv))
    with torch.no_grad():
        out = torch.func.jvp(attention_with_jvp, tuple(x), (tq, tk, tv))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_dual_tensors_go_through_views_of_it(backend):
    """As in a network: the heads are joined afterwards, whatever layout torch's kernel returns."""
    q, k, v, tq, tk, tv = inputs(1, 64, 64, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with sdpa_kernel(backend), forward_ad.dual_level():
        pairs = zip((q, k, v), (tq, tk, tv), strict=True)
        joined = attention_with_jvp(*(forward_ad.make_dual(*pair) for pair in pairs)).flatten(2)
        out, tangent = forward_ad.unpack_dual(joined)
    expected = torch.func.jvp(attention_with_jvp, (q, k, v), (tq, tk, tv))
    assert out.shape == tangent.shape == (1, 64, 128)
    torch.testing.assert_close(tangent, expected[1].flatten(2), rtol=1e-2, atol=1e-4)


def test_keys_and_values_may_be_constant():
    q, k, v, tq, *_ = inputs(2, 65, 30)
    expected = torch.func.jvp(lambda q: plain(q, k, v), (q,), (tq,))[1]
    out = torch.func.jvp(lambda q: attention_with_jvp(q, k, v), (q,), (tq,))[1]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_keep_float32_scores(dtype):
    *x, tq, tk, tv = inputs(1, 130, 130, dtype)
    out = torch.func.jvp(attention_with_jvp, tuple(x), (tq, tk, tv))[1]
    wide = [y.double() for y in (*x, tq, tk, tv)]
    expected = torch.func.jvp(plain, tuple(wide[:3]), tuple(wide[3:]))[1]
    assert out.dtype == dtype
    assert goldens.relative_error(out, expected) < torch.finfo(dtype).eps


def test_autocast_keeps_float32_scores():
    *x, tq, tk, tv = inputs(1, 130, 130, torch.bfloat16)
    expected = torch.func.jvp(attention_with_jvp, tuple(x), (tq, tk, tv))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = torch.func.jvp(attention_with_jvp, tuple(x), (tq, tk, tv))
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        wide = [y.float() for y in (*x, tq, tk, tv)]
        out = torch.func.jvp(attention_with_jvp, tuple(wide[:3]), tuple(wide[3:]))
    assert out[1].dtype == out[0].dtype == torch.bfloat16


def gradients(attend, *x):
    x = [y.clone().requires_grad_() for y in x]
    return torch.autograd.grad(attend(*x).square().sum(), x)


def test_gradients_with_and_without_tangents():
    *x, tq, tk, tv = inputs(2, 65, 30)

    def primal_of_jvp(*x):
        return torch.func.jvp(attention_with_jvp, x, (tq, tk, tv))[0]

    expected = gradients(plain, *x)
    for attend in (attention_with_jvp, primal_of_jvp):
        torch.testing.assert_close(gradients(attend, *x), expected, rtol=0, atol=1e-12)
