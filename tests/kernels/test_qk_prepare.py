"""What prepares q and k: the composition of its ops, and Triton against it."""

import goldens
import pytest
import torch
from devices import BATCHES, CARD, DEVICE, TRITON_DTYPES
from turbodiffusion_pack.kernels import dispatch
from turbodiffusion_pack.kernels.block_map import block_means
from turbodiffusion_pack.kernels.linear_attention import (
    LinearBranch,
    key_value_state,
    linear_attention,
)
from turbodiffusion_pack.kernels.norm import rms_norm
from turbodiffusion_pack.kernels.qk_prepare import cuda, norms_of_squares, prepare, square_sums
from turbodiffusion_pack.kernels.qk_prepare import triton as triton_kernels
from turbodiffusion_pack.kernels.rope import apply_rope
from turbodiffusion_pack.kernels.sparse_attention.reference import quantize_heads


def random_projection(batch, length, heads, dim, dtype, own_angles=False):
    """x [B, L, H, D], a strided view, weight [H D], cos and sin [1 or B, L, D / 2], strided."""
    x = torch.randn(batch, length, heads, 2, dim, device=DEVICE).to(dtype)[..., 1, :]
    weight = 1 + 0.2 * torch.randn(heads * dim, device=DEVICE)
    samples = batch if own_angles else 1
    angles = torch.rand(samples, length, dim // 2, 1, device=DEVICE) * 7
    turn = torch.cat((angles.cos(), angles.sin()), -1)
    return x, weight, turn[..., 0], turn[..., 1]


def exact(x, weight, cos, sin):
    """RMSNorm over all heads and the rotation in float64."""
    wide = x.double().flatten(2)
    wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    pairs = torch.view_as_complex(wide.view(*x.shape[:3], -1, 2))
    turn = torch.complex(cos.double(), sin.double())[:, :, None]
    return torch.view_as_real(pairs * turn).flatten(-2)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", [1, 65, 300])
def test_reference_is_the_composition(length, batch):
    arguments = random_projection(batch, length, 3, 64, torch.float32, own_angles=True)
    x, weight, cos, sin = arguments
    found = prepare(*arguments, block=64, quantize=True, backend="reference")
    normed = rms_norm(x.flatten(2), weight, backend="reference").view(x.shape)
    expected = apply_rope(normed, cos, sin, backend="reference")
    assert goldens.relative_error(found.rows, exact(*arguments)) <= 1e-6
    assert torch.equal(found.rows, expected)
    assert torch.equal(found.means, block_means(expected, 64, backend="reference"))
    integers, scale = quantize_heads(expected, 64)
    assert torch.equal(found.blocks.integers, integers) and torch.equal(found.blocks.scale, scale)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "dim", "block"),
    [(1, 1, 64, 64), (65, 3, 128, 64), (200, 11, 64, 128), (128, 8, 128, 128)],
)
def test_triton_equals_the_reference(length, heads, dim, block, own_angles, dtype):
    """To two roundings of x's dtype: the squares of a row add up in another order, and a short
    row's norm rests on few of them."""
    arguments = random_projection(2, length, heads, dim, dtype, own_angles)
    options = {"block": block, "quantize": True}
    found = prepare(*arguments, **options, backend="triton")
    expected = prepare(*arguments, **options, backend="reference")
    eps = torch.finfo(dtype).eps
    assert goldens.relative_error(found.rows, expected.rows) <= 2 * eps
    # A block of one row has that row as its mean, which is two roundings away.
    torch.testing.assert_close(found.means, expected.means, atol=max(eps, 3e-6), rtol=2 * eps)
    found, expected = found.blocks, expected.blocks
    torch.testing.assert_close(found.scale, expected.scale, atol=0, rtol=max(2 * eps, 1e-6))
    assert (found.integers.int() - expected.integers.int()).abs().max() <= 1
    assert (found.integers != expected.integers).float().mean() <= 1e-2


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_takes_the_squares_of_rows_where_they_are_known(backend):
    """In parts, and as norms in place of those of x itself."""
    x, weight, cos, sin = random_projection(2, 300, 3, 64, torch.float32)
    parts = x.square().sum(-1).permute(0, 2, 1)  # of each head, [B, H, L]

    def rows(squares):
        norms = norms_of_squares(squares, weight.numel(), backend=backend)
        return prepare(x, weight, cos, sin, block=64, row_norms=norms, backend=backend).rows

    found = rows(parts)
    assert goldens.relative_error(found, exact(x, weight, cos, sin)) <= 1e-6
    assert goldens.relative_error(2 * rows(4 * parts), found) <= 1e-5
    with pytest.raises(ValueError, match="squares"):
        norms_of_squares(parts[0], weight.numel(), backend=backend)
    with pytest.raises(TypeError, match="squares"):
        norms_of_squares(parts.half(), weight.numel(), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_squares_give_the_same_norm_in_whatever_parts_they_come(backend):
    """As ranks have them: of float32 sums some order would round otherwise."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(1, 40, 1000, generator=generator).exp().to(DEVICE)
    norms = norms_of_squares(parts, 5120, backend=backend)
    halves = torch.stack([half.double().sum(1) for half in parts.split(20, 1)], 1)
    assert norms_of_squares(halves, 5120, backend=backend).equal(norms)
    assert norms_of_squares(parts.flip(1), 5120, backend=backend).equal(norms)
    assert not parts.sum(1).equal(parts.flip(1).contiguous().sum(1))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_means_and_integers_are_those_of_the_rounded_rows(dtype):
    arguments = random_projection(1, 150, 2, 64, dtype)
    found = prepare(*arguments, block=128, quantize=True, backend="triton")
    integers, scale = quantize_heads(found.rows, 128)
    assert torch.equal(found.blocks.integers, integers)
    torch.testing.assert_close(found.blocks.scale, scale, atol=0, rtol=1e-6)
    torch.testing.assert_close(found.means, block_means(found.rows, 128), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_makes_integers_only_if_asked(backend):
    arguments = random_projection(1, 70, 2, 64, torch.float16)
    found = prepare(*arguments, block=64, backend=backend)
    assert found.blocks is None
    assert found.rows.shape == (1, 70, 2, 64) and found.means.shape == (1, 2, 2, 64)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_zeros_stay_zeros(backend):
    x, *rest = random_projection(1, 70, 2, 64, torch.float16)
    found = prepare(torch.zeros_like(x), *rest, block=64, quantize=True, backend=backend)
    parts = found.rows, found.means, found.blocks.integers
    assert all(not part.count_nonzero() for part in parts)


def test_every_head_is_reached():
    heads = triton_kernels.HEADS + 1
    arguments = random_projection(1, 5, heads, 64, torch.float32)
    found = prepare(*arguments, block=64, backend="triton")
    assert goldens.relative_error(found.rows, exact(*arguments)) <= 1e-6


def test_refuses_what_does_not_fit():
    x, weight, cos, sin = random_projection(1, 70, 2, 64, torch.float32)
    cases = [
        ((x[0], weight, cos, sin), {}, r"x must be \[B, L, H, D\]"),
        ((x, weight[:64], cos, sin), {}, r"weight must be \[128\], got \[64\]"),
        ((x, weight, cos[:, 1:], sin), {}, r"cos must be \[1, 70, 32\], got \[1, 69, 32\]"),
        ((x, weight, cos, sin.repeat(2, 1, 1)), {}, r"sin must be \[1, 70, 32\]"),
        ((x, weight, cos, sin), {"block": 32}, "block must be 64 or 128, got 32"),
        ((x, weight, cos, sin), {"backend": "cuda"}, "backend 'cuda' is unknown"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(*arguments, **options)
    with pytest.raises(TypeError, match=r"cos must be float32, got torch\.float16"):
        prepare(x, weight, cos.half(), sin)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotates_in_place(dim, backend):
    x, weight, cos, sin = random_projection(2, 100, 2, dim, torch.float16)
    x = x.contiguous()
    apart = prepare(x, weight, cos, sin, block=64, quantize=True, backend=backend)
    before = x.clone()
    inside = prepare(x, weight, cos, sin, block=64, quantize=True, backend=backend, out=x)
    assert inside.rows is x and not torch.equal(x, before)
    assert torch.equal(inside.rows, apart.rows) and torch.equal(inside.means, apart.means)
    assert all(map(torch.equal, inside.blocks, apart.blocks))


def test_out_must_fit():
    x, weight, cos, sin = random_projection(1, 10, 2, 64, torch.float32)
    x = x.contiguous()
    with pytest.raises(ValueError, match=r"out must be \[1, 10, 2, 64\], got \[1, 9, 2, 64\]"):
        prepare(x, weight, cos, sin, out=x[:, :9])
    with pytest.raises(ValueError, match="out must be contiguous"):
        prepare(x, weight, cos, sin, out=x.transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_gives_the_linear_branch_in_place_of_the_rows(feature_map, backend):
    x, *angles = random_projection(2, 200, 3, 64, torch.float16)
    plain = prepare(x, *angles, quantize=True, backend="reference")
    values = torch.randn_like(plain.rows)
    state = key_value_state(plain.rows, values, feature_map, backend="reference")
    proj = torch.randn(64, 64, device=DEVICE) / 8, torch.randn(64, device=DEVICE)
    branch = LinearBranch(*state, *proj, feature_map)
    out = torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    found = prepare(x, *angles, quantize=True, backend=backend, out=out, branch=branch)
    assert found.linear is out and found.rows is None
    exact = linear_attention(plain.rows.float(), *branch, backend="reference")
    assert goldens.relative_error(out, exact) <= 1e-3
    assert goldens.relative_error(found.means, plain.means) <= 1e-3
    assert (found.blocks.integers.int() - plain.blocks.integers.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("own_angles", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 1, 1), (2, 300, 3), (2, 200, 11)])
def test_cuda_equals_triton(batch, length, heads, own_angles, block, quantize, dtype):
    if CARD != dispatch.HOPPER and CARD[0] not in dispatch.BY_MMA_SYNC:
        pytest.skip("needs a Hopper GPU or one of mma.sync")
    x, *angles = random_projection(batch, length, heads, 128, dtype, own_angles)
    arguments = x, *angles, 1e-6, block, quantize
    rows, out = (torch.empty_like(x.contiguous()) for _ in range(2))
    expected = triton_kernels.prepare(*arguments, rows, None)
    found = cuda.prepare(*arguments, out, None)
    # Fused multiply-adds round a few rotated numbers the other way.
    assert goldens.relative_error(out, rows) <= 2e-4
    assert goldens.relative_error(found[0], expected[0]) <= 1e-4
    if quantize:
        differ = (found[1].int() - expected[1].int()).abs()
        assert differ.max() <= 1
        assert differ.float().mean() <= 1e-3
        torch.testing.assert_close(found[2], expected[2], atol=0, rtol=8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 1, 1), (2, 300, 3), (2, 200, 11)])
def test_cuda_makes_the_linear_branch(batch, length, heads, block, quantize, dtype):
    if CARD != dispatch.HOPPER and CARD[0] not in dispatch.BY_MMA_SYNC:
        pytest.skip("needs a Hopper GPU or one of mma.sync")
    if CARD == dispatch.HOPPER and dtype == torch.float16:
        pytest.skip("on Hopper Triton's kernel makes it in float16")
    x, *angles = random_projection(batch, length, heads, 128, dtype)
    arguments = x, *angles, 1e-6, block, quantize
    rows, out = (torch.empty_like(x.contiguous()) for _ in range(2))
    triton_kernels.prepare(*arguments, rows, None)
    state = key_value_state(rows, torch.randn_like(rows))
    proj = torch.randn(128, 128, device=DEVICE) / 11, torch.randn(128, device=DEVICE)
    branch = LinearBranch(*state, *proj)
    exact = linear_attention(rows.float(), *branch, backend="reference")
    cuda.prepare(*arguments, out, branch)
    assert goldens.relative_error(out, exact) <= 6e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float16_keeps_small_sums_of_the_linear_branch(dtype, monkeypatch):
    """Of which the kernel of Hopper alone would lose bits, so it does not take them."""
    x, _, cos, sin = random_projection(1, 70, 2, 128, dtype)
    branch = LinearBranch(*(torch.zeros(1, device=DEVICE) for _ in range(4)))
    for card, refuses in ((dispatch.HOPPER, dtype == torch.float16), ((8, 9), False)):
        monkeypatch.setattr(cuda, "capability", lambda device, card=card: card)
        assert cuda.unfit(x, cos, sin, x, None) is None
        assert bool(cuda.unfit(x, cos, sin, x, branch)) == refuses


@pytest.mark.gpu
def test_long_videos_do_not_overflow_float16():
    """A channel's normalizer, a sum over all keys, may exceed float16's 65504."""
    length = 70000
    x, *angles = random_projection(1, length, 1, 128, torch.float16)
    normalizer = torch.full((1, 1, 128), 1e3, device=DEVICE)
    normalizer[..., 3] = 69000  # a key adds at most 1
    state = normalizer[..., None] * torch.randn(1, 1, 128, 128, device=DEVICE)
    proj = torch.eye(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    branch = LinearBranch(state, normalizer, *proj)
    plain = prepare(x, *angles, quantize=True)
    exact = linear_attention(plain.rows.float(), *branch, backend="reference")
    found = prepare(x, *angles, quantize=True, branch=branch)
    assert goldens.relative_error(found.linear, exact) <= 2e-3


@pytest.mark.parametrize("linear", [False, True], ids=["rows", "linear"])
def test_two_programs_share_a_multiprocessor_of_100_kb(linear):
    """Without cosines and sines in shared memory; all cards of mma.sync have that much."""
    shared = cuda.shared_bytes(cuda.ROWS, False, linear)
    assert 2 * (shared + 1024) <= 100 * 1024


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_some_heads_are_prepared_by_the_norm_over_all(backend, dtype):
    """As a rank does that has some heads: the sums of all make the norms of the whole rows."""
    x, weight, cos, sin = random_projection(2, 70, 5, 64, dtype)
    x[:, :, :2] *= 4  # so that the norm over the others alone is another
    whole = prepare(x, weight, cos, sin, block=64, quantize=True, backend=backend)
    sums = torch.cat([square_sums(x[:, :, h], backend) for h in (slice(2), slice(2, 5))], -1)
    assert torch.equal(sums, square_sums(x, backend))
    torch.testing.assert_close(sums.double(), x.double().square().sum(-1), atol=0, rtol=1e-6)
    norms = norms_of_squares(sums.mT, weight.numel(), backend=backend)
    heads = slice(2, 5)
    own = x[:, :, heads], weight.view(5, 64)[heads].flatten(), cos, sin
    found = prepare(*own, block=64, quantize=True, row_norms=norms, backend=backend)
    eps = 2 * torch.finfo(dtype).eps
    if backend == "triton":  # the reference's norm is one float32 sum
        assert torch.equal(found.rows, whole.rows[:, :, heads])
        assert torch.equal(found.means, whole.means[:, heads])
        assert torch.equal(found.blocks.integers, whole.blocks.integers[:, heads])
    assert goldens.relative_error(found.rows, whole.rows[:, :, heads]) <= eps
    without = prepare(*own, block=64, backend=backend)
    assert goldens.relative_error(without.rows, whole.rows[:, :, heads]) > 10 * eps


def test_row_norms_must_fit():
    arguments = random_projection(1, 10, 2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"row_norms must be \[1, 10\], got \[10\]"):
        prepare(*arguments, row_norms=torch.ones(10, device=DEVICE))
