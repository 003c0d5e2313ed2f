"""INT8 weights from block scales to one scale per output channel."""

import goldens
import pytest
import torch
from devices import DEVICE
from turbodiffusion_pack.kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
)
from turbodiffusion_pack.kernels.requantize import mma, requantize_rows, requantize_rows_of


def _weight(n, k):
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    return weight.to(DEVICE)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (130, 300), (257, 1000)])
def test_equals_quantizing_what_the_blocks_stand_for(n, k):
    q, scale = quantize_blocks(_weight(n, k))
    exact = (
        q.double() * scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    )
    amax = exact.abs().amax(1, keepdim=True).clamp_min(1e-8)
    found, row_scale = requantize_rows(q, scale, backend="reference")
    steps = exact * 128 / amax
    assert ((found.double() - steps).abs() <= 0.5 + 1e-4).logical_or(found == 127).all()
    torch.testing.assert_close(row_scale.double(), amax[:, 0] / 128, rtol=1e-6, atol=0)


def test_costs_less_than_another_rounding():
    weight = _weight(256, 2048)
    blocks = quantize_blocks(weight)
    before = goldens.relative_error(dequantize_blocks(*blocks, torch.float32), weight)
    after = goldens.relative_error(
        dequantize_rows(*requantize_rows(*blocks), torch.float32), weight
    )
    assert before < after < 1.4 * before


@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 300), (64, 2048)])
def test_triton_gives_the_same_integers(n, k):
    operands = quantize_blocks(_weight(n, k))
    found = requantize_rows(*operands, backend="triton")
    expected = requantize_rows(*operands, backend="reference")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [304, 1536, 5120, 8960, 13824])
def test_weights_of_models_get_the_same_integers(columns):
    """As CUDA C++ divides rows among threads, some of them apart in memory."""
    q, scale = quantize_blocks(_weight(1100, columns))
    apart = torch.empty(1100, columns + 16, dtype=torch.int8, device=DEVICE)[:, :columns].copy_(q)
    expected = requantize_rows(q, scale, backend="reference")
    for weight in (q, apart):
        found = requantize_rows(weight, scale, backend="triton")
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("columns", [16, 304, 1536, 5120, 8960, 13824, 36864])
def test_a_programs_threads_hold_a_row_in_cuda(columns):
    warps, each, programs = mma.shape_of_program(columns)
    assert each <= mma.MOST and warps <= mma.MOST_WARPS
    assert (each - 1) * 32 * warps * mma.CHUNK < columns <= each * 32 * warps * mma.CHUNK
    assert programs * 32 * warps * (5 * each + 46) <= 65536


@pytest.mark.parametrize("rows", [1, 7, 1848, 1849, 5120, 13824])
def test_programs_in_cuda_take_as_many_rows(rows):
    programs = mma.programs_of(rows, 14 * 132)
    turns = -(-rows // (14 * 132))
    assert programs <= 14 * 132 and programs * turns >= rows > (programs - 1) * turns


def test_weights_that_cuda_does_not_take():
    q = torch.zeros(4, 320, dtype=torch.int8)
    assert mma.unfit(q) is mma.unfit(q[:, :304]) is None
    assert "of 300 numbers" in mma.unfit(q[:, :300])
    assert "of 40960 numbers" in mma.unfit(torch.zeros(1, 40960, dtype=torch.int8))
    assert "multiples of 16 bytes" in mma.unfit(q[:, 8:24])
    assert "multiples of 16 bytes" in mma.unfit(torch.zeros(320, 16, dtype=torch.int8).mT[:, :16])


def test_zero_weights():
    q, scale = requantize_rows(*quantize_blocks(torch.zeros(130, 130, device=DEVICE)))
    assert not q.any() and scale.isfinite().all()


def test_scales_that_do_not_fit():
    q, scale = quantize_blocks(_weight(130, 300))
    with pytest.raises(ValueError, match=r"got \[130, 300\] with \[1, 3\]"):
        requantize_rows(q, scale[:1])
    with pytest.raises(TypeError, match=r"q must be int8, got torch\.float32"):
        requantize_rows(q.float(), scale)
    requantize_rows(q, scale)
    with pytest.raises(TypeError, match=r"scale must be float32, got torch\.bfloat16"):
        requantize_rows(q, scale.bfloat16())


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_weights_at_once_are_those_one_by_one(backend, count):
    weights = [quantize_blocks((i + 1) * _weight(130, 300)) for i in range(count)]
    transposed = weights[-1][0].mT.contiguous().mT  # another layout of the same
    weights[-1] = transposed, weights[-1][1]
    found = requantize_rows_of(weights, backend=backend)
    assert len(found) == count
    for made, weight in zip(found, weights, strict=True):
        assert all(map(torch.equal, made, requantize_rows(*weight, backend=backend)))


def test_weights_that_do_not_go_together():
    weight, other = quantize_blocks(_weight(130, 300)), quantize_blocks(_weight(128, 128))
    with pytest.raises(ValueError, match=r"one shape, got \[130, 300\] and \[128, 128\]"):
        requantize_rows_of([weight, other])
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"takes 1 to 6 weights, got {count}"):
            requantize_rows_of([weight] * count)
    with pytest.raises(ValueError, match=r"got \[130, 300\] with \[1, 3\]"):
        requantize_rows_of([weight, (weight[0], weight[1][:1])])
