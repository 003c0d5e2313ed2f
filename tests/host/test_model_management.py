"""TurboDiffusion models under ComfyUI's own management: clones, LoRA, offload, options, errors."""

import contextlib
import copy
import itertools

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core import activation_memory
from turbodiffusion_pack.turbo_core.host import block, weights
from turbodiffusion_pack.turbo_core.host.int8_tensor import requantize, unpack
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear
from turbodiffusion_pack.turbo_core.host.options import ATTENTION
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

KEY = "t2v.ragged"
management = comfy.model_management


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: str(goldens.unpack_checkpoint(name, folder)) for name in ("t2v.pth", "t2v-quant.pth")
    }


@pytest.fixture
def int8_model(paths):
    return load_turbo_model(paths["t2v-quant.pth"])


def _forward(model):
    data = goldens.load("forward")
    return in_comfyui.velocity(model, data[f"{KEY}.x"], data[f"{KEY}.context"], 987.5)


def _sample(model, mode="sde", steps=3, seed=0, callback=None):
    data = goldens.load("rcm")
    sampler = rcm_sampler(mode)
    sigmas = rcm_sigmas(steps, 80)
    noise = data["t2v.noise0"]
    return in_comfyui.sample(model, sampler, sigmas, noise, data["t2v.context"], seed, callback)


def _linears(model):
    blocks = model.model.diffusion_model.blocks
    return {n: m for n, m in blocks.named_modules() if isinstance(m, Linear) and "proj_l" not in n}


def test_int8_stays_int8_and_equals_the_file(paths, int8_model):
    file = torch.load(paths["t2v-quant.pth"], weights_only=True)
    assert len(_linears(int8_model)) == 2 * 10
    for name, linear in _linears(int8_model).items():
        q, scale = unpack(linear.weight)
        assert torch.equal(q.cpu(), file[f"blocks.{name}.int8_weight"])
        assert torch.equal(scale.cpu(), file[f"blocks.{name}.scale"])


def test_norms_stay_in_float32(int8_model):
    """With dynamic VRAM the host casts a weight over 16 KiB, as real models' norms are, to this."""
    modules = list(int8_model.model.diffusion_model.blocks[0].named_modules())
    norms = {n: m for n, m in modules if "norm" in n and getattr(m, "weight", None) is not None}
    assert len(norms) == 5
    for norm in norms.values():
        assert norm.weight_comfy_model_dtype == norm.weight.dtype == torch.float32


def test_what_dynamic_vram_patched_comes_in_the_dtype_asked_for(monkeypatch):
    """The host then hands weights out in the dtype that it keeps."""

    def kept(op, **_):
        return op.weight.bfloat16(), op.bias.bfloat16(), None

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", kept)
    op = Linear(4, 4, dtype=torch.float32)
    op.assign(torch.randn(4, 4), torch.randn(4))
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *_: None)
    with weights.fetched(op, torch.float32, torch.device("cpu")) as (weight, bias):
        assert weight.dtype == bias.dtype == torch.float32


def test_the_host_counts_int8_weights_once(paths, int8_model):
    file = torch.load(paths["t2v-quant.pth"], weights_only=True)
    size = sum(t.nbytes for t in file.values())
    # Only the patch embedding is wider in ComfyUI's model than in the file (fp32 for bf16).
    assert size <= int8_model.model_size() <= 1.05 * size


def test_the_input_of_a_patch_is_untouched(int8_model):
    before = _forward(int8_model)
    options = dict(int8_model.model_options["transformer_options"][ATTENTION])
    dense = patch_attention(int8_model, SLASettings("dense"))
    assert goldens.relative_error(_forward(dense), before) > 1e-2
    assert int8_model.model_options["transformer_options"][ATTENTION] == options
    assert torch.equal(_forward(int8_model), before)


def test_a_removed_patch_leaves_the_stock_model(paths):
    model = load_turbo_model(paths["t2v.pth"])
    _forward(model)
    model.unpatch_model()
    for wan_block in model.model.diffusion_model.blocks:
        attn = wan_block.self_attn
        assert attn.forward.__func__ is type(attn).forward


def test_two_models_side_by_side(paths, int8_model):
    bf16_model = load_turbo_model(paths["t2v.pth"])
    alone = [_forward(int8_model), _forward(bf16_model)]
    assert goldens.relative_error(*alone) > 1e-3
    for _ in range(2):
        assert torch.equal(_forward(int8_model), alone[0])
        assert torch.equal(_forward(bf16_model), alone[1])


def _lora(model, rank=4, strength=0.05):
    """A LoRA on every q and ffn.2 of the blocks, with ComfyUI's key names."""
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for name, linear in _linears(model).items():
        if name.endswith((".q", "ffn.2")):
            key = f"diffusion_model.blocks.{name}"
            down = torch.randn(rank, linear.in_features, generator=generator)
            up = torch.randn(linear.out_features, rank, generator=generator)
            lora |= {f"{key}.lora_A.weight": down * strength, f"{key}.lora_B.weight": up * strength}
    return lora


def test_int8_weights_are_copied_and_written_as_a_whole(int8_model):
    """As the host does it to keep a weight and to put it back."""
    weight = _linears(int8_model)["0.self_attn.q"].weight
    assert type(weight).__name__ in management.PINNING_ALLOWED_TYPES
    kept = [tensor.clone() for tensor in unpack(weight)]
    own = weight.to(weight.device, copy=True)
    other = own.clone()
    for tensor in unpack(other):
        tensor.mul_(0.5 if tensor.is_floating_point() else -1)
    own.data.copy_(other)
    assert all(map(torch.equal, unpack(own), unpack(other)))
    assert all(map(torch.equal, unpack(weight), kept))
    own.data.copy_(weight.dequantize().float())
    again = requantize(weight.dequantize().float(), weight, torch.float32)
    assert all(map(torch.equal, unpack(own), unpack(again)))


def _integers(model):
    """Copies on the CPU, wherever the host keeps the weights now."""
    return {n: unpack(m.weight)[0].to("cpu", copy=True) for n, m in _linears(model).items()}


def test_int8_weights_are_deep_copied(int8_model):
    """As other nodes do it, who want a model of their own."""
    linear = _linears(int8_model)["0.self_attn.q"]
    kept = [tensor.clone() for tensor in unpack(linear.weight)]
    copied, again = copy.deepcopy([linear, linear])
    assert copied is again
    assert isinstance(copied.weight, torch.nn.Parameter)
    for tensor in unpack(copied.weight):
        tensor.zero_()
    assert all(map(torch.equal, unpack(linear.weight), kept))
    copied = copy.deepcopy(linear)
    x = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(0))
    comfy.model_management.load_models_gpu([int8_model])
    outputs = [op.to(in_comfyui.DEVICE)(x.to(in_comfyui.DEVICE)) for op in (linear, copied)]
    assert torch.equal(*outputs)


def test_lora_on_int8_weights_and_back(int8_model):
    before = _forward(int8_model)
    weights = _integers(int8_model)
    patched, _ = comfy.sd.load_lora_for_models(int8_model, None, _lora(int8_model), 1.0, 0.0)
    assert goldens.relative_error(_forward(patched), before) > 5e-3
    changed = [n for n, q in _integers(patched).items() if not torch.equal(q, weights[n])]
    # With dynamic VRAM the host adds a LoRA to a copy.
    expected = [n for n in weights if n.endswith((".q", "ffn.2")) and not in_comfyui.DYNAMIC]
    assert changed == expected
    assert torch.equal(_forward(int8_model), before)
    for name, q in _integers(int8_model).items():
        assert torch.equal(q, weights[name])


def test_streamed_weights_give_the_same_output(int8_model):
    """Weights that do not fit stay offloaded and are fetched per use, LoRA included."""
    data = goldens.load("forward")
    original = _forward(int8_model)
    patched, _ = comfy.sd.load_lora_for_models(int8_model, None, _lora(int8_model), 1.0, 0.0)
    resident = _forward(patched)
    per_use = "weight_lowvram_function" if in_comfyui.DYNAMIC else "weight_function"
    with in_comfyui.streamed(patched):
        assert all(getattr(m, per_use) for n, m in _linears(patched).items() if n.endswith(".q"))
        streamed = in_comfyui.apply(patched, data[f"{KEY}.x"], data[f"{KEY}.context"], 987.5)
    # On a GPU the host adds a LoRA to resident and to streamed weights in different dtypes.
    bound = 1e-2 if torch.cuda.is_available() else 2e-3
    assert goldens.relative_error(streamed, resident) < bound
    bound = 1e-2 if torch.cuda.is_available() else 1e-5
    assert goldens.relative_error(_forward(int8_model), original) <= bound


class Stream:
    """Stands in for a CUDA stream, which the CPU has none of."""

    as_context = staticmethod(contextlib.nullcontext)

    def wait_stream(self, other):
        pass


@pytest.mark.skipif(
    not hasattr(management, "get_cast_buffer") or torch.cuda.is_available() or in_comfyui.DYNAMIC,
    reason="this host streams weights into other buffers, or a GPU has real streams",
)
def test_a_streamed_weight_outlives_no_buffer(int8_model, monkeypatch):
    """The host streams weights into one buffer per stream, over those it streamed before."""
    resident = _forward(int8_model)
    streams, used = itertools.cycle((Stream(), Stream())), []

    def next_stream(device):
        used.append(next(streams))
        return used[-1]

    monkeypatch.setattr(management, "get_offload_stream", next_stream)
    monkeypatch.setattr(management, "sync_stream", lambda *_: None)
    monkeypatch.setattr(management, "current_stream", lambda _: None)
    monkeypatch.setattr(management, "STREAM_CAST_BUFFERS", {})
    monkeypatch.setattr(management, "LARGEST_CASTED_WEIGHT", (None, 0))
    # To the host "cpu:0" is another device than the "cpu" where the weights are.
    cast, elsewhere = comfy.ops.cast_bias_weight, {"device": torch.device("cpu", 0)}

    def streaming(op, input=None, **options):
        return cast(op, input, **{**options, **elsewhere})

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", streaming)
    streamed = _forward(int8_model)
    assert len(used) > 2 * 10
    assert goldens.relative_error(streamed, resident) <= 1e-6


@pytest.mark.parametrize("granularity", ["fast", "exact"])
def test_values_in_halves_equal_the_whole(paths, monkeypatch, granularity):
    model = load_turbo_model(paths["t2v-quant.pth"], granularity)
    x = torch.randn(1, 16, 3, 16, 30, generator=torch.Generator().manual_seed(5))
    context, halves, made = goldens.load("forward")[f"{KEY}.context"], block._in_halves, []
    monkeypatch.setattr(block, "_in_halves", lambda op, *args: made.append(op) or halves(op, *args))
    outputs = []
    for limit in (activation_memory.HALVED_BYTES, 0):
        monkeypatch.setattr(activation_memory, "HALVED_BYTES", limit)
        outputs.append(in_comfyui.velocity(model, x, context, 987.5))
    assert made == [wan_block.self_attn.v for wan_block in model.model.diffusion_model.blocks]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("granularity", ["fast", "exact"])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_in_chunks_equal_the_whole(paths, monkeypatch, granularity, batch):
    """In attention to the text and in the feed-forward layers."""
    model = load_turbo_model(paths["t2v-quant.pth"], granularity)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 16, 3, 16, 30, generator=generator)  # 360 tokens: 256 and 104
    context = goldens.load("forward")[f"{KEY}.context"].repeat(batch, 1, 1)
    outputs, calls, linear = [], [], block.int8_linear
    normed, norm = [], block.layer_norm_quant

    def counted(*args, **epilogue):
        calls.append(args[0].shape[1])
        return linear(*args, **epilogue)

    def noted(x, *args, **options):
        normed.append(x.shape[1])
        return norm(x, *args, **options)

    monkeypatch.setattr(block, "int8_linear", counted)
    monkeypatch.setattr(block, "layer_norm_quant", noted)
    monkeypatch.setattr(activation_memory, "TEXT_ACTIVATIONS", 0)
    wan = model.model.diffusion_model
    sizes = activation_memory.HIDDEN_BYTES * wan.ffn_dim, activation_memory.TEXT_BYTES * wan.dim
    for limit in (activation_memory.PART_BYTES, batch * 256 * min(sizes)):
        monkeypatch.setattr(activation_memory, "PART_BYTES", limit)
        outputs.append(in_comfyui.velocity(model, x, context, 987.5))
    # To the text and up, and back, in two blocks.
    assert calls[:8] == 8 * [360] and 104 in calls[8:] and {*calls[8:]} <= {256, 128, 104}, calls
    assert normed == 2 * 6 * [360]  # in whole either way
    assert goldens.relative_error(outputs[1], outputs[0]) <= 1e-6
