"""LayerNorm straight to INT8: the float64 formula, and Triton's integers equal but for ties."""

import pytest
import torch
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)
from turbodiffusion_pack.kernels.norm import layer_norm
from turbodiffusion_pack.kernels.norm.triton import row_pieces
from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant

BACKENDS = ("reference", "triton")
GRANULARITIES = {"rows": quantize_rows, "blocks": quantize_blocks}
DEQUANTIZE = {"rows": dequantize_rows, "blocks": dequantize_blocks}
# More rows than there are programs for them in the interpreter, so each takes several; two blocks.
LENGTH = {"rows": 29, "blocks": 129}
TIE = 1e-5 * 128  # how far fp32 may carry a value from its float64 place among the integers


def random_input(*shape, dtype=torch.float32):
    """Rows of different size and mean."""
    x = torch.randn(shape) * (0.5 + torch.rand(*shape[:-1], 1)) + torch.randn(*shape[:-1], 1)
    return x.to(DEVICE, dtype)


def random_operands(x, tokens, dtype=torch.float32):
    """Weight and bias; scale and shift as Wan has them, slices of one [B, L, 6, C] tensor."""
    batch, _, channels = x.shape
    weight, bias = 1 + torch.randn(channels), torch.randn(channels)
    modulation = torch.randn(batch, tokens, 6, channels, device=DEVICE).to(dtype)
    shift, scale = modulation.unbind(2)[:2]
    return {"weight": weight.to(DEVICE), "bias": bias.to(DEVICE), "scale": scale, "shift": shift}


def exact_layer_norm(x, weight=None, bias=None, scale=None, shift=None):
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    y = y if scale is None else y * (1 + scale.double())
    return y if shift is None else y + shift.double()


def exact_scaled(y, granularity):
    """float64 y * 128 / amax, still to be rounded, and the amax of every row or block."""
    row_step, column_step = (1, y.shape[-1]) if granularity == "rows" else (128, 128)
    amax = torch.empty_like(y)
    for r in range(0, y.shape[1], row_step):
        for c in range(0, y.shape[2], column_step):
            area = (slice(None), slice(r, r + row_step), slice(c, c + column_step))
            amax[area] = y[area].abs().amax((1, 2), keepdim=True).clamp_min(1e-8)
    scales = amax[:, :, 0] if granularity == "rows" else amax[:, ::128, ::128]
    return (y * 128 / amax).clamp(-128, 127), scales


def assert_equal_but_for_ties(x, granularity, **operands):
    """Triton's scales, and its integers wherever float64 does not lie between two of them."""
    q, scale = layer_norm_quant(x, granularity, **operands, backend="triton")
    expected_q, expected_scale = layer_norm_quant(x, granularity, **operands, backend="reference")
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    exact, _ = exact_scaled(exact_layer_norm(x, **operands), granularity)
    differing = q != expected_q
    assert differing.sum() <= 1 + q.numel() / 2000
    assert ((exact - exact.floor() - 0.5)[differing].abs() <= TIE).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", ("none", "sample", "token"))
def test_follows_the_formula(tokens, backend, granularity):
    length = LENGTH[granularity]
    x = random_input(2, length, 200)
    operands = random_operands(x, length if tokens == "token" else 1) if tokens != "none" else {}
    q, scale = layer_norm_quant(x, granularity, **operands, backend=backend)
    exact, amax = exact_scaled(exact_layer_norm(x, **operands), granularity)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert (q - exact).abs().max() <= 0.5 + TIE
    torch.testing.assert_close(scale.double(), amax / 128, rtol=1e-5, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reference_is_the_two_ops_in_a_row(granularity):
    x = random_input(2, 130, 96, dtype=torch.bfloat16)
    operands = random_operands(x, 1)
    q, scale = layer_norm_quant(x, granularity, **operands, backend="reference")
    y = layer_norm(x.float(), **operands, backend="reference")
    expected_q, expected_scale = GRANULARITIES[granularity](y, backend="reference")
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    ("length", "granularity"),
    [(length, "blocks") for length in LENGTHS[:-1]] + [(length, "rows") for length in LENGTHS[:4]],
)
def test_triton_equals_the_reference_at_every_length(length, dtype, granularity):
    x = random_input(1, length, 256, dtype=dtype)
    assert_equal_but_for_ties(x, granularity, **random_operands(x, 1, dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("channels", (8, 127, 280, 1536))
def test_triton_equals_the_reference_at_every_width(channels, batch, granularity):
    length = LENGTH[granularity]
    x = random_input(batch, length, channels)
    assert_equal_but_for_ties(x, granularity, **random_operands(x, length))


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [
        (1536, [1024, 512]),
        (5120, [4096, 1024]),
        (8960, [8192, 1024]),
        (13824, [8192, 4096, 2048]),
        (1, [1]),
        (127, [128]),
    ],
)
def test_pieces_of_a_row(channels, sizes):
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    assert row_pieces(channels) == tuple(zip(firsts, sizes, strict=True))


def test_pieces_reach_little_beyond_any_row():
    for channels in range(1, 3000):
        assert 0 <= sum(size for _, size in row_pieces(channels)) - channels <= channels // 16


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("given", ("weight", "bias", "scale", "shift"))
def test_triton_leaves_out_what_is_none(given, granularity):
    x = random_input(2, 5, 72)
    assert_equal_but_for_ties(x, granularity, **{given: random_operands(x, 1)[given]})


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_triton_takes_scale_per_sample_and_shift_per_token(granularity):
    length = LENGTH[granularity]
    x = random_input(2, length, 72)
    scale, shift = random_operands(x, 1)["scale"][:1], random_operands(x, length)["shift"]
    assert_equal_but_for_ties(x, granularity, scale=scale, shift=shift)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_triton_takes_any_strides(granularity):
    wide = random_input(3, 10, 300)
    for x in (wide[:, ::2, 100:200], wide.transpose(0, 1)[..., ::3], wide[:, :, :10].mT):
        assert_equal_but_for_ties(x, granularity, **random_operands(x, 1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_triton_keeps_the_variance_of_rows_far_from_zero(granularity):
    """E[x^2] - mean^2 in fp32 would lose all of a variance of 1 next to a mean of 3000."""
    x = random_input(2, 5, 1536) + 3000
    _, scale = layer_norm_quant(x, granularity, backend="triton")
    _, amax = exact_scaled(exact_layer_norm(x), granularity)
    torch.testing.assert_close(scale.double(), amax / 128, rtol=1e-3, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (0.0, 3.0, -70.0))
def test_equal_inputs(value, backend, granularity):
    x = random_input(3, 5, 100)
    x[1] = value
    q, scale = layer_norm_quant(x, granularity, backend=backend)
    y = DEQUANTIZE[granularity](q, scale, torch.float32)
    assert y.isfinite().all()
    assert y[1].abs().max() <= 1e-2
    assert (y[[0, 2]].abs().amax(-1) > 1).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_do_not_share_blocks(backend, granularity):
    x = random_input(2, LENGTH[granularity], 24)
    shift = torch.tensor([0.0, 50.0], device=DEVICE)[:, None, None].expand(2, 1, 24)
    q, scale = layer_norm_quant(x, granularity, shift=shift, backend=backend)
    for i in range(2):
        alone = layer_norm_quant(x[i : i + 1], granularity, shift=shift[i : i + 1], backend=backend)
        assert torch.equal(q[i], alone[0][0])
        assert torch.equal(scale[i], alone[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", (1, 3000))
@pytest.mark.parametrize("channels", (1536, 5120))
def test_triton_equals_the_reference_at_model_size(channels, tokens, granularity):
    x = random_input(2, 3000, channels, dtype=torch.bfloat16)
    assert_equal_but_for_ties(x, granularity, **random_operands(x, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("length", (1, 5, 2000))
@pytest.mark.parametrize("channels", (256, 1536, 2304, 3072, 5120))
def test_rows_of_16_bits_at_every_width(channels, length):
    """As a CUDA kernel divides them: one warp a row or two, more teams than rows and fewer."""
    x = random_input(2, length, channels, dtype=torch.float16)
    operands = random_operands(x, 1)
    assert_equal_but_for_ties(x, "rows", **operands)
    for name, given in operands.items():
        assert_equal_but_for_ties(x, "rows", **{name: given})
    assert_equal_but_for_ties(x, "rows", scale=operands["scale"][:1], shift=operands["shift"])


@pytest.mark.gpu
@pytest.mark.parametrize("channels", (256, 5120))
def test_rows_of_16_bits_far_from_zero(channels):
    x = (random_input(2, 50, channels) + 3000).half()
    _, scale = layer_norm_quant(x, "rows", backend="triton")
    _, amax = exact_scaled(exact_layer_norm(x), "rows")
    torch.testing.assert_close(scale.double(), amax / 128, rtol=1e-3, atol=0)


def test_bad_input_is_refused():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"granularity 'rows' or 'blocks', got 'tokens'"):
        layer_norm_quant(x, "tokens")
    with pytest.raises(TypeError, match=r"layer_norm_quant takes fp32.*got torch\.float64"):
        layer_norm_quant(x.double(), "rows")
    with pytest.raises(ValueError, match=r"layer_norm_quant needs x \[B, L, C\], got \[3, 8\]"):
        layer_norm_quant(x[0], "rows")
    with pytest.raises(ValueError, match=r"with elements in it, got \[2, 0, 8\]"):
        layer_norm_quant(x[:, :0], "rows")
    with pytest.raises(ValueError, match=r"layer_norm_quant needs weight \[8\], got \[9\]"):
        layer_norm_quant(x, "rows", torch.ones(9))
    with pytest.raises(ValueError, match=r"layer_norm_quant needs scale \[2, 1 or 3, 8\]"):
        layer_norm_quant(x, "blocks", scale=torch.ones(2, 8))
