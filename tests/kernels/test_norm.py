"""RMSNorm and modulated LayerNorm: goldens, float64, and Triton against torch's own error."""

import goldens
import pytest
import torch
from devices import BATCHES, DEVICE, LENGTHS, TRITON_DTYPES
from turbodiffusion_pack.kernels.norm import layer_norm, rms_norm

BACKENDS = ("reference", "triton")
EPS = 1e-6


def exact_rms_norm(x, weight):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def exact_layer_norm(x, weight=None, bias=None, scale=None, shift=None):
    x = x.double()
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    y = y * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())
    return y * (1 if scale is None else 1 + scale.double()) + (
        0 if shift is None else shift.double()
    )


def random_input(*shape, dtype=torch.float32):
    """Rows of different size and mean."""
    x = torch.randn(shape) * (0.5 + torch.rand(*shape[:-1], 1)) + torch.randn(*shape[:-1], 1)
    return x.to(DEVICE, dtype)


def random_affine(channels):
    return 1 + torch.randn(channels, device=DEVICE), torch.randn(channels, device=DEVICE)


def torch_bound(out, exact):
    """Twice the error of torch's own result, and never below what fp32 sums can do."""
    return max(2 * goldens.relative_error(out, exact), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_equals_the_original(backend):
    data = goldens.load("operators")
    x, weight = data["norm.x"].float().to(DEVICE), data["norm.w"].to(DEVICE)
    assert goldens.relative_error(rms_norm(x, weight, EPS, backend), data["norm.rms"]) <= 1e-6
    for wrong in (
        rms_norm(x, weight, 10 * EPS, backend),
        rms_norm(x - x.mean(-1, keepdim=True), weight, EPS, backend),
        rms_norm(x, torch.ones_like(weight), EPS, backend),
    ):
        assert goldens.relative_error(wrong, data["norm.rms"]) > 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_variance_counts_only_real_channels(backend):
    """The original pads rows to a power of two and sums (0 - mean)^2 over the padding.

    Our decision is the definition. At 1536 channels with mean 1 the two are 13 % apart.
    """
    x = torch.randn(1, 8, 1536, device=DEVICE) + 1
    padded = torch.nn.functional.pad(x, (0, 512)).double()
    mean = x.double().mean(-1, keepdim=True)
    padded_variance = (padded - mean).square().sum(-1, keepdim=True) / 1536
    original = (x.double() - mean) / (padded_variance + EPS).sqrt()
    y = layer_norm(x, backend=backend)
    assert goldens.relative_error(y, exact_layer_norm(x)) <= 1e-6
    assert goldens.relative_error(original, exact_layer_norm(x)) > 0.1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_references_follow_the_formulas(length, batch):
    x = random_input(batch, length, 96)
    weight, bias = random_affine(96)
    scale, shift = torch.randn(2, batch, length, 96, device=DEVICE)
    rms = rms_norm(x, weight, backend="reference")
    assert goldens.relative_error(rms, exact_rms_norm(x, weight)) <= 1e-6
    full = layer_norm(x, weight, bias, scale, shift, backend="reference")
    exact = exact_layer_norm(x, weight, bias, scale, shift)
    assert goldens.relative_error(full, exact) <= 1e-6


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", ((1, 8), (3, 5, 1000), (2, 3, 2, 1536), (2, 20000)))
def test_triton_rms_norm_is_as_good_as_torch(shape, dtype):
    x = random_input(*shape, dtype=dtype)
    weight = 1 + torch.randn(shape[-1], device=DEVICE)
    exact = exact_rms_norm(x, weight)
    y = rms_norm(x, weight, backend="triton")
    own = torch.nn.functional.rms_norm(x, shape[-1:], weight.to(dtype), EPS)
    assert y.dtype == dtype
    assert goldens.relative_error(y, exact) <= torch_bound(own, exact)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", ((1, 1, 8), (3, 5, 1000), (1, 7, 1536), (1, 2, 20000)))
def test_triton_layer_norm_is_as_good_as_torch(shape, dtype):
    x = random_input(*shape, dtype=dtype)
    weight, bias = random_affine(shape[-1])
    exact = exact_layer_norm(x, weight, bias)
    y = layer_norm(x, weight, bias, backend="triton")
    own = torch.nn.functional.layer_norm(x, shape[-1:], weight.to(dtype), bias.to(dtype), EPS)
    assert y.dtype == dtype
    assert goldens.relative_error(y, exact) <= torch_bound(own, exact)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("affine", (False, True))
@pytest.mark.parametrize("modulated", ((3, 1), (1, 1), (3, 5)), ids=str)
def test_triton_modulation_is_as_good_as_torch(modulated, affine, dtype):
    x = random_input(3, 5, 200, dtype=dtype)
    weight, bias = random_affine(200) if affine else (None, None)
    # Wan hands out slices of one [B, L, 6, C] tensor.
    shift, scale = torch.randn(*modulated, 6, 200, device=DEVICE).to(dtype).unbind(2)[:2]
    exact = exact_layer_norm(x, weight, bias, scale, shift)
    y = layer_norm(x, weight, bias, scale, shift, backend="triton")
    own_weight = None if weight is None else weight.to(dtype)
    own_bias = None if bias is None else bias.to(dtype)
    own = torch.nn.functional.layer_norm(x, (200,), own_weight, own_bias, EPS) * (1 + scale) + shift
    assert goldens.relative_error(y, exact) <= torch_bound(own, exact)


@pytest.mark.parametrize("given", ("weight", "bias", "scale", "shift"))
def test_triton_leaves_out_what_is_none(given):
    x = random_input(2, 3, 72)
    operand = torch.randn(72, device=DEVICE)
    operand = operand if given in ("weight", "bias") else operand.expand(2, 1, 72)
    y = layer_norm(x, **{given: operand}, backend="triton")
    assert goldens.relative_error(y, exact_layer_norm(x, **{given: operand})) <= 1e-6


def test_triton_takes_any_strides():
    wide = random_input(3, 10, 300)
    weight, bias = random_affine(100)
    views = wide[:, ::2, 100:200], wide.transpose(0, 1)[..., ::3], wide[0].mT.view(3, 100, 10).mT
    for x in views:
        y = layer_norm(x, weight, bias, backend="triton")
        assert goldens.relative_error(y, exact_layer_norm(x, weight, bias)) <= 1e-6
        y = rms_norm(x, weight, backend="triton")
        assert goldens.relative_error(y, exact_rms_norm(x, weight)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("channels", (1536, 5120))
def test_triton_is_as_good_as_torch_at_model_size(channels):
    x = random_input(2, 3000, channels, dtype=torch.bfloat16)
    weight, bias = random_affine(channels)
    exact = exact_rms_norm(x, weight)
    own = torch.nn.functional.rms_norm(x, (channels,), weight.bfloat16(), EPS)
    assert goldens.relative_error(rms_norm(x, weight), exact) <= torch_bound(own, exact)
    exact = exact_layer_norm(x, weight, bias)
    own = torch.nn.functional.layer_norm(x, (channels,), weight.bfloat16(), bias.bfloat16(), EPS)
    assert goldens.relative_error(layer_norm(x, weight, bias), exact) <= torch_bound(own, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (0.0, 3.0, -70.0))
def test_equal_inputs(value, backend):
    x = torch.full((3, 5, 100), value, device=DEVICE)
    weight = torch.ones(100, device=DEVICE)
    assert layer_norm(x, weight, backend=backend).abs().max() <= 1e-2
    expected = torch.full_like(x, 0.0 if value == 0 else value / abs(value))
    torch.testing.assert_close(rms_norm(x, weight, backend=backend), expected)


def test_bad_input_is_refused():
    x, weight = torch.zeros(2, 3, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"rms_norm takes fp32.*got torch\.float64"):
        rms_norm(x.double(), weight)
    with pytest.raises(ValueError, match=r"rms_norm needs weight \[8\], got \[9\]"):
        rms_norm(x, torch.ones(9))
    with pytest.raises(ValueError, match=r"layer_norm needs x \[B, L, C\], got \[3, 8\]"):
        layer_norm(x[0])
    with pytest.raises(ValueError, match=r"layer_norm needs bias \[8\], got \[1, 8\]"):
        layer_norm(x, bias=weight[None])
    with pytest.raises(ValueError, match=r"needs scale \[2, 1 or 3, 8\], got \[2, 8\]"):
        layer_norm(x, scale=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"needs shift \[2, 1 or 3, 8\], got \[3, 1, 8\]"):
        layer_norm(x, shift=torch.ones(3, 1, 8))
