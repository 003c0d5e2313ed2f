"""The Linear that every layer of a MODEL of ours is, asked for all that ComfyUI may ask of one."""

import contextlib

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core.host import (
    block,
    epilogue,
    int8_tensor,
    operations,
    self_attention,
    versions,
    weights,
)
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

DEVICE = in_comfyui.DEVICE
GRANULARITIES = ("rows", "blocks")
WIDTHS = {"swiglu": 512}  # of the input, where it is not twice the layer's
F = torch.nn.functional


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _linear(granularity=None, dtype=torch.float32):
    """A layer [384, 256] in float32, or in INT8 where a granularity is given."""
    linear = Linear(256, 384, dtype=dtype)
    weight, bias = _random(384, 256, seed=1) / 16, _random(384, seed=2)
    if granularity is None:
        linear.assign(weight.to(dtype), bias.to(dtype))
    else:
        linear.granularity = granularity
        linear.assign(*_quantized(weight, granularity, bias.to(dtype)))
    return linear


def _quantized(weight, granularity, bias):
    q, scale = int8_tensor.quantize_weight(weight, granularity)
    return q, bias, scale


def _expected_activation(name, x, weight, eps):
    """The formulas by themselves, in the dtype of x."""
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "swiglu":
        return x[..., :256] * torch.sigmoid(x[..., :256]) * x[..., 256:]
    if name == "rms_norm":
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    return x


ACTIVATIONS = (None, "gelu_tanh", "silu", "swiglu", "rms_norm")


@pytest.fixture
def products(monkeypatch):
    """What int8_linear was called with: its tensors' dtypes, and which of its epilogue."""
    calls = []
    for module in (operations, int8_tensor):
        original = module.int8_linear

        def noting(*args, original=original, **epilogue):
            asked = {name for name, value in epilogue.items() if value is not None}
            calls.append(({args[0].dtype, args[2].dtype}, asked - {"out_dtype"}))
            return original(*args, **epilogue)

        monkeypatch.setattr(module, "int8_linear", noting)
    return calls


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_before_the_product(granularity, name, products):
    linear = _linear(granularity)
    x, weight = _random(2, 130, WIDTHS.get(name, 256)), 1 + _random(256, seed=3) / 4
    y = linear(x, input_act=name, act_weight=weight, act_eps=1e-5)
    expected = linear(_expected_activation(name, x, weight, 1e-5))
    # In INT8 a value on the edge between two integers may fall to either side.
    assert goldens.relative_error(y, expected) < (1e-6 if granularity is None else 1e-3)
    assert goldens.relative_error(linear(x[..., :256]), expected) > 0.1 or name is None
    assert len(products) == (0 if granularity is None else 3)


def test_gelu_goes_into_the_quantizer(monkeypatch):
    activations, linear = [], _linear("rows")
    quantize_rows = epilogue.quantize_rows

    def noting(x, activation=None):
        activations.append(activation)
        return quantize_rows(x, activation=activation)

    monkeypatch.setattr(epilogue, "quantize_rows", noting)
    linear(_random(1, 130, 256), input_act="gelu_tanh")
    linear(_random(1, 130, 256), input_act="silu")
    assert activations == ["gelu_tanh", None]


SCALES = {"none": None, "channels": (384,), "one token": (1, 1, 384), "samples": (2, 1, 384)}
SCALES |= {"tokens": (2, 130, 384), "all": (2, 130, 1), "one": ()}


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("scale", SCALES)
def test_a_residual_behind_the_product(granularity, scale, products):
    linear = _linear(granularity)
    x, residual = _random(2, 130, 256), _random(2, 130, 384, seed=4)
    scale = None if SCALES[scale] is None else _random(*SCALES[scale], seed=5)
    y = linear(x, residual=residual, residual_scale=scale)
    if granularity is not None:
        epilogue = {"residual"} if scale is None else {"residual", "gate"}
        assert products == [({torch.int8}, epilogue)]
    product = linear(x)
    expected = residual + (product if scale is None else product * scale)
    assert goldens.relative_error(y, expected) < 1e-6
    assert goldens.relative_error(product, expected) > 0.1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_the_epilogue_has_no_place_for_is_added_behind_it(granularity, products):
    linear, x = _linear(granularity, torch.bfloat16), _random(2, 130, 256).bfloat16()
    residuals = {
        "another dtype": _random(2, 130, 384, seed=4),
        "one for all samples": _random(1, 130, 384, seed=4).bfloat16(),
        "tokens side by side": _random(2, 384, 130, seed=4).bfloat16().mT,
    }
    product, scale = linear(x), _random(384, seed=5).bfloat16()
    for residual in residuals.values():
        y = linear(x, residual=residual, residual_scale=scale)
        assert torch.equal(y, torch.addcmul(residual, product, scale))
    assert products == [({torch.int8}, set())] * 4


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(256,), (130, 256), (2, 3, 130, 256)])
def test_any_number_of_axes(granularity, shape):
    linear, x = _linear(granularity), _random(*shape)
    residual = _random(*shape[:-1], 384, seed=4)
    for scale in (_random(384, seed=5), _random(*shape[:-1], 384, seed=5)):
        y = linear(x, input_act="gelu_tanh", residual=residual, residual_scale=scale)
        batch = x.reshape(-1, *((1, *shape)[-2:]))
        product = linear(batch, input_act="gelu_tanh").reshape(residual.shape)
        assert goldens.relative_error(y, residual + product * scale) < 1e-6


def test_an_unknown_activation():
    for linear in (_linear(), _linear("rows")):
        with pytest.raises(ValueError, match="unknown here, got 'tanhexp': update"):
            linear(_random(1, 4, 256), input_act="tanhexp")


@pytest.mark.skipif(
    not hasattr(comfy.ops, "linear_input_act"), reason="this host has no linear_input_act"
)
@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("name", ["gelu_tanh", "swiglu"])
def test_the_hosts_own_function(granularity, name, products):
    linear, x = _linear(granularity), _random(2, 130, WIDTHS.get(name, 256))
    y = comfy.ops.linear_input_act(linear, x, name)
    assert goldens.relative_error(y, linear(_expected_activation(name, x, None, 0))) < 1e-3
    assert len(products) == (0 if granularity is None else 2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_hosts_own_product_stays_int8(granularity, bias, products):
    """Core multiplies what it fetched with torch.nn.functional.linear."""
    linear, x = _linear(granularity), _random(2, 130, 256)
    linear.bias = linear.bias if bias else None
    y = F.linear(x, linear.weight, linear.bias)
    assert products == [({torch.int8}, set())]
    assert torch.equal(y, linear(x))
    assert torch.equal(F.linear(x[0, 0], linear.weight, linear.bias), linear(x[0, 0]))


def test_the_hosts_product_in_another_dtype_is_its_own(products):
    linear, x = _linear("rows"), _random(4, 256).double()
    y = F.linear(x, linear.convert_weight(linear.weight).double(), linear.bias.double())
    assert torch.equal(F.linear(x, linear.weight.to(torch.float64), linear.bias.double()), y)
    assert not products


@pytest.mark.skipif(
    not hasattr(int8_tensor.HostTensor, "linear_input_act"),
    reason="this host's tensors have no linear_input_act",
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_hook_of_comfy_kitchen(granularity, products):
    linear, x = _linear(granularity), _random(2, 130, 256)
    residual, scale = _random(2, 130, 384, seed=4), _random(384, seed=5)
    weight = 1 + _random(256, seed=3) / 4
    for name in ("gelu_tanh", "rms_norm"):
        y = linear.weight.linear_input_act(x, linear.bias, name, weight, 1e-5, residual, scale)
        assert torch.equal(y, linear(x, name, weight, 1e-5, residual, scale))
        named = {"input_act_weight": weight, "input_act_eps": 1e-5, "residual": residual}
        named |= {"input_act": name, "residual_scale": scale}
        hook = int8_tensor.TurboInt8Layout.linear_input_act
        assert torch.equal(hook(linear.weight, x, linear.bias, **named), y)
    assert linear.weight.linear_input_act(x.double(), linear.bias) is NotImplemented


# In a model

# What the fused block rounds otherwise: 5.0e-4 to 7.2e-4 on the CPU, by its vector instructions. A
# GPU computes in bf16.
UNFUSED = 2e-2 if torch.cuda.is_available() else 5e-3


@pytest.fixture(scope="module")
def models(paths):
    return [load_turbo_model(path, "exact") for path in paths]


def _forward(model):
    data = goldens.load("forward")
    x = data["t2v.ragged.x"][..., :1, :, :]  # 224 tokens
    return in_comfyui.velocity(model, x, data["t2v.ragged.context"], 987.5)


def _newer_feed_forward(linear_up, linear_down):
    def forward(x):
        return linear_down(linear_up(x), input_act="gelu_tanh")

    return forward


@pytest.mark.parametrize("index", [0, 1], ids=["INT8", "float"])
def test_a_block_as_a_newer_host_calls_it(models, index, products):
    """ComfyUI 0.39 hands the activation to the Linear; such a block runs as the host has it."""
    model = models[index].clone()
    before = _forward(model)
    for number in range(2):
        ffn = model.get_model_object(f"diffusion_model.blocks.{number}.ffn")
        forward = _newer_feed_forward(ffn[0], ffn[2])
        model.add_object_patch(f"diffusion_model.blocks.{number}.ffn.forward", forward)
    products.clear()
    assert goldens.relative_error(_forward(model), before) < UNFUSED
    assert len(products) == (0 if index else 2 * 10)


def test_a_model_that_the_host_multiplies_stays_int8(models, monkeypatch, products):
    before = _forward(models[0])

    def core(linear, x):
        with operations.fetched(linear, x.dtype, x.device) as (weight, bias):
            return F.linear(x, weight, bias)

    def never(*_, **__):
        raise AssertionError("an INT8 weight was dequantized")

    monkeypatch.setattr(Linear, "forward", core)
    monkeypatch.setattr(block, "why_not_fused", lambda *_: "the host multiplies")
    monkeypatch.setattr(int8_tensor.TurboInt8Layout, "dequantize", never)
    products.clear()
    assert goldens.relative_error(_forward(models[0]), before) < UNFUSED
    assert len(products) == 2 * 10


@contextlib.contextmanager
def _counting(monkeypatch):
    """How many weights were fetched, and how many the host has back."""
    counts = {"fetched": 0, "back": 0}
    for name, count in (("cast_bias_weight", "fetched"), ("uncast_bias_weight", "back")):
        original = getattr(comfy.ops, name)

        def counted(*args, original=original, count=count, **options):
            result = original(*args, **options)
            counts[count] += 1
            return result

        monkeypatch.setattr(comfy.ops, name, counted)
    yield counts


def _pinned(model):
    """How much dynamic VRAM holds pinned of the model: weights, or pages on a GPU."""
    rooms = {m._v[0] for m in model.model.modules() if hasattr(m, "_v")}
    if torch.cuda.is_available():
        return sum(bool(page & 2) for room in rooms for page in room.get_residency())
    return sum(count for room in rooms for count in room.pins.values())


def _products_fail(monkeypatch):
    monkeypatch.setattr(operations, "int8_linear", _out_of_memory)


def _requantizing_fails(monkeypatch):
    monkeypatch.setattr(operations, "_weight_operands", _out_of_memory)


def _norms_fail(monkeypatch):
    monkeypatch.setattr(weights, "resident", lambda *_: None)  # as where they are streamed
    monkeypatch.setattr(weights, "kept", _out_of_memory)


def _float_products_fail(monkeypatch):
    monkeypatch.setattr(operations.torch.nn.functional, "linear", _out_of_memory)


def _out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize(
    "fails", [_products_fail, _requantizing_fails, _norms_fail, _float_products_fail]
)
def test_the_host_has_its_weights_back_after_an_error(models, monkeypatch, fails):
    model = models[0]
    before, pinned = _forward(model), _pinned(model)
    with monkeypatch.context() as patch, _counting(patch) as counts:
        fails(patch)
        with pytest.raises(torch.OutOfMemoryError):
            _forward(model)
        assert counts["fetched"] == counts["back"] > 0
    assert _pinned(model) == pinned
    assert torch.equal(_forward(model), before)
    assert _pinned(model) == pinned


@pytest.mark.skipif(not in_comfyui.DYNAMIC, reason="without dynamic VRAM nothing is pinned")
def test_the_host_has_pins_for_all_that_it_streams(models):
    _forward(models[0])
    streamed = [module for module in models[0].model.modules() if hasattr(module, "_v")]
    assert len(streamed) >= 2 * 10
    assert all(hasattr(module, "_pin_state") for module in streamed)


# ComfyUI's compiler, see versions.py


@pytest.mark.parametrize("fused", [True, False])
def test_what_outlives_a_block_is_not_recorded(models, monkeypatch, fused):
    depth, inside = [0], []

    @contextlib.contextmanager
    def pause():
        assert depth[0] == 0, "pauses do not nest"
        depth[0] += 1
        try:
            yield
        finally:
            depth[0] -= 1

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args, **options):
            inside.append((name, depth[0]))
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)

    monkeypatch.setattr(versions, "pause_malloc_graph", pause)
    for module, name in (
        *((operations, "int8_linear"), (block, "layer_norm_quant")),
        *((self_attention, "sla"), (self_attention, "sla_from_projections")),
    ):
        watch(module, name)
    if not fused:
        monkeypatch.setattr(block, "why_not_fused", lambda *_: "this is a test")
    _forward(patch_attention(models[0], SLASettings("sla", 0.34)))
    expected = ("layer_norm_quant", "sla_from_projections") if fused else ("sla",)
    assert {name for name, _ in inside} == {"int8_linear", *expected}
    assert all(paused for _, paused in inside)
    with pytest.raises(RuntimeError), versions.unrecorded():
        raise RuntimeError
    assert depth == [0]


@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_that_moves_is_trained_as_before(trained):
    linear = _linear()
    linear.weight.requires_grad_(trained)
    linear.double()
    assert linear.weight.dtype == torch.float64
    assert linear.weight.requires_grad is trained
    assert not linear.bias.requires_grad


def test_the_host_has_its_weight_back_after_a_cast_that_fails(monkeypatch):
    class OutOfMemory(torch.Tensor):
        def to(self, *_):
            raise torch.OutOfMemoryError

    linear, given, back = _linear(), torch.zeros(1).as_subclass(OutOfMemory), []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *_, **__: (given, None, "stream"))
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *what: back.append(what))
    with pytest.raises(torch.OutOfMemoryError), weights.fetched(linear, torch.float16, DEVICE):
        pass
    assert len(back) == 1
    assert back[0][0] is linear and back[0][1] is given and back[0][2:] == (None, "stream")


def _with(linear, **attributes):
    for name, value in attributes.items():
        setattr(linear, name, value)
    return linear


@pytest.mark.parametrize("granularity", [None, "rows"], ids=["float32", "int8"])
def test_weights_that_lie_where_they_are_used_are_not_fetched(granularity, monkeypatch):
    for name in ("cast_bias_weight", "uncast_bias_weight"):
        monkeypatch.setattr(comfy.ops, name, lambda *_, **__: pytest.fail("the host was asked"))
    linear = _linear(granularity).to("cpu")
    with weights.fetched(linear, torch.float32, torch.device("cpu")) as (weight, bias):
        assert weight is linear.weight
        assert bias is linear.bias


def test_a_norm_without_a_bias_is_not_fetched_either():
    """The host gives its RMSNorm a bias, which is None, beside its parameters."""
    norm = comfy.ops.manual_cast.RMSNorm(8, dtype=torch.float32, device="cpu")
    found = weights.resident(norm, torch.float32, torch.device("cpu"))
    assert found[0] is norm.weight
    assert found[1] is None


NOT_RESIDENT = {
    "on another device": lambda: _linear().to("meta"),
    "in another dtype": lambda: _linear(dtype=torch.float16),
    "with a bias in another dtype": lambda: _linear("rows", torch.float16),
    "with a LoRA": lambda: _with(_linear("rows"), weight_function=[torch.neg]),
    "with one on its bias": lambda: _with(_linear("rows"), bias_function=[torch.neg]),
    "that the host moves by itself": lambda: _with(_linear("rows"), _v=object()),
    "that are not there": lambda: Linear(256, 384),
}


@pytest.mark.parametrize("make", NOT_RESIDENT.values(), ids=NOT_RESIDENT)
def test_the_host_is_asked_for_weights(make):
    assert weights.resident(make(), torch.float32, torch.device("cpu")) is None
