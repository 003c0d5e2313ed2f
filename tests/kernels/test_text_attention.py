"""Attention to a text: as if every repeated key were there, in float64 and in Triton."""

import goldens
import pytest
import torch
from devices import DEVICE, TRITON_DTYPES
from turbodiffusion_pack.kernels.norm import rms_norm
from turbodiffusion_pack.kernels.text_attention import mma, text_attention


def random_text(batch, length, keys, heads, dim, dtype):
    """q [B, L, H, D], k and v [B, T, H, D], with scores of some size."""
    shapes = (batch, length, heads, dim), *[(batch, keys, heads, dim)] * 2
    return [torch.randn(shape, device=DEVICE).mul_(1.5).to(dtype) for shape in shapes]


def padded(x, repeats):
    """All keys, the last as often as it counts."""
    return torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1, -1)], 1)


def exact_attention(q, k, v, repeats):
    heads = (x.double().transpose(1, 2) for x in (q, padded(k, repeats), padded(v, repeats)))
    q, k, v = heads
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("backend", ("reference", "triton"))
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "keys", "repeats", "heads", "dim"),
    (
        (1, 1, 1, 1, 1, 64),
        (3, 130, 32, 449, 2, 64),
        (2, 65, 65, 448, 1, 128),
        (1, 40, 130, 1, 2, 64),
    ),
)
def test_it_is_the_attention_to_all_of_them(
    batch, length, keys, repeats, heads, dim, dtype, backend
):
    if backend == "triton" and DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("float32 tiles do not fit a GPU")
    q, k, v = random_text(batch, length, keys, heads, dim, dtype)
    y = text_attention(q, k, v, repeats, backend=backend)
    bound = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}[dtype]
    assert y.dtype == dtype
    assert goldens.relative_error(y, exact_attention(q, k, v, repeats)) <= bound


def test_the_number_of_repeats_counts():
    q, k, v = random_text(1, 40, 9, 2, 64, torch.float32)
    y = text_attention(q, k, v, 500, backend="triton")
    assert goldens.relative_error(y, exact_attention(q, k, v, 450)) > 1e-3


@pytest.mark.parametrize("backend", ("reference", "triton"))
@pytest.mark.parametrize("dim", (64, 128))
def test_q_is_normed_as_rms_norm_does_it_and_may_make_room(dim, backend):
    q, k, v = random_text(2, 70, 20, 2, dim, torch.float16)
    weight = torch.rand(2 * dim, device=DEVICE) + 0.5
    norms = (q.float().flatten(2).square().mean(-1) + 1e-6).rsqrt()
    normed = rms_norm(q.flatten(2), weight, backend="reference").view_as(q)
    expected = text_attention(normed, k, v, 30, backend=backend)
    y = text_attention(q, k, v, 30, weight, norms, out=q, backend=backend)
    assert y is q
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_a_nan_stays_in_its_row(backend):
    q, k, v = random_text(1, 10, 70, 2, 64, torch.float32)
    q[0, 3, 1, 5] = torch.nan
    bad = text_attention(q, k, v, 4, backend=backend).isnan()
    assert bad[0, 3, 1].all()
    assert bad.sum() == 64


def test_views_are_read_where_they_are():
    q, k, v = random_text(2, 30, 40, 4, 64, torch.float32)
    views = q[:, ::2, 1:3], k[:, ::3, :2], v.flip(1)[:, :14, 2:]
    y = text_attention(*views, 7, backend="triton")
    assert goldens.relative_error(y, exact_attention(*views, 7)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("heads", (12, 40))
@pytest.mark.parametrize("keys", (1, 121, 128, 129))
def test_triton_at_model_size(keys, heads, dtype):
    """On cards of mma.sync CUDA C++ takes up to 128 keys; more rows than all warps take at once."""
    q, k, v = random_text(1, 4001, keys, heads, 128, dtype)
    y = text_attention(q, k, v, 384, backend="triton")
    bound = {torch.float16: 8e-4, torch.bfloat16: 6e-3}[dtype]
    assert goldens.relative_error(y, exact_attention(q, k, v, 384)) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("length", (1, 16, 3000))
def test_norm_and_views_of_whole_heads(length):
    """q makes room for what comes of it, k and v are slices, samples have norms of their own."""
    q, k, v = random_text(2, length, 2 * 77, 3, 128, torch.bfloat16)
    k, v = k[:, ::2], v[:, :77]
    weight = torch.rand(3 * 128, device=DEVICE) + 0.5
    norms = (q.float().flatten(2).square().mean(-1) + 1e-6).rsqrt()
    normed = q.double() * norms[..., None, None].double() * weight.double().view(3, 128)
    expected = exact_attention(normed, k, v, 436)
    y = text_attention(q, k, v, 436, weight, norms, out=q, backend="triton")
    assert y is q
    assert goldens.relative_error(y, expected) <= 8e-3


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_cuda_takes_what_begins_at_multiples_of_16_bytes(name):
    if mma is None:
        pytest.skip("Triton is not installed")
    given = {
        x: torch.zeros(1, 4, 2, 128, dtype=torch.float16, device=DEVICE) for x in (*"qkv", "out")
    }
    assert mma.unfit(**given) is None
    given[name] = torch.zeros(1 + 4 * 256, dtype=torch.float16, device=DEVICE)[1:].view(
        1, 4, 2, 128
    )
    assert mma.unfit(**given) == "rows do not begin at multiples of 16 bytes"


@pytest.mark.parametrize("at_once", (5, 82, 132, 170))
@pytest.mark.parametrize("heads", (1, 3, 12, 40, 200))
def test_every_row_has_a_warp(heads, at_once):
    """Programs are never more than there are tiles, and end about as soon as can be."""
    if mma is None:
        pytest.skip("Triton is not installed")
    rows = mma.WARPS * mma.ROWS
    for length in (1, rows, rows + 1, 25344, 32760, 75600):
        tiles = -(-length // rows)
        programs, even, others = mma.shares_of(heads, length, at_once)
        assert 1 <= programs <= even <= tiles
        assert (even == tiles) == (others == 0)
        assert others == 0 or programs * heads + others == at_once
        own = -(-heads * programs // at_once) * -(-even // programs)
        left = -(-heads * (tiles - even) // others) if others else 0
        at_best = heads * tiles / at_once
        assert length < 25344 or max(own, left) <= 1.09 * at_best + 1


@pytest.mark.gpu
@pytest.mark.parametrize("at_once", (5, 7))
def test_what_does_not_fill_the_gpu_is_shared_by_others(at_once, monkeypatch):
    """Of 3 heads, 5200 rows each: some programs take the last rows of one after the other."""
    monkeypatch.setattr(mma, "multiprocessors", lambda device: at_once)
    assert mma.shares_of(3, 5200, at_once).others > 0
    q, k, v = random_text(1, 5200, 121, 3, 128, torch.bfloat16)
    y = text_attention(q, k, v, 392, backend="triton")
    assert goldens.relative_error(y, exact_attention(q, k, v, 392)) <= 6e-3


def test_bad_input_is_refused():
    q, k, v = random_text(1, 5, 6, 2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"k must be \[1, 6, 2, 64\], got \[1, 6, 1, 64\]"):
        text_attention(q, k[:, :, :1], v[:, :, :1])
    with pytest.raises(TypeError, match=r"must be torch\.float32 on .*, got torch\.float16"):
        text_attention(q, k.half(), v.half())
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        text_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="weight and row_norms go together"):
        text_attention(q, k, v, weight=torch.ones(128, device=DEVICE))
    with pytest.raises(TypeError, match="row_norms must be float32"):
        text_attention(q, k, v, 1, torch.ones(128, device=DEVICE), q.new_ones(1, 5).half())
    with pytest.raises(ValueError, match=r"out must be contiguous \[1, 5, 2, 64\]"):
        text_attention(q, k, v, out=q.transpose(0, 1))
