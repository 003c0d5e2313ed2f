"""What is not finite, and what nearly overflows, in all that quantizes: see kernels/int8_quant."""

import pytest
import torch
from attention import random_map, random_qkv
from devices import DEVICE
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)
from turbodiffusion_pack.kernels.linear_attention import key_value_state_and_maximum
from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant
from turbodiffusion_pack.kernels.qk_prepare import prepare
from turbodiffusion_pack.kernels.requantize import requantize_rows
from turbodiffusion_pack.kernels.sparse_attention import sage_attention

BACKENDS = ("reference", "triton")
GRANULARITIES = ("rows", "blocks")
QUANTIZERS = {"rows": quantize_rows, "blocks": quantize_blocks}
DEQUANTIZERS = {"rows": dequantize_rows, "blocks": dequantize_blocks}
SPOILERS = (torch.nan, torch.inf, -torch.inf)
HUGE = (3e38, -3e38, 1e30, -1e13)
ROW, CHANNEL = 130, 140  # what is spoiled; the second of two blocks each way


def spoiled(value, length=136, channels=144):
    """[1, L, C] with one element that is `value`."""
    x = torch.randn(1, length, channels, device=DEVICE)
    x[0, ROW, CHANNEL] = value
    return x


def bad_scales(granularity):
    """Which scales one element spoils."""
    shape = (1, 136) if granularity == "rows" else (1, 2, 2)
    bad = torch.zeros(shape, dtype=torch.bool, device=DEVICE)
    bad[(0, ROW) if granularity == "rows" else (0, 1, 1)] = True
    return bad


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", SPOILERS)
def test_a_scale_is_as_bad_as_what_it_is_for(value, backend, granularity, activation):
    quantize = QUANTIZERS[granularity]
    _, scale = quantize(spoiled(value), activation, backend=backend)
    assert torch.equal(~scale.isfinite(), bad_scales(granularity))
    (bad,) = scale[~scale.isfinite()].tolist()
    # gelu(-inf) is -inf * 0.
    assert (bad == torch.inf) == (value == torch.inf or (value == -torch.inf and not activation))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_goes_through_a_linear_layer_and_stays_in_its_row(backend, granularity):
    quantize = QUANTIZERS[granularity]
    x = quantize(spoiled(torch.nan), backend=backend)
    w = quantize(torch.randn(16, 144, device=DEVICE), backend=backend)
    y = int8_linear(*x, *w, out_dtype=torch.float32, backend=backend)
    rows = y.isnan().all(-1)[0].nonzero().flatten().tolist()
    assert rows == ([ROW] if granularity == "rows" else list(range(128, 136)))
    assert y.isnan().sum() == len(rows) * 16


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", SPOILERS)
def test_layer_norm_makes_nan_of_the_whole_row(value, backend, granularity):
    _, scale = layer_norm_quant(spoiled(value), granularity, backend=backend)
    expected = bad_scales(granularity)
    expected |= expected.any(-1, keepdim=True) if granularity == "blocks" else False
    assert torch.equal(scale.isnan(), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ["weight", "bias", "scale", "shift"])
def test_a_nan_that_layer_norm_multiplies_with(given, backend, granularity):
    vector = torch.zeros(144, device=DEVICE)
    vector[CHANNEL] = torch.nan
    operand = {given: vector if given in ("weight", "bias") else vector[None, None]}
    x = torch.randn(1, 136, 144, device=DEVICE)
    _, scale = layer_norm_quant(x, granularity, **operand, backend=backend)
    assert scale.isnan().all() if granularity == "rows" else scale.isnan()[0, :, 1].all()


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", HUGE)
def test_a_huge_value_is_a_value(value, backend, granularity, activation):
    x = spoiled(value)
    q, scale = QUANTIZERS[granularity](x, activation, backend=backend)
    exact = x.double()
    if activation:
        exact = torch.nn.functional.gelu(exact, approximate="tanh")
    found = DEQUANTIZERS[granularity](q, scale, torch.float32).double()
    per_element = scale[..., None]
    if granularity == "blocks":
        per_element = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :136, :144]
    # Half a step, and a whole one at the upper end, which 127 cuts off.
    assert ((found - exact).abs() <= 1.001 * per_element).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1e30, -1e30])
@pytest.mark.parametrize("channel", [0, CHANNEL])
def test_layer_norm_of_squares_that_overflow_is_0(channel, value, backend, granularity):
    x = torch.randn(1, 136, 144, device=DEVICE)
    x[0, ROW, channel] = value
    q, scale = layer_norm_quant(x, granularity, backend=backend)
    assert scale.isfinite().all()
    assert not q[0, ROW].count_nonzero()
    others = torch.arange(136, device=DEVICE) != ROW
    expected, _ = layer_norm_quant(x[:, :128], granularity, backend="reference")
    assert (q[0, :128].int() - expected[0].int()).abs().max() <= 1
    assert q[0, others].count_nonzero(-1).min() > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_requantized_weights_keep_their_nan(backend):
    q = torch.randint(-128, 128, (200, 300), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(2, 3, device=DEVICE)
    scale[1, 2] = torch.nan
    _, found = requantize_rows(q, scale, backend=backend)
    assert found[:128].isfinite().all() and found[128:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0)])
def test_nothing_cannot_be_requantized(shape, backend):
    q = torch.zeros(shape, dtype=torch.int8, device=DEVICE)
    scale = torch.zeros([-(-size // 128) for size in shape], device=DEVICE)
    with pytest.raises(ValueError, match=r"requantize_rows needs q with elements in it, got \["):
        requantize_rows(q, scale, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_projection_spoils_the_int8_of_its_block(backend):
    x = torch.randn(1, 200, 2, 64, device=DEVICE).half()
    x[0, ROW, 1, 5] = torch.nan  # the norm is over all heads
    angles = torch.zeros(1, 200, 32, device=DEVICE)
    found = prepare(
        x, torch.ones(128, device=DEVICE), angles, angles, quantize=True, backend=backend
    )
    assert found.blocks.scale.isnan().tolist() == [[[False, True]] * 2]
    assert found.means.isnan().any(-1).tolist() == [[[False, True]] * 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_nan_goes_through_low_bit_attention(dim, spoiled, backend):
    q, k, v = random_qkv(1, 200, 2, dim, torch.float16)
    {"q": q, "k": k, "v": v}[spoiled][0, ROW, 1, 5] = torch.nan
    block_map = random_map(1, 200, 2, 128, 64, share=1.0)
    out = sage_attention(q, k, v, block_map, "fp16", backend=backend)
    reached = {"q": out[0, 128:, 1], "k": out[0, :, 1], "v": out[0, :, 1, 5]}[spoiled]
    assert reached.isnan().all()
    assert out[:, :, 0].isfinite().all()
    assert out.isnan().sum() == reached.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_maximum_of_values_keeps_a_nan(backend):
    k, v, _ = random_qkv(1, 200, 2, 64, torch.float16)
    v[0, ROW, 1, 5] = torch.nan
    *_, v_max = key_value_state_and_maximum(k, v, backend=backend)
    assert v_max.isnan().nonzero().tolist() == [[0, 1, 5]]
