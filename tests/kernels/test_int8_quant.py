"""INT8 quantization: goldens, the float64 formula, and Triton's integers equal to torch's."""

import goldens
import pytest
import torch
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    mma,
    quantize_blocks,
    quantize_rows,
)

QUANTIZERS = (quantize_blocks, quantize_rows)
BACKENDS = ("reference", "triton")

# The original divides 128 / amax with the GPU's fast division. Ours is IEEE, the same on every
# device. Of all golden blocks these, at (row, column), got the neighbouring float, which turns
# 1 to 3 exact halves the other way.
ONE_ULP_OFF = {
    "linear1.x": ((256, 128, 0.0),),
    "linear2.x": ((0, 0, torch.inf),),
    "linear2.w": ((0, 128, torch.inf),),
}


def random_input(*shape, dtype=torch.float32):
    """Gaussian with a few outliers, so that the blocks' scales differ."""
    x = torch.randn(shape)
    return (x * (1 + 20 * (torch.rand(shape) < 0.01))).to(DEVICE, dtype)


def exact_amax(x, block):
    """max(|x|, 1e-8) of every block in float64, spread over the block's elements."""
    amax = torch.empty_like(x, dtype=torch.float64)
    row_step, column_step = block
    for r in range(0, x.shape[-2], row_step):
        for c in range(0, x.shape[-1], column_step):
            area = (..., slice(r, r + row_step), slice(c, c + column_step))
            amax[area] = x[area].double().abs().amax((-2, -1), keepdim=True).clamp_min(1e-8)
    return amax


def test_fresh_memory_is_poisoned():
    assert torch.empty(4).isnan().all()
    assert (torch.empty_like(torch.zeros(4, dtype=torch.int32)) == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("x", "w"))
@pytest.mark.parametrize("case", ("linear0", "linear1", "linear2"))
def test_blocks_equal_the_originals(case, name, backend):
    """All integers, once 128 / amax is moved by an ulp where the original's was (see above)."""
    data = goldens.load("operators")
    x, golden = data[f"{case}.{name}"].float(), data[f"{case}.{name}_q"]
    q, scale = quantize_blocks(x.to(DEVICE), backend=backend)
    torch.testing.assert_close(scale.cpu(), data[f"{case}.{name}_s"], rtol=1e-6, atol=0)
    q = q.cpu()
    assert (q != golden).sum() <= 3
    for row, column, towards in ONE_ULP_OFF.get(f"{case}.{name}", ()):
        area = slice(row, row + 128), slice(column, column + 128)
        inverse = (128 / x[area].abs().max()).nextafter(torch.tensor(towards))
        q[area] = (x[area] * inverse).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(q, golden)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("quantize", "area"), [(quantize_blocks, (128, 128)), (quantize_rows, (1, 200))]
)
def test_reference_follows_the_formula(quantize, area, length, batch):
    x = random_input(batch, length, 200)
    q, scale = quantize(x, backend="reference")
    amax = exact_amax(x, area)
    exact = (x.double() * 128 / amax).clamp(-128, 127)
    assert (q - exact).abs().max() <= 0.5 + 1e-4
    expected = amax[:, :: area[0], :: area[1]] / 128
    torch.testing.assert_close(scale.double(), expected.reshape(scale.shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_halves_round_to_even_and_the_ends_clamp(quantize, backend):
    values = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, 128.0, -128.0]
    q, scale = quantize(torch.tensor([values], device=DEVICE), backend=backend)
    assert q.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127, -128, 127, -128]]
    assert scale.flatten().tolist() == [1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize(
    ("values", "expected"),
    (
        ([2.5625, 0.070068359375, 0.150146484375], [127, 3, 7]),
        ([2.609375, 0.13250732421875, 0.29559326171875], [127, 7, 15]),
    ),
)
def test_multiplies_by_the_inverse(quantize, values, expected, backend):
    """Ties of exact maths: dividing by the scale gives 4 and 8, then 6 and 14."""
    q, _ = quantize(torch.tensor([values], device=DEVICE), backend=backend)
    assert q.tolist() == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize(("value", "expected"), ((0.0, 0), (3.0, 127), (-3.0, -128)))
def test_equal_inputs(quantize, value, expected, backend):
    q, scale = quantize(torch.full((3, 65, 130), value, device=DEVICE), backend=backend)
    assert (q == expected).all()
    torch.testing.assert_close(scale, torch.full_like(scale, max(abs(value), 1e-8) / 128))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_samples_do_not_share_blocks(quantize, backend):
    x = random_input(2, 2, 130, 24) * torch.rand(2, 2, 1, 1, device=DEVICE)
    q, scale = quantize(x, backend=backend)
    for i in range(2):
        for j in range(2):
            alone_q, alone_scale = quantize(x[i, j], backend="reference")
            assert torch.equal(q[i, j], alone_q)
            assert torch.equal(scale[i, j], alone_scale)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("shape", ((1, 8), (63, 65), (3, 129, 200), (2, 1100)))
def test_triton_equals_the_reference(shape, quantize, dtype):
    x = random_input(*shape, dtype=dtype)
    q, scale = quantize(x, backend="triton")
    expected_q, expected_scale = quantize(x, backend="reference")
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


def test_triton_equals_the_reference_on_the_widest_rows():
    x = random_input(2, 20000)
    for mine, expected in zip(
        quantize_rows(x, backend="triton"), quantize_rows(x, backend="reference"), strict=True
    ):
        assert torch.equal(mine, expected)


def exact_gelu(x):
    x = x.double()
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def assert_gelu_equal_but_for_ties(quantize, x):
    """Triton's integers differ only where float64 lies between two, by fp32's error."""
    q, scale = quantize(x, "gelu_tanh", backend="triton")
    expected_q, expected_scale = quantize(x, "gelu_tanh", backend="reference")
    torch.testing.assert_close(scale, expected_scale, rtol=2e-6, atol=0)
    y = exact_gelu(x)
    block = (1, x.shape[-1]) if quantize is quantize_rows else (128, 128)
    exact = y * 128 / exact_amax(y, block)
    differing = q != expected_q
    assert differing.sum() <= 1 + q.numel() / 2000
    assert ((exact - exact.floor() - 0.5)[differing].abs() <= 1e-5 * 128).all()
    assert (q - exact.clamp(-128, 127)).abs().max() <= 0.5 + 1e-5 * 128


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("shape", ((1, 8), (63, 65), (3, 129, 200), (9, 8960)))
def test_gelu_equals_the_reference_but_for_ties(shape, quantize, dtype):
    x = random_input(*shape, dtype=dtype)
    if quantize is quantize_rows:
        x = x[..., :29, :]  # more rows than programs, and no blocks to fill
    x[..., 0] = 4  # a row without a positive value is all cancellation in torch's gelu
    assert_gelu_equal_but_for_ties(quantize, x)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_gelu_equals_the_reference_at_model_size(quantize):
    x = random_input(2, 1000, 13824, dtype=torch.bfloat16)
    assert_gelu_equal_but_for_ties(quantize, x)


@pytest.mark.gpu
@pytest.mark.parametrize("length", (1, 3, 1500))
@pytest.mark.parametrize("channels", (256, 1536, 5120, 8960, 13824))
def test_gelu_of_16_bits_at_every_width(channels, length):
    """As a CUDA kernel divides rows; some of them apart in memory."""
    x = random_input(2, length, channels + 8, dtype=torch.float16)[..., :channels]
    x[..., 0] = 4
    assert_gelu_equal_but_for_ties(quantize_rows, x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("channels", (1536, 8960))
def test_gelu_of_rows_with_and_without_a_large_number(channels, dtype):
    """Where a row's largest number does not tell the largest GELU, and around there."""
    x = random_input(2, 4, channels).to(dtype)
    x[0, 0] = -x[0, 0].abs()
    x[0, 1], x[0, 1, 7] = -3, 0.2
    x[0, 2], x[0, 2, -1] = -0.75, 0.286
    x[0, 3], x[0, 3, -1] = -0.75, 0.287
    x[1, 0], x[1, 0, 9] = -1e-3, 1e-4
    q, scale = quantize_rows(x, "gelu_tanh", backend="triton")
    y = exact_gelu(x)
    amax = y.abs().amax(-1)
    torch.testing.assert_close(scale.double(), amax / 128, rtol=2e-6, atol=0)
    steps = y * 128 / amax[..., None]
    assert (q - steps.clamp(-128, 127)).abs().max() <= 0.5 + 1e-5 * 128


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("activation", (None, "gelu_tanh"))
def test_wide_rows_that_are_not_finite(activation, dtype):
    x = torch.randn(1, 6, 1536, device=DEVICE).to(dtype)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[0, row, 5 + 500 * row] = value
    _, scale = quantize_rows(x, activation, backend="triton")
    assert scale[0, 0].isnan() and scale[0, 1].isinf() and scale[0, 3:].isfinite().all()
    assert scale[0, 2].isnan() if activation else scale[0, 2].isinf()  # gelu(-inf) is -inf * 0


@pytest.mark.parametrize("channels", (512, 1536, 5120, 8960, 13824, 24576))
def test_warps_in_cuda_hold_a_row_for_gelu(channels):
    warps, each, programs = mma.shape_of_program(channels)
    assert warps * each * mma.SPAN == channels and each <= mma.MOST
    assert programs * 32 * warps * (4 * each + 32) <= 65536


@pytest.mark.parametrize("channels", (128, 256, 300, 256 * 17, 256 * 97))
def test_rows_that_do_not_divide_into_warps(channels):
    assert "do not divide" in mma.unfit(torch.zeros(1, 2, channels, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("value", (0.0, -0.0, 3.0, -200.0, -1e20, 1e4, 1e30))
def test_gelu_neither_overflows_nor_makes_nan(quantize, value, backend):
    x = torch.full((2, 5, 130), value, device=DEVICE)
    q, scale = quantize(x, "gelu_tanh", backend=backend)
    assert (q == (127 if value > 0 else 0)).all()
    expected = exact_gelu(x[0, 0, 0]).abs().clamp_min(1e-8).float() / 128
    torch.testing.assert_close(scale, expected.expand_as(scale))


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_triton_equals_the_reference_at_model_size(quantize):
    x = random_input(2, 3000, 5120, dtype=torch.bfloat16)
    q, scale = quantize(x)
    expected_q, expected_scale = quantize(x, backend="reference")
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize(
    "view",
    (lambda x: x[:, ::2], lambda x: x[..., 3:70], lambda x: x.mT, lambda x: x.transpose(0, 1)),
    ids=("every other row", "columns", "transposed", "batch inside"),
)
def test_triton_takes_any_strides(view, quantize):
    x = view(random_input(2, 40, 140))
    q, scale = quantize(x, backend="triton")
    expected_q, expected_scale = quantize(x.contiguous(), backend="reference")
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert_gelu_equal_but_for_ties(quantize, x)


@pytest.mark.parametrize(
    ("quantize", "dequantize"),
    ((quantize_blocks, dequantize_blocks), (quantize_rows, dequantize_rows)),
)
@pytest.mark.parametrize("shape", ((5, 7), (2, 130, 300)))
def test_dequantized_is_within_half_a_step(shape, quantize, dequantize):
    x = random_input(*shape)
    q, scale = quantize(x)
    step = dequantize(torch.ones_like(q), scale, torch.float64)
    error = (dequantize(q, scale, torch.float32) - x).abs()
    clamped = x >= 127.5 * step
    assert (error <= torch.where(clamped, 1.001, 0.501) * step).all()
    assert dequantize(q, scale, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_bad_input_is_refused(quantize):
    with pytest.raises(TypeError, match=r"takes fp32, fp16 or bf16, got torch\.int32"):
        quantize(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"needs x \[..., R, C\].*got \[4\]"):
        quantize(torch.zeros(4))
    with pytest.raises(ValueError, match=r"with elements in it, got \[0, 4\]"):
        quantize(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="activation None or 'gelu_tanh', got 'gelu'"):
        quantize(torch.zeros(4, 4), "gelu")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        quantize(torch.zeros(4, 4), backend="cuda")


def test_scales_that_do_not_fit_are_refused():
    q = torch.zeros(2, 130, 200, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"needs scales \[2, 2, 2\], got \[2, 2\]"):
        dequantize_blocks(q, torch.ones(2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"needs scales \[2, 130\], got \[130\]"):
        dequantize_rows(q, torch.ones(130), torch.float32)
    with pytest.raises(TypeError, match=r"takes int8 values, got torch\.float32"):
        dequantize_rows(q.float(), torch.ones(2, 130), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_columns_are_quantized_by_the_amax_of_whole_rows(dtype, backend):
    x = random_input(2, 7, 200, dtype=dtype)
    q, scale = quantize_rows(x, backend=backend)
    amax = x.abs().amax(-1).float()
    for columns in (slice(0, 64), slice(64, 200)):
        found, found_scale = quantize_rows(x[..., columns], amax=amax, backend=backend)
        assert torch.equal(found, q[..., columns]) and torch.equal(found_scale, scale)


def test_a_given_amax_must_fit():
    x = random_input(2, 7, 64)
    with pytest.raises(ValueError, match=r"needs amax \[2, 7\] in fp32, got \[7\]"):
        quantize_rows(x, amax=torch.ones(7, device=DEVICE))
    with pytest.raises(ValueError, match="takes amax or an activation"):
        quantize_rows(x, "gelu_tanh", amax=torch.ones(2, 7, device=DEVICE))
