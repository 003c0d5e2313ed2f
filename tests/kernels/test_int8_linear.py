"""INT8 linear: goldens, exact integer maths, and Triton against the reference."""

import goldens
import pytest
import torch
from devices import BATCHES, CARD, DEVICE, LENGTHS
from turbodiffusion_pack.kernels import dispatch, nvrtc
from turbodiffusion_pack.kernels.int8_linear import (
    hopper,
    int8_linear,
    int8_linear_and_squares,
    triton_kernels,
)
from turbodiffusion_pack.kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)

GRANULARITIES = {
    "blocks": (quantize_blocks, dequantize_blocks),
    "rows": (quantize_rows, dequantize_rows),
}
BACKENDS = ("reference", "triton")
GOLDEN_BOUND = 1e-3
# A gate per sample or per token, and whether there is a residual.
EPILOGUES = (
    (None, True),
    ("sample", False),
    ("sample", True),
    ("token", False),
    ("token", True),
)


@pytest.fixture(params=("pointers", "tensor maps"))
def addressing(request, monkeypatch):
    """How the Triton kernel reads and writes: as on sm_80, or as on Hopper and newer."""
    if request.param == "pointers":
        monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
    elif DEVICE == "cpu":
        monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    elif CARD < (9, 0):
        pytest.skip("this GPU has no tensor maps")
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "it is switched off")
    maps = triton_kernels.TensorDescriptor
    made, make = [], maps.from_tensor
    monkeypatch.setattr(maps, "from_tensor", lambda *a: made.append(a) or make(*a))
    yield request.param
    assert bool(made) == (request.param == "tensor maps")


def random_operands(batch, length, k, n, granularity):
    """x_q, x_scale, w_q, w_scale as int8_linear takes them."""
    quantize, _ = GRANULARITIES[granularity]
    x = torch.randn(batch, length, k, device=DEVICE) * torch.rand(batch, length, 1, device=DEVICE)
    w = torch.randn(n, k, device=DEVICE) * torch.rand(n, 1, device=DEVICE)
    return *quantize(x, backend="reference"), *quantize(w, backend="reference")


def exact_linear(x_q, x_scale, w_q, w_scale, bias, granularity):
    """The float64 product of the dequantized operands."""
    _, dequantize = GRANULARITIES[granularity]
    x = dequantize(x_q, torch.ones_like(x_scale), torch.float64)
    w = dequantize(w_q, torch.ones_like(w_scale), torch.float64)
    x_step = dequantize(torch.ones_like(x_q), x_scale, torch.float64)
    w_step = dequantize(torch.ones_like(w_q), w_scale, torch.float64)
    return (x * x_step) @ (w * w_step).mT + bias.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ("linear0", "linear1", "linear2"))
def test_equals_the_original(case, backend):
    data = {k: v.to(DEVICE) for k, v in goldens.load("operators").items() if k.startswith(case)}
    operands = [data[f"{case}.{name}"] for name in ("x_q", "x_s", "w_q", "w_s")]
    y = int8_linear(
        operands[0][None], operands[1][None], *operands[2:], None, torch.float32, backend=backend
    )
    # The golden is bf16, whose rounding alone is larger than the bound.
    assert goldens.relative_error(y[0].bfloat16(), data[f"{case}.y"]) <= GOLDEN_BOUND


@pytest.mark.parametrize(
    "wrong",
    (
        lambda x, w: (x, w.roll(1, 0)),
        lambda x, w: (x, w.roll(1, 1)),
        lambda x, w: (x * 128 / 127, w),
    ),
    ids=("scales of other rows", "scales of other columns", "127 for 128"),
)
@pytest.mark.parametrize("case", ("linear0", "linear1", "linear2"))
def test_wrong_scales_miss_the_original(case, wrong):
    data = {k: v.to(DEVICE) for k, v in goldens.load("operators").items() if k.startswith(case)}
    x_q, x_s, w_q, w_s = (data[f"{case}.{name}"] for name in ("x_q", "x_s", "w_q", "w_s"))
    x_s, w_s = wrong(x_s, w_s)
    y = int8_linear(x_q[None], x_s[None], w_q, w_s, backend="reference")
    assert goldens.relative_error(y[0], data[f"{case}.y"]) > GOLDEN_BOUND


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_reference_follows_the_formula(length, batch, granularity):
    operands = random_operands(batch, length, 200, 130, granularity)
    bias = torch.randn(130, device=DEVICE)
    y = int8_linear(*operands, bias, torch.float32, backend="reference")
    assert y.shape == (batch, length, 130)
    assert goldens.relative_error(y, exact_linear(*operands, bias, granularity)) <= 1e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_squares_are_those_of_the_rows(granularity):
    operands = random_operands(2, 130, 144, 136, granularity)
    bias = torch.randn(136, device=DEVICE)
    y, squares = int8_linear_and_squares(*operands, bias, torch.float32, backend="reference")
    assert torch.equal(y, int8_linear(*operands, bias, torch.float32, backend="reference"))
    expected = y.double().square().sum(-1)
    torch.testing.assert_close(squares.sum(1).double(), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_sums_are_exact_over_the_longest_k(backend):
    k = 13824
    x_q = torch.full((1, 3, k), -128, dtype=torch.int8, device=DEVICE)
    w_q = torch.randint(-128, -120, (5, k), dtype=torch.int8, device=DEVICE)
    ones = torch.ones(1, 3, device=DEVICE), torch.ones(5, device=DEVICE)
    y = int8_linear(x_q, ones[0], w_q, ones[1], None, torch.float32, backend=backend)
    exact = (x_q.cpu().long() @ w_q.cpu().long().mT).float()
    assert torch.equal(y.cpu(), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", (0.0, 3.0))
def test_equal_inputs(value, granularity, backend):
    quantize, _ = GRANULARITIES[granularity]
    x = quantize(torch.full((1, 65, 130), value, device=DEVICE), backend="reference")
    w = quantize(torch.full((7, 130), 1.0, device=DEVICE), backend="reference")
    y = int8_linear(*x, *w, None, torch.float32, backend=backend)
    expected = torch.full_like(y, 130 * value * (127 / 128) ** 2)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize(
    ("batch", "length", "k", "n"), ((1, 1, 128, 8), (3, 129, 200, 140), (1, 65, 72, 300))
)
def test_triton_equals_the_reference(batch, length, k, n, out_dtype, granularity):
    operands = random_operands(batch, length, k, n, granularity)
    bias = torch.randn(n, device=DEVICE)
    y = int8_linear(*operands, bias, out_dtype, backend="triton")
    expected = int8_linear(*operands, bias, out_dtype, backend="reference")
    assert y.dtype == out_dtype
    assert goldens.relative_error(y, expected) <= (1e-6 if out_dtype == torch.float32 else 1e-4)


def random_epilogue(shape, gate, residual, dtype=torch.float32):
    """Gate per sample or per token, and residual, as int8_linear takes them."""
    rows = {"sample": 1, "token": shape[1]}
    if gate is not None:
        # One of six vectors of a modulation: strided along the batch.
        gate = torch.randn(shape[0], rows[gate], 6, shape[2], device=DEVICE)[:, :, 2]
    return gate, torch.randn(shape, device=DEVICE).to(dtype) if residual else None


def exact_epilogue(y, gate, residual):
    y = y if gate is None else y * gate.double()
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("gate", "residual"), EPILOGUES)
def test_reference_epilogue_follows_the_formula(gate, residual, granularity):
    operands = random_operands(3, 129, 200, 136, granularity)
    bias = torch.randn(136, device=DEVICE)
    gate, residual = random_epilogue((3, 129, 136), gate, residual)
    y = int8_linear(*operands, bias, torch.float32, gate, residual, backend="reference")
    expected = exact_epilogue(exact_linear(*operands, bias, granularity), gate, residual)
    assert goldens.relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("gate", "residual"), [(None, False), *EPILOGUES])
def test_triton_epilogue_follows_the_formula(gate, residual, granularity, addressing):
    operands = random_operands(3, 129, 208, 136, granularity)
    bias = torch.randn(136, device=DEVICE)
    gate, residual = random_epilogue((3, 129, 136), gate, residual)
    y = int8_linear(*operands, bias, torch.float32, gate, residual, backend="triton")
    expected = exact_epilogue(exact_linear(*operands, bias, granularity), gate, residual)
    assert goldens.relative_error(y, expected) <= 1e-6


def test_triton_takes_a_gate_of_any_strides(addressing):
    operands = random_operands(2, 70, 48, 24, "rows")
    gate = torch.randn(24, 70, 2, device=DEVICE).half().permute(2, 1, 0)
    y = int8_linear(*operands, None, torch.float32, gate, backend="triton")
    expected = int8_linear(*operands, None, torch.float32, gate, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("addressing", ("tensor maps",), indirect=True)
def test_wide_tiles(addressing):
    """The tile that Hopper takes where K and N are large."""
    operands = random_operands(1, 130, 2064, 3080, "rows")
    gate, residual = random_epilogue((1, 130, 3080), "sample", True)
    y = int8_linear(*operands, None, torch.float32, gate, residual, backend="triton")
    expected = int8_linear(*operands, None, torch.float32, gate, residual, backend="reference")
    assert goldens.relative_error(y, expected) <= 1e-6


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_triton_writes_into_the_residual(granularity, addressing):
    operands = random_operands(3, 129, 144, 136, granularity)
    gate, residual = random_epilogue((3, 129, 136), "sample", True, torch.float16)
    epilogue = {"out_dtype": torch.float16, "gate": gate, "residual": residual}
    expected = int8_linear(*operands, **epilogue, backend="reference")
    y = int8_linear(*operands, **epilogue, out=residual, backend="triton")
    assert y is residual
    assert goldens.relative_error(residual, expected) <= 1e-4


def test_reference_writes_into_the_residual():
    operands = random_operands(3, 129, 144, 136, "blocks")
    gate, residual = random_epilogue((3, 129, 136), "sample", True)
    epilogue = {"out_dtype": torch.float32, "gate": gate, "residual": residual}
    expected = int8_linear(*operands, **epilogue, backend="reference")
    assert int8_linear(*operands, **epilogue, out=residual, backend="reference") is residual
    assert torch.equal(residual, expected)


def test_triton_writes_nothing_beside_a_strided_out(addressing):
    operands = random_operands(2, 129, 48, 24, "blocks")
    wide = torch.full((2, 160, 40), 7.0, device=DEVICE)
    y = int8_linear(*operands, None, torch.float32, out=wide[:, :129, :24], backend="triton")
    expected = int8_linear(*operands, None, torch.float32, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert wide[:, 129:].eq(7).all() and wide[..., 24:].eq(7).all()


@pytest.mark.parametrize(("k", "n"), ((200, 24), (208, 23)))
def test_rows_that_tensor_maps_cannot_address(k, n, monkeypatch):
    """8-byte rows of x and w, or 4-byte rows of the output, go through pointers on every card."""
    monkeypatch.setattr(triton_kernels.TensorDescriptor, "from_tensor", None)
    if DEVICE == "cpu":
        monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))
    operands = random_operands(2, 65, k, n, "rows")
    y = int8_linear(*operands, None, torch.float32, backend="triton")
    expected = int8_linear(*operands, None, torch.float32, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("batch", "length", "k", "n"),
    ((1, 1, 128, 8), (3, 129, 200, 140), (2, 1000, 1536, 8960), (1, 2111, 13824, 5120)),
)
@pytest.mark.parametrize("gate", (None, "sample", "token"))
def test_triton_equals_the_reference_in_bf16(gate, batch, length, k, n, granularity, monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "it is switched off")
    operands = random_operands(batch, length, k, n, granularity)
    bias = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    shape = batch, length, n
    gate, residual = random_epilogue(shape, gate, gate is not None, torch.bfloat16)
    y = int8_linear(*operands, bias, gate=gate, residual=residual)
    expected = int8_linear(*operands, bias, gate=gate, residual=residual, backend="reference")
    assert y.dtype == torch.bfloat16
    assert goldens.relative_error(y, expected) <= 1e-3


@pytest.fixture
def on_hopper(monkeypatch):
    """Only the CUDA kernel may run, and has to."""
    if DEVICE == "cpu" or CARD != (9, 0) or nvrtc.unavailable():
        pytest.skip("the CUDA kernel needs a Hopper GPU and NVRTC")
    launched, linear = [], hopper.linear
    monkeypatch.setattr(hopper, "linear", lambda *a: launched.append(a) or linear(*a))
    monkeypatch.setattr(triton_kernels, "linear", None)
    yield
    assert launched


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length", "k", "n"),
    # Less than a tile, a bit more, several tiles a program, and a gate for each of three samples.
    ((1, 1, 16, 8), (1, 129, 144, 264), (1, 20001, 272, 1528), (3, 4000, 1536, 1536)),
)
@pytest.mark.parametrize(("gate", "residual"), [(None, False), *EPILOGUES[:3]])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_hopper_equals_the_reference(batch, length, k, n, gate, residual, dtype, on_hopper):
    operands = random_operands(batch, length, k, n, "rows")
    gate, residual = random_epilogue((batch, length, n), gate, residual, dtype)
    options = {"out_dtype": dtype, "gate": gate, "residual": residual}
    for bias in (None, torch.randn(n, device=DEVICE, dtype=dtype)):
        y = int8_linear(*operands, bias, **options)
        expected = int8_linear(*operands, bias, **options, backend="reference")
        assert y.dtype == dtype
        assert goldens.relative_error(y, expected) <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "n"), [(1, 1, 256), (2, 129, 512), (3, 4001, 1536)])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_hopper_adds_up_the_squares_of_rows(batch, length, n, dtype, on_hopper):
    operands = random_operands(batch, length, 1536, n, "rows")
    bias = torch.randn(n, device=DEVICE, dtype=dtype)
    y, squares = int8_linear_and_squares(*operands, bias, dtype)
    assert squares.shape == (batch, n // 256, length)
    assert torch.equal(y, int8_linear(*operands, bias, dtype))
    expected = y.double().square().unflatten(2, (-1, 256)).sum(-1).mT
    # Of what is not rounded yet: a square is off by eps at most.
    torch.testing.assert_close(squares.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_hopper_adds_up_no_squares_of_parts_of_tiles(on_hopper):
    operands = random_operands(1, 300, 144, 264, "rows")
    y, squares = int8_linear_and_squares(*operands)
    assert squares is None and torch.equal(y, int8_linear(*operands))


@pytest.mark.gpu
def test_hopper_writes_into_the_residual_and_nothing_beside_it(on_hopper):
    operands = random_operands(2, 4000, 1536, 520, "rows")
    gate, residual = random_epilogue((2, 4096, 768), "sample", True, torch.bfloat16)
    gate, inner = gate[..., :520], residual[:, :4000, :520]
    expected = int8_linear(*operands, gate=gate, residual=inner, backend="reference")
    outside = residual.clone()
    int8_linear(*operands, gate=gate, residual=inner, out=inner)
    assert goldens.relative_error(inner, expected) <= 1e-3
    outside[:, :4000, :520] = inner
    assert torch.equal(residual, outside)


@pytest.mark.gpu
def test_hopper_sums_are_exact_over_the_longest_k(on_hopper):
    x = torch.full((1, 8, 131056), 127, dtype=torch.int8, device=DEVICE)
    w = torch.full((8, 131056), -128, dtype=torch.int8, device=DEVICE)
    ones = torch.ones(8, device=DEVICE)
    y = int8_linear(x, ones[None] * 2.0**-20, w, ones)
    assert y.eq(torch.tensor(-127 * 128 * 131056 * 2.0**-20).bfloat16().item()).all()


def _aligned(batch=2, length=130, k=144, n=136):
    x = torch.zeros(batch, length, k, dtype=torch.int8)
    out = torch.zeros(batch, length, n, dtype=torch.bfloat16)
    return {
        "x_q": x,
        "x_scale": torch.zeros(batch, length),
        "w_q": torch.zeros(n, k, dtype=torch.int8),
        "w_scale": torch.zeros(n),
        "bias": torch.zeros(n, dtype=torch.bfloat16),
        "gate": torch.zeros(batch, 6, n)[:, 2:3],
        "residual": out,
        "out": out,
    }


@pytest.mark.parametrize(
    ("changed", "reason"),
    (
        ({}, None),
        ({"bias": None, "gate": None, "residual": None}, None),
        ({"out": torch.zeros(2, 130, 136), "bias": None, "residual": None}, "is float32"),
        ({"bias": torch.zeros(136)}, "another dtype"),
        ({"w_scale": torch.zeros(136, device="meta")}, "different devices"),
        ({"residual": torch.zeros(2, 130, 136).half()}, "another dtype"),
        ({"gate": torch.zeros(2, 130, 136)}, "one float32 vector a sample"),
        ({"gate": torch.zeros(2, 1, 136).bfloat16()}, "one float32 vector a sample"),
        ({"gate": torch.zeros(2, 1, 272)[..., ::2]}, "not contiguous"),
        ({"w_q": torch.zeros(136, 150, dtype=torch.int8)[:, :144]}, "multiples of 16"),
        ({"x_q": torch.zeros(2, 130, 152, dtype=torch.int8)[..., 8:]}, "multiples of 16"),
        ({"w_scale": torch.zeros(137)[1:]}, "aligned eights"),
        ({"bias": torch.zeros(137).bfloat16()[1:]}, "aligned eights"),
        ({"x_q": torch.zeros(1, 130, 144, dtype=torch.int8).expand(2, -1, -1)}, "multiples of 16"),
    ),
    ids=str,
)
def test_what_the_hopper_kernel_cannot_compute(changed, reason):
    found = hopper.unfit(**{**_aligned(), **changed})
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_triton_takes_strided_rows(granularity):
    x_q, x_scale, w_q, w_scale = random_operands(3, 66, 144, 24, granularity)
    wide_x = torch.zeros(66, 3, 200, dtype=torch.int8, device=DEVICE)
    wide_x[..., :144] = x_q.transpose(0, 1)
    wide_w = torch.zeros(24, 160, dtype=torch.int8, device=DEVICE)
    wide_w[:, :144] = w_q
    strided = wide_x[..., :144].transpose(0, 1), x_scale, wide_w[:, :144], w_scale
    y = int8_linear(*strided, None, torch.float32, backend="triton")
    expected = int8_linear(x_q, x_scale, w_q, w_scale, None, torch.float32, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_any_stride(backend):
    operands = random_operands(1, 70, 48, 24, "rows")
    bias = torch.randn(48, device=DEVICE)[::2]
    y = int8_linear(*operands, bias, torch.float32, backend=backend)
    expected = int8_linear(*operands, bias.contiguous(), torch.float32, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, granularity):
    x_q, x_scale, w_q, w_scale = random_operands(1, 128, 48, 24, granularity)
    y = int8_linear(x_q[:, :0], x_scale[:, :0], w_q, w_scale, backend=backend)
    assert y.shape == (1, 0, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_blocks_restart_at_every_sample(backend):
    x_q, x_scale, w_q, w_scale = random_operands(3, 130, 136, 16, "blocks")
    y = int8_linear(x_q, x_scale, w_q, w_scale, None, torch.float32, backend=backend)
    for i in range(3):
        one = x_q[i : i + 1], x_scale[i : i + 1], w_q, w_scale
        alone = int8_linear(*one, None, torch.float32, backend="reference")
        torch.testing.assert_close(y[i], alone[0], rtol=1e-5, atol=1e-5)


def test_bad_shapes_are_refused():
    x_q, x_scale, w_q, w_scale = random_operands(2, 130, 200, 24, "blocks")
    with pytest.raises(ValueError, match=r"got \[130, 200\] and \[24, 200\]"):
        int8_linear(x_q[0], x_scale, w_q, w_scale)
    with pytest.raises(ValueError, match=r"got \[2, 130, 200\] and \[24, 199\]"):
        int8_linear(x_q, x_scale, w_q[:, 1:], w_scale)
    with pytest.raises(ValueError, match="contiguous along K, got strides"):
        int8_linear(x_q[..., ::2], x_scale, w_q[:, ::2], w_scale)
    with pytest.raises(ValueError, match=r"needs bias \[24\], got \[25\]"):
        int8_linear(x_q, x_scale, w_q, w_scale, torch.zeros(25))


def test_bad_epilogues_are_refused():
    operands = random_operands(2, 130, 200, 24, "blocks")
    whole = torch.zeros(2, 130, 24, device=DEVICE)
    with pytest.raises(ValueError, match=r"gate \[2, 1, 24\] or \[2, 130, 24\], got \[1, 1, 24\]"):
        int8_linear(*operands, gate=whole[:1, :1])
    with pytest.raises(ValueError, match=r"residual \[2, 130, 24\], got \[2, 1, 24\]"):
        int8_linear(*operands, residual=whole[:, :1])
    with pytest.raises(ValueError, match=r"out \[2, 130, 24\], got \[2, 130, 8\]"):
        int8_linear(*operands, out=whole[..., :8])
    across = torch.zeros(2, 24, 130, device=DEVICE).mT
    with pytest.raises(ValueError, match="residual contiguous along N, got strides"):
        int8_linear(*operands, residual=across)
    with pytest.raises(TypeError, match=r"a float gate, got torch\.int64"):
        int8_linear(*operands, gate=whole.long())
    with pytest.raises(TypeError, match=r"of out_dtype torch\.bfloat16, got torch\.float32"):
        int8_linear(*operands, residual=whole, out=whole)


def test_scales_of_neither_granularity_are_refused():
    x_q, x_scale, w_q, w_scale = random_operands(2, 130, 200, 24, "blocks")
    row_scale = torch.ones(24, device=DEVICE)
    with pytest.raises(ValueError, match=r"fit neither blocks.*got \[2, 2, 2\] and \[24\]"):
        int8_linear(x_q, x_scale, w_q, row_scale)
    with pytest.raises(ValueError, match=r"fit neither blocks.*got \[2, 3, 2\] and \[1, 2\]"):
        int8_linear(x_q, torch.ones(2, 3, 2), w_q, w_scale)


def test_bad_dtypes_are_refused():
    x_q, x_scale, w_q, w_scale = random_operands(1, 4, 8, 8, "rows")
    with pytest.raises(TypeError, match=r"int8 operands, got x_q torch\.float32"):
        int8_linear(x_q.float(), x_scale, w_q, w_scale)
    with pytest.raises(TypeError, match=r"fp32 scales, got torch\.float64"):
        int8_linear(x_q, x_scale.double(), w_q, w_scale)
    with pytest.raises(TypeError, match=r"got out_dtype torch\.int32"):
        int8_linear(x_q, x_scale, w_q, w_scale, out_dtype=torch.int32)
