"""SageSLA by mma.sync: what it reads, that it errs like the reference, and what it compiles to."""

import math

import ahead_of_time
import goldens
import pytest
import torch
from attention import exact_sparse, random_map, random_qkv
from devices import BATCHES, DEVICE, LENGTHS
from turbodiffusion_pack.kernels import nvrtc
from turbodiffusion_pack.kernels.dispatch import capability, has_fp8
from turbodiffusion_pack.kernels.sparse_attention import PV_DTYPES, mma, reference
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse_triton

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"no NVRTC: {nvrtc.unavailable()}"
)
PV = ("fp16", pytest.param("fp8", marks=pytest.mark.gpu))  # the interpreter cuts fp8 off
SHARED_OF_CARD = 102400  # bytes of a multiprocessor of sm_86, sm_89 and sm_120
RESERVED = 1024  # of it, for each program
LARGEST_FLOAT16 = 65504


def need_fp8(pv):
    if pv == "fp8" and not has_fp8(torch.device(DEVICE)):
        pytest.skip("needs an NVIDIA GPU of sm_89 or newer")


def swizzled(rows):
    """Bytes [..., rows, width], whose chunks of 16 trade places within every 128 bytes."""
    count, width = rows.shape[-2:]
    row = torch.arange(count, device=rows.device)
    chunk = torch.arange(width // 16, device=rows.device)
    turn = row * width // 128 % (width // 16)
    place = chunk ^ turn[:, None]  # its own inverse
    return rows.unflatten(-1, (-1, 16))[..., row[:, None], place, :].flatten(-2)


def bytes_of(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("dim", [64, 128])
def test_quantizes_to_what_ldmatrix_reads(dim, pv, monkeypatch):
    need_fp8(pv)
    monkeypatch.setattr(reference, "VALUE_LIMIT", mma.VALUE_LIMIT)
    q, k, v = random_qkv(2, 200, 2, dim, torch.float16)
    arguments = q, k, v, k.float().mean(1), PV_DTYPES[pv], 128, 64
    found, expected = mma.quantize(*arguments), reference.quantize(*arguments)
    assert torch.equal(found.q, expected.q)
    keys = bytes_of(expected.k).unflatten(2, (-1, 64))
    assert torch.equal(bytes_of(found.k).unflatten(2, (-1, 64)), swizzled(keys))
    values = bytes_of(expected.v)
    if pv == "fp8":
        # A thread's weights of 16 keys: two of the first eight, two of the last.
        order = [8 * h + 2 * t + e for t in range(4) for h in range(2) for e in range(2)]
        values = values.unflatten(-1, (-1, 16))[..., order].flatten(-2)
    assert torch.equal(bytes_of(found.v), swizzled(values))
    torch.testing.assert_close(found.v_scale, expected.v_scale, atol=0, rtol=1e-6)


@pytest.mark.parametrize("degrees", [3.0, 5.0, 100.0])
def test_room_above_a_sample_costs_e4m3_next_to_nothing(degrees):
    """Between VALUE_LIMIT and 2^-6 all numbers have as many bits, and few values are below."""
    torch.manual_seed(0)
    v = torch.distributions.StudentT(degrees).sample((30000, 16))
    highest = v.abs().amax(0)

    def error(bound):
        factor = mma.VALUE_LIMIT / bound.clamp_min(highest)
        values = (v * factor).to(torch.float8_e4m3fn).float() / factor
        return goldens.relative_error(values, v)

    bound = sparse_triton.HEADROOM * v[:512].abs().amax(0)
    assert error(bound) <= 1.02 * error(highest)


def attend(q, k, v, block_map, pv, out, add=False):
    operands = mma.quantize(q, k, v, k.float().mean(1), PV_DTYPES[pv], 128, 64)
    return mma.sage_attention(operands, block_map, out, add)


def errors(q, k, v, block_map, pv):
    """Of the kernel and of the reference, and the kernel's output."""
    exact = exact_sparse(q, k, v, block_map)
    arguments = q, k, v, k.float().mean(1), PV_DTYPES[pv], 128, 64
    room = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    plain = reference.sage_attention(reference.quantize(*arguments), block_map, room, False)
    out = attend(q, k, v, block_map, pv, torch.empty(q.shape, dtype=q.dtype, device=q.device))
    return goldens.relative_error(out, exact), goldens.relative_error(plain, exact), out


def need_a_gpu_that_compiles():
    if nvrtc.unavailable() or capability(torch.device(DEVICE)) < (8, 0):
        pytest.skip("needs NVRTC and a GPU of sm_80 or newer")


@pytest.mark.gpu
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(128, torch.bfloat16), (128, torch.float16), (64, torch.float16)],
    ids=["128 bf16", "128 fp16", "64 fp16"],
)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("length", "share"),
    [(length, 0.4) for length in LENGTHS] + [(1000, 0.01), (4000, 1.0), (4096, 1.0), (4100, 0.5)],
)
def test_errs_like_the_reference(length, share, batch, dim, dtype, pv):
    need_a_gpu_that_compiles()
    need_fp8(pv)
    q, k, v = random_qkv(batch, length, 3, dim, dtype)
    block_map = random_map(batch, length, 3, 128, 64, share)
    error, of_reference, out = errors(q, k, v, block_map, pv)
    # It rounds the weights against another reference than their maximum.
    assert error <= max(1.1 * of_reference, 1e-3)
    there = torch.randn(q.shape, dtype=dtype, device=DEVICE)
    both = out.double() + there.double()
    assert attend(q, k, v, block_map, pv, there, add=True) is there
    assert goldens.relative_error(there, both) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("sharpness", [4, 12])
def test_takes_sharp_attention(sharpness, pv):
    """Scores that grow from block to block raise the rows' reference again and again."""
    need_a_gpu_that_compiles()
    need_fp8(pv)
    q, k, v = random_qkv(1, 4000, 2, 128, torch.bfloat16)
    growth = torch.linspace(0.1, 1, 4000, device=DEVICE)[None, :, None, None]
    q, k = q * sharpness, (k * growth).to(k.dtype)
    error, of_reference, _ = errors(q, k, v, random_map(1, 4000, 2, 128, 64, 1.0), pv)
    assert error <= 1.1 * of_reference


@pytest.mark.gpu
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("excess", [0, 2.9, 3.9, 7])
def test_full_sums_do_not_overflow(excess, pv):
    """All values the largest, and weights 2^excess times those of the first block: a factor of 2^3
    does not raise their rows' reference yet, in fp8 2^0.8."""
    need_a_gpu_that_compiles()
    need_fp8(pv)
    v = torch.full((1, 4100, 2, 128), 3.0, dtype=torch.float16, device=DEVICE)
    q, k = torch.ones_like(v), torch.full_like(v, excess / reference.score_scale(v) / 128)
    k[:, :64] = 0
    out = attend(q, k, v, random_map(1, 4100, 2, 128, 64, 1.0), pv, torch.empty_like(v))
    torch.testing.assert_close(out, v, atol=0, rtol=1e-3)


@pytest.mark.gpu
def test_writes_where_16_bytes_are_not_one():
    need_a_gpu_that_compiles()
    q, k, v = random_qkv(1, 130, 2, 64, torch.float16)
    block_map = random_map(1, 130, 2, 128, 64)
    expected = attend(q, k, v, block_map, "fp16", torch.zeros_like(q, dtype=q.dtype).contiguous())
    shifted = torch.zeros(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view(q.shape)
    attend(q, k, v, block_map, "fp16", shifted)
    assert torch.equal(shifted, expected)


def fp16_sums(summands, length):
    """Sums of [..., N] that are float16 over `length` summands, 32 at a time, float32 beyond."""
    total = torch.zeros(summands.shape[:-1])
    for chain in summands.split(length, -1):
        short = torch.zeros(summands.shape[:-1], dtype=torch.float16)
        for step in chain.split(32, -1):
            short = (short.float() + step.sum(-1)).half()
        total += short.float()
    return total


def test_why_sums_are_as_short_as_a_block():
    """Of values that have a mean, a long float16 sum loses what it adds; and it overflows."""
    torch.manual_seed(0)
    weights = torch.randn(256, 3264).mul(1.4).exp2() * 16
    values = (torch.randn(256, 3264) + 1) * (mma.VALUE_LIMIT / 5)
    products, exact = weights * values, (weights.double() * values.double()).sum(-1)

    def error(length, scale=1.0):
        found = fp16_sums(products * scale, length) / scale
        return ((found - exact).norm() / exact.norm()).item()

    assert error(mma.SHAPE[1]) <= 1e-4  # rounding to int8 and to fp8 costs 1.9e-2 and 4.4e-2
    assert not math.isfinite(error(3264))
    assert error(3264, 2.0**-6) >= 10 * error(mma.SHAPE[1])  # even where nothing overflows


@needs_nvrtc
@pytest.mark.parametrize(("pv", "limit", "too_large"), [("fp8", 448, 35), ("fp16", 2048, 8)])
def test_larger_values_would_overflow_and_do_not_compile(pv, limit, too_large):
    card = 8, 9
    constants = mma.constants(card, 128, pv, torch.bfloat16)
    sizes = mma.shared_bytes(128, pv), mma.Operands
    weights = 4 * limit * 17 / 16  # of the four threads of a row
    assert weights * mma.VALUE_LIMIT < LARGEST_FLOAT16 < weights * too_large
    with pytest.raises(RuntimeError, match="static assertion failed"):
        nvrtc.compile_file(mma.SOURCE, "sm_89", *sizes, **constants | {"VALUE_LIMIT": too_large})


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("dim", mma.HEAD_DIMS)
def test_two_programs_share_a_multiprocessor(dim, pv):
    assert 2 * (mma.shared_bytes(dim, pv) + RESERVED) <= SHARED_OF_CARD


@needs_nvrtc
@pytest.mark.parametrize(("pv", "product"), [("fp8", "HMMA.16816.F16"), ("fp16", "HMMA.16816.F32")])
def test_played_on_hopper_fp8_is_emulated(pv, product):
    """Its tensor cores take fp8 by wgmma only."""
    constants = mma.constants((9, 0), 128, pv, torch.bfloat16)
    sizes = mma.shared_bytes(128, pv), mma.Operands
    binary = nvrtc.compile_file(mma.SOURCE, "sm_90", *sizes, **constants)
    assert ahead_of_time.machine_products("sm_90", binary) == {"IMMA.16832.S8.S8", product}
