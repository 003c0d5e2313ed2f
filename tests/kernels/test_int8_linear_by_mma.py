"""INT8 linear by mma.sync: its operands, what it compiles to, and on a GPU what it gives."""

import ahead_of_time
import cuda_kernels
import goldens
import pytest
import torch
from ahead_of_time import CARDS, GRANULARITIES, SHARED_LIMIT
from cuda_kernels import captured, launch_linear, zeros
from devices import CARD, DEVICE
from turbodiffusion_pack.kernels import dispatch, nvrtc, tuning
from turbodiffusion_pack.kernels.int8_linear import (
    int8_linear,
    int8_linear_and_squares,
    mma,
    triton_kernels,
)
from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"no NVRTC: {nvrtc.unavailable()}"
)
QUANTIZERS = {"rows": quantize_rows, "blocks": quantize_blocks}
DTYPES = torch.bfloat16, torch.float16
ADA = 8, 9
SHARED_OF_PROGRAM = 1024  # bytes of a multiprocessor that each program takes besides its own


@pytest.fixture
def by_mma(monkeypatch):
    """Only the CUDA kernel may run, and has to."""
    if CARD[0] not in dispatch.BY_MMA_SYNC or nvrtc.unavailable():
        pytest.skip("the CUDA kernel needs a GPU of mma.sync, see --card, and NVRTC")
    launched, linear = [], mma.linear
    monkeypatch.setattr(mma, "linear", lambda *a: launched.append(a) or linear(*a))
    monkeypatch.setattr(triton_kernels, "linear", None)
    yield
    assert launched


def random_operands(batch, length, k, n, granularity):
    """x_q, x_scale, w_q, w_scale as int8_linear takes them."""
    quantize = QUANTIZERS[granularity]
    x = torch.randn(batch, length, k, device=DEVICE) * torch.rand(batch, length, 1, device=DEVICE)
    w = torch.randn(n, k, device=DEVICE) * torch.rand(n, 1, device=DEVICE)
    return *quantize(x, backend="reference"), *quantize(w, backend="reference")


def random_gate(batch, n):
    """One of six vectors of a modulation: strided along the batch."""
    return torch.randn(batch, 6, n, device=DEVICE)[:, 2:3]


# Less than a step and a tile, a bit more, a program's several tiles, columns that end inside of a
# warp's, more steps than stages, and such that copies turn to the next tile where scales are read.
SHAPES = (
    (1, 1, 16, 8),
    (1, 129, 144, 264),
    (1, 20001, 272, 1528),
    (3, 4000, 1536, 1536),
    (2, 255, 5120, 200),
    (1, 700, 208, 136),
    (1, 300, 4224, 136),
    (1, 300, 4480, 136),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "k", "n"), SHAPES)
@pytest.mark.parametrize("epilogue", ("", "gate", "residual", "gate residual"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equals_the_reference(granularity, dtype, epilogue, batch, length, k, n, by_mma):
    operands = random_operands(batch, length, k, n, granularity)
    options = {"out_dtype": dtype}
    if "gate" in epilogue:
        options["gate"] = random_gate(batch, n)
    if "residual" in epilogue:
        options["residual"] = torch.randn(batch, length, n, device=DEVICE).to(dtype)
    for bias in (None, torch.randn(n, device=DEVICE, dtype=dtype)):
        y = int8_linear(*operands, bias, **options)
        expected = int8_linear(*operands, bias, **options, backend="reference")
        assert y.dtype == dtype
        # Both round once, and may do so differently where they are off by the last bit of float32.
        bound = 1e-3 if dtype == torch.bfloat16 else 1e-4
        assert goldens.relative_error(y, expected) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_writes_into_the_residual_and_nothing_beside_it(granularity, by_mma):
    operands = random_operands(2, 4000, 1536, 520, granularity)
    residual = torch.randn(2, 4096, 768, device=DEVICE).bfloat16()
    gate, inner = random_gate(2, 768)[..., :520], residual[:, :4000, :520]
    expected = int8_linear(*operands, gate=gate, residual=inner, backend="reference")
    outside = residual.clone()
    int8_linear(*operands, gate=gate, residual=inner, out=inner)
    assert goldens.relative_error(inner, expected) <= 1e-3
    outside[:, :4000, :520] = inner
    assert torch.equal(residual, outside)


@pytest.mark.gpu
def test_sums_are_exact_over_the_longest_k(by_mma):
    x = torch.full((1, 8, 131056), 127, dtype=torch.int8, device=DEVICE)
    w = torch.full((8, 131056), -128, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(8, device=DEVICE)
    y = int8_linear(x, ones[None] * 2.0**-20, w, ones)
    assert y.eq(torch.tensor(-127 * 128 * 131056 * 2.0**-20).bfloat16().item()).all()


@pytest.mark.gpu
def test_sums_of_a_block_are_exact_at_their_largest(by_mma):
    """They share 23 bits with what they are added to: 128 products of 16384 are 2^21."""
    x = torch.full((1, 8, 256), -128, dtype=torch.int8, device=DEVICE)
    w = torch.full((8, 256), -128, dtype=torch.int8, device=DEVICE)
    w[1::2, :128], w[1::2, 127] = 127, 126  # near -2^21
    x_scale, w_scale = torch.ones(1, 1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    x_scale[..., 1] = 0
    bias = torch.zeros(8, device=DEVICE, dtype=torch.bfloat16)
    # A residual that takes most of it away leaves what bfloat16 can tell.
    exact = x[..., :128].double() @ w[:, :128].double().mT
    residual = -exact.bfloat16()
    y = int8_linear(x, x_scale, w, w_scale, bias, residual=residual)
    assert torch.equal(y.double(), exact + residual.double())


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "warps"), [(1, 1, 3), (2, 129, 9), (3, 4001, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adds_up_the_squares_of_rows(granularity, dtype, batch, length, warps, by_mma):
    columns = tuning.linear_tile(CARD, granularity == "blocks").warp_n
    n = warps * columns
    operands = random_operands(batch, length, 1536, n, granularity)
    bias = torch.randn(n, device=DEVICE, dtype=dtype)
    y, squares = int8_linear_and_squares(*operands, bias, dtype)
    assert squares.shape == (batch, warps, length)
    assert torch.equal(y, int8_linear(*operands, bias, dtype))
    expected = y.double().square().unflatten(2, (-1, columns)).sum(-1).mT
    # Of what is not rounded yet: a square is off by eps at most.
    torch.testing.assert_close(squares.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adds_up_no_squares_of_parts_of_a_warps_columns(granularity, by_mma):
    operands = random_operands(1, 300, 144, 264, granularity)
    y, squares = int8_linear_and_squares(*operands)
    assert squares is None and torch.equal(y, int8_linear(*operands))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_squares_have_room_for_every_warps_columns(granularity, monkeypatch):
    launches = captured(monkeypatch, ADA)
    x, w = zeros(2, 70, 128, dtype=torch.int8), zeros(1536, 128, dtype=torch.int8)
    by_blocks = granularity == "blocks"
    scales = (zeros(2, 1, 1), zeros(12, 1)) if by_blocks else (zeros(2, 70), zeros(1536))
    _, squares = int8_linear_and_squares(x, scales[0], w, scales[1], backend="triton")
    found = launches[-1]
    assert found.operands.squares == squares.data_ptr()
    assert squares.shape == (2, 1536 // dict(found.constants)["WARP_N"], 70)
    int8_linear(x, scales[0], w, scales[1], backend="triton")
    assert launches[-1].operands.squares is None


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_strided_rows(granularity, by_mma):
    x_q, x_scale, w_q, w_scale = random_operands(3, 66, 144, 24, granularity)
    wide_x = torch.randint(-128, 128, (66, 3, 208), dtype=torch.int8, device=DEVICE)
    wide_x[..., :144] = x_q.transpose(0, 1)
    wide_w = torch.randint(-128, 128, (24, 160), dtype=torch.int8, device=DEVICE)
    wide_w[:, :144] = w_q
    y = int8_linear(wide_x[..., :144].transpose(0, 1), x_scale, wide_w[:, :144], w_scale)
    expected = int8_linear(x_q, x_scale, w_q, w_scale, backend="reference")
    assert goldens.relative_error(y, expected) <= 1e-3


@pytest.mark.parametrize("samples", [3, 4])
def test_what_32_bits_do_not_reach_is_left_to_triton(samples):
    """The kernel reckons x's and w's bytes from their first ones."""
    meta = {"device": "meta"}
    x = torch.empty_strided((samples, 64, 144), (2**31 - 2**20, 144, 1), dtype=torch.int8, **meta)
    w, out = x[0, :8], torch.empty(samples, 64, 8, dtype=torch.bfloat16, **meta)
    scales = torch.empty(samples, 64, **meta), torch.empty(8, **meta)
    found = mma.unfit(x, scales[0], w, scales[1], None, None, None, out)
    assert found == (None if samples == 3 else "x or w spans more than 4 GiB")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_k_of_whole_16_bytes_alone(granularity):
    x, w = (zeros(*rows, 208, dtype=torch.int8) for rows in ((1, 64), (8,)))
    by_blocks = granularity == "blocks"
    x_scale, w_scale = (zeros(1, 1, 2), zeros(1, 2)) if by_blocks else (zeros(1, 64), zeros(8))
    rest = None, None, None, zeros(1, 64, 8, dtype=torch.bfloat16)
    assert mma.unfit(x, x_scale, w, w_scale, *rest) is None
    found = mma.unfit(x[..., :200], x_scale, w[:, :200], w_scale, *rest)
    assert found == "K is not a multiple of 16"


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reads_no_row_beyond_the_last(granularity, by_mma):
    """Rows are 16 MB apart, and beyond the last there is no memory: to read it ends all tests."""
    apart = 2**24
    torch.cuda.empty_cache()
    x_q, x_scale, w_q, w_scale = random_operands(1, 1, 272, 8, granularity)
    far_x = x_q.as_strided((1, 1, 272), (apart, apart, 1))
    far_w = torch.zeros(7 * apart + 272, dtype=torch.int8, device=DEVICE)
    far_w = far_w.as_strided((8, 272), (apart, 1)).copy_(w_q)
    y = int8_linear(far_x, x_scale, far_w, w_scale)
    torch.cuda.synchronize()
    expected = int8_linear(x_q, x_scale, w_q, w_scale, backend="reference")
    assert goldens.relative_error(y, expected) <= 1e-3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_operands_say_what_was_given(granularity, monkeypatch):
    (*_, launch), x, w, gate, residual, out = launch_one(granularity, monkeypatch)
    found = launch.operands
    pointers = found.x, found.w, found.gate, found.residual, found.out
    assert pointers == tuple(t.data_ptr() for t in (x, w, gate, residual, out))
    assert found.bias is None
    assert (found.batch, found.length, found.n, found.k) == (2, 70, 256, 144)
    assert (found.x_b, found.x_l, found.w_n) == (70 * 160, 160, 176)
    strides = found.gate_b, found.residual_b, found.residual_l, found.out_b, found.out_l
    assert strides == (1536, 70 * 256, 256, 70 * 256, 256)
    assert dict(launch.constants)["BLOCKS"] == (granularity == "blocks")


def launch_one(granularity, monkeypatch):
    """Launches as sm_89 would get them, and the tensors of the last one."""
    launches = captured(monkeypatch, ADA)
    x = zeros(2, 70, 160, dtype=torch.int8)[..., :144]
    w = zeros(256, 176, dtype=torch.int8)[:, :144]
    residual, gate = zeros(2, 70, 256, dtype=torch.bfloat16), zeros(2, 6, 256)[:, 1:2]
    scales = (zeros(2, 70), zeros(256)) if granularity == "rows" else (zeros(2, 1, 2), zeros(2, 2))
    out = int8_linear(x, scales[0], w, scales[1], gate=gate, residual=residual, backend="triton")
    return launches, x, w, gate, residual, out


@pytest.mark.parametrize("card", CARDS, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_programs_that_share_a_multiprocessor_fit_its_memory(granularity, card):
    tile = tuning.linear_tile(card, granularity == "blocks")
    shared = mma.shared_bytes(tile, granularity == "blocks") + SHARED_OF_PROGRAM
    assert tile.programs * shared <= SHARED_LIMIT[card] + SHARED_OF_PROGRAM


@needs_nvrtc
@pytest.mark.parametrize("card", [(9, 0), (10, 0)], ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("played", tuning.MMA_LINEAR, ids="sm_{0[0]}{0[1]}".format)
def test_data_center_cards_can_play_the_others(played, granularity, card):
    """What is launched on those others themselves, test_nvrtc.py compiles."""
    by_blocks = granularity == "blocks"
    tile = tuning.linear_tile(played, by_blocks)
    constants = mma.constants(tile, None if by_blocks else (True, False), torch.bfloat16)
    sizes = mma.shared_bytes(tile, by_blocks), mma.Operands, tuple(constants.items())
    target = "sm_{}{}".format(*card)
    built = cuda_kernels.built(mma.SOURCE, target, *sizes)
    assert built.registers * tile.threads * tile.programs <= 65536
    assert built.spilled <= cuda_kernels.LINEAR_SPILLS
    assert ahead_of_time.machine_products(target, built.binary) == {"IMMA.16832.S8.S8"}


@needs_nvrtc
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ptx_of_an_older_card_is_what_a_newer_one_plays(granularity, monkeypatch):
    launches = captured(monkeypatch, ADA)
    launch_linear(torch.bfloat16, granularity)
    source, _, *sizes, constants = launches[-1].built
    ptx = nvrtc.compile_file(source, "compute_89", *sizes, **dict(constants)).decode()
    assert ".target sm_89" in ptx
    assert set(ahead_of_time.MATRIX_INSTRUCTION.findall(ptx)) == {
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    }
