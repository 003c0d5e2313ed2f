"""W8A8Quantize: the original's INT8 checkpoint out of its float one, and any other Wan MODEL."""

import gc
import json
import logging
import mmap
import os
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import goldens
import in_comfyui
import parity
import pytest
import torch
from in_comfyui import comfy
from peak_memory import can_measure
from safetensors.torch import save_file
from turbodiffusion_pack.nodes.quantize import W8A8Quantize
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host import experts, quantize_model, scheduler, weights
from turbodiffusion_pack.turbo_core.host.int8_tensor import dequantize_weight, is_int8, unpack
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings
from zero_checkpoint import official_zeros

# To the original; tests/support/parity_margins.py measures how much room it leaves.
BOUND = 7.4e-3
# Between INT8 and float weights; a GPU computes both in 16 bits.
NEAR = 2e-2 if torch.cuda.is_available() else 1e-2
# The modulation of a saved model loads in bf16, which a GPU computes in too; with dynamic VRAM
# every float weight is cast to it at use.
SAVED = 1e-2 if torch.cuda.is_available() else 4e-3 if in_comfyui.DYNAMIC else 3e-4
GOLDENS = sorted(
    key for key in goldens.load("forward") if re.match(r"t2v\.\w+\.out\.(original|sla)\.int8", key)
)
# The original divides 128 / amax with the GPU's fast division, an ulp off in four blocks, which
# turns one exact half each the other way (tests/kernels/test_int8_quant.py has the same).
TURNED = {
    "blocks.0.self_attn.v",
    "blocks.0.cross_attn.q",
    "blocks.1.cross_attn.q",
    "blocks.1.cross_attn.v",
}
MIB = 2**20
ON_LOAD = comfy.patcher_extension.CallbacksMP.ON_LOAD

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the fp32 references run on the CPU")


def _quantize(model, granularity="exact", report=False):
    return W8A8Quantize.execute(model, granularity, report).args[0]


@pytest.fixture(scope="module")
def float_model(paths):
    return load_turbo_model(paths[1])


@pytest.fixture(scope="module")
def exact(float_model):
    return _quantize(float_model)


@pytest.fixture(scope="module")
def stock_tensors(paths):
    """The plain golden checkpoint as other loaders know it, without proj_l."""
    return read_checkpoint(paths[1]).tensors


def _stock(tensors, **options):
    return comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options=options)


def _int8(model):
    """(int8, scales) of every INT8 weight by its name, on the CPU."""
    modules = model.model.diffusion_model.named_modules()
    weights = {name: getattr(module, "weight", None) for name, module in modules}
    int8 = {name: unpack(weight) for name, weight in weights.items() if is_int8(weight)}
    return {name: (q.cpu(), scale.cpu()) for name, (q, scale) in int8.items()}


def _forward(model, timestep=987.5):
    data = goldens.load("forward")
    return in_comfyui.velocity(model, data["t2v.ragged.x"], data["t2v.ragged.context"], timestep)


# The original's checkpoint and outputs


def test_the_plain_checkpoint_becomes_the_quantized_one(paths, exact):
    file, found = torch.load(paths[0], weights_only=True), _int8(exact)
    assert {f"{name}.int8_weight" for name in found} == {n for n in file if "int8_weight" in n}
    turned = set()
    for name, (q, scale) in found.items():
        golden = file[f"{name}.int8_weight"]
        assert torch.equal(scale, file[f"{name}.scale"])
        if not torch.equal(q, golden):
            turned.add(name)
            assert (q.int() - golden).abs().sum() == 1
    assert turned == TURNED


def test_the_rest_stays_as_it_is(float_model, exact):
    found, expected = exact.model.state_dict(), float_model.model.state_dict()
    int8 = {f"diffusion_model.{name}.weight" for name in _int8(exact)}
    assert found.keys() == expected.keys() | {f"{name}_scale" for name in int8}
    for name in expected.keys() - int8:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name].cpu(), expected[name].cpu())


def _golden_error(model, key):
    with parity.at_block_maps(goldens.load("block_maps").get(key, ())):
        return parity.forward_error(model, key)


@on_cpu
@pytest.mark.parametrize("granularity", ["exact", "fast"])
@pytest.mark.parametrize("key", GOLDENS)
def test_the_output_is_the_originals(float_model, exact, key, granularity):
    model = exact if granularity == "exact" else _quantize(float_model, "fast")
    assert _golden_error(model, key) <= BOUND


MUTANTS = {
    "6 bits": lambda q, scale: (q // 4 * 4, scale),
    "scales of other blocks": lambda q, scale: (q, scale.flip(0)),
}


@on_cpu
@pytest.mark.parametrize("key", [GOLDENS[0], GOLDENS[-1]])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_weights_miss_the_bound(float_model, monkeypatch, key, mutant):
    quantize_weight = quantize_model.quantize_weight
    wrong = lambda *weight: MUTANTS[mutant](*quantize_weight(*weight))  # noqa: E731
    monkeypatch.setattr(quantize_model, "quantize_weight", wrong)
    assert _golden_error(_quantize(float_model), key) > BOUND


def test_fast_has_one_scale_per_output_channel(float_model):
    for name, (q, scale) in _int8(_quantize(float_model, "fast")).items():
        weight = float_model.model.diffusion_model.get_submodule(name).weight.float()
        assert scale.shape == (len(q),)
        torch.testing.assert_close(scale, weight.abs().amax(1) / 128)


# Models of other loaders


def _scaled_fp8(tensors):
    """The checkpoint as ComfyUI's scaled fp8 files have it: every Linear with a scale."""
    scaled = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.float().abs().amax() / 448
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.replace(".weight", ".scale_weight")] = scale
        else:
            scaled[name] = tensor
    return scaled


KINDS = {
    "bf16": lambda t: _stock(t, dtype=torch.bfloat16),
    "fp16": lambda t: _stock(t, dtype=torch.float16),
    "fp32": lambda t: _stock(t, dtype=torch.float32),
    "fp8": lambda t: _stock(t, dtype=torch.float8_e4m3fn),
    "fp8 e5m2": lambda t: _stock(t, dtype=torch.float8_e5m2),
    "scaled fp8": lambda t: _stock(_scaled_fp8(t)),
}


@pytest.mark.parametrize("granularity", ["fast", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_stock_wan_model(stock_tensors, caplog, kind, granularity):
    caplog.set_level(logging.INFO)
    model = KINDS[kind](stock_tensors)
    before, names = _forward(model), [n for n, _ in model.model.named_parameters()]
    # With dynamic VRAM the host keeps the file's bf16, which is quantized, and casts to fp8 at use.
    kept_float = in_comfyui.DYNAMIC and kind in ("fp8", "fp8 e5m2")
    expected = _forward(KINDS["bf16"](stock_tensors)) if kept_float else before
    quantized = _quantize(model, granularity)
    assert len(_int8(quantized)) == 20
    wan = model.model.diffusion_model
    for name, (q, scale) in _int8(quantized).items():
        weight = quantize_model._float_weight(wan.get_submodule(name), q.device)
        assert goldens.relative_error(dequantize_weight(q, scale, torch.float32), weight) < 1.1e-2
    assert 1e-5 < goldens.relative_error(_forward(quantized), expected) < NEAR
    assert [n for n, _ in model.model.named_parameters()] == names
    assert torch.equal(_forward(model), before)


def test_blocks_run_fused_in_a_stock_model(stock_tensors, caplog):
    caplog.set_level(logging.INFO)
    with run_report.run() as report:
        _forward(_quantize(_stock(stock_tensors)))
    line = report.line()
    assert "SLA in 0 of 2 blocks; dense in blocks 0-1: dense attention chosen" in line
    assert "; fused in blocks 0-1; INT8 exact (128x128 blocks) in 20 linears" in line


def test_scaled_fp8_can_be_saved_once_it_is_int8(stock_tensors, tmp_path):
    quantized = _quantize(_stock(_scaled_fp8(stock_tensors)), "fast")
    save_turbo_model(quantized, tmp_path / "a.safetensors")
    again = load_turbo_model(str(tmp_path / "a.safetensors"))
    for name, pair in _int8(quantized).items():
        assert all(map(torch.equal, _int8(again)[name], pair))
    again.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
    assert goldens.relative_error(_forward(again), _forward(quantized)) < SAVED


wan = comfy.ldm.wan.model
SIZES = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
# name: (model, options, further inputs by their shapes, INT8 linears)
VARIANTS = {
    "2.1 i2v": (
        wan.WanModel,
        {"model_type": "i2v", "in_dim": 36},
        {"clip_fea": (1, 257, 1280)},
        24,
    ),
    "2.2 A14B i2v": (wan.WanModel, {"model_type": "t2v", "in_dim": 36}, {}, 20),
    "2.2 5B": (wan.WanModel, {"model_type": "t2v", "in_dim": 48, "out_dim": 48}, {}, 20),
    "vace": (
        wan.VaceWanModel,
        {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96, "in_dim": 16},
        {"vace_context": (1, 1, 96, 3, 16, 16)},
        20,
    ),
    "camera": (
        wan.CameraWanModel,
        {"model_type": "camera", "in_dim": 32, "in_dim_control_adapter": 24},
        {},
        24,
    ),
    "humo": (wan.HumoWanModel, {"in_dim": 36}, {"audio_embed": (1, 3, 8, 5, 1280)}, 20),
    "s2v": (wan.WanModel_S2V, {"in_dim": 16}, {}, 20),
}


def _variant(name):
    """A tiny random model of a kind, through ComfyUI's own detection and loader."""
    kind, options, _, _ = VARIANTS[name]
    tensors = in_comfyui.random_weights(kind, **SIZES, **options)
    return _stock(tensors, dtype=torch.float32), options["in_dim"]


def _variant_forward(model, channels, shapes):
    """The velocity for random latents and context; `shapes` are of further inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, channels, 3, 16, 16, generator=generator).to(in_comfyui.DEVICE)
    context = torch.randn(1, 20, 4096, generator=generator).to(in_comfyui.DEVICE)
    further = {n: torch.randn(s, generator=generator).to(x) for n, s in shapes.items()}
    if "vace_context" in shapes:
        further["vace_strength"] = [1.0]
    comfy.model_management.load_models_gpu([model])
    options = dict(model.model_options["transformer_options"], wrappers=model.wrappers)
    timestep = torch.tensor([900.0], device=x.device)
    return model.model.diffusion_model(x, timestep, context, transformer_options=options, **further)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_wan_model(name):
    _, _, shapes, count = VARIANTS[name]
    model, channels = _variant(name)
    quantized = _quantize(model, "fast")
    assert type(quantized.model) is type(model.model)
    assert type(quantized.model.diffusion_model) is type(model.model.diffusion_model)
    assert len(_int8(quantized)) == count
    assert all(re.match(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.", n) for n in _int8(quantized))
    before, after = (_variant_forward(patcher, channels, shapes) for patcher in (model, quantized))
    assert goldens.relative_error(after, before) < 2e-2


@pytest.mark.parametrize("granularity", ["fast", "exact"])
def test_a_saved_model_with_an_image_branch_loads_again(tmp_path, granularity):
    _, _, shapes, count = VARIANTS["2.1 i2v"]
    model, channels = _variant("2.1 i2v")
    quantized = _quantize(model, granularity)
    save_turbo_model(quantized, tmp_path / "i2v.safetensors")
    again = load_turbo_model(str(tmp_path / "i2v.safetensors"), granularity)
    assert type(again.model.diffusion_model.blocks[0].cross_attn) is wan.WanI2VCrossAttention
    assert len(_int8(again)) == count
    for name, pair in _int8(quantized).items():
        assert all(map(torch.equal, _int8(again)[name], pair))
    outputs = [_variant_forward(patcher, channels, shapes) for patcher in (quantized, again)]
    assert goldens.relative_error(*outputs) < SAVED


# The input, and what it carries


def _state(model):
    """Everything of a MODEL that a node could change by mistake, and copies of its weights."""
    parameters = {n: (id(p), p.clone()) for n, p in model.model.named_parameters()}
    carried = (
        dict(model.patches),
        dict(model.object_patches),
        json.dumps(model.model_options, default=str),
        {kind: dict(keys) for kind, keys in model.wrappers.items()},
        {kind: dict(keys) for kind, keys in model.callbacks.items()},
        model.patches_uuid,
        model.parent,
    )
    return parameters, carried


def test_the_input_is_untouched(paths):
    model = load_turbo_model(paths[1])
    base, modules = model.model, [id(m) for m in model.model.modules()]
    parameters, carried = _state(model)
    before = _forward(model)
    quantized = _quantize(model)
    _forward(quantized)
    after_parameters, after_carried = _state(model)
    assert model.model is base
    assert [id(m) for m in base.modules()] == modules
    assert after_carried == carried
    for name, (identity, values) in parameters.items():
        identity_after, values_after = after_parameters[name]
        assert torch.equal(values_after.cpu(), values.cpu())
        if not torch.cuda.is_available() and not in_comfyui.DYNAMIC:  # a moved weight is a new one
            assert identity_after == identity
    assert torch.equal(_forward(model), before)


def test_no_weight_is_shared(float_model, exact):
    def memory(model):
        storage = (getattr(p, "_qdata", p) for p in model.model.parameters())
        return {s.data_ptr() for s in storage}

    assert not memory(float_model) & memory(exact)
    assert exact.parent.parent is None, "the host falls back to a patcher's parent"


def test_patches_are_carried_over(stock_tensors):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append("wrapper")
        return executor(*args, **kwargs)

    def theirs(module, x, *args, **kwargs):
        seen.append(module)
        return torch.zeros_like(x)

    model = _stock(stock_tensors)
    (model,) = ModelSamplingSD3().patch(model, 3.0)
    cross = model.model.diffusion_model.blocks[0].cross_attn
    model.add_object_patch(
        "diffusion_model.blocks.0.cross_attn.forward", types.MethodType(theirs, cross)
    )
    model.add_wrapper_with_key("diffusion_model", "theirs", wrapper)
    model.add_callback_with_key(ON_LOAD, "theirs", lambda *_: seen.append("loaded"))
    model.model_options["transformer_options"]["theirs"] = 1
    model.set_attachments("theirs", "kept")
    quantized = _quantize(model)
    assert quantized.get_model_object("model_sampling").shift == 3.0
    assert quantized.model_options["transformer_options"]["theirs"] == 1
    assert quantized.get_attachment("theirs") == "kept"
    _forward(quantized)
    assert seen == ["loaded", "wrapper", quantized.model.diffusion_model.blocks[0].cross_attn]


def test_attention_settings_are_carried_over(float_model):
    settings = SLASettings("sla", 0.34, (1,))
    before = patch_attention(float_model, settings)
    quantized = _quantize(before)
    assert torch.equal(
        _forward(quantized),
        _forward(patch_attention(_quantize(float_model), settings)),
    )


def test_where_the_scheduler_starts_is_carried_over(paths):
    model = load_turbo_model(paths[1])
    scheduler.carry_sigma_max(model, 200)
    quantized = _quantize(model)
    sigmas = scheduler.rcm_schedule(quantized.get_model_object("model_sampling"), 4)
    assert torch.equal(sigmas, rcm_sigmas(4, 200))


def _lora(model, strength=0.1):
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2"):
        rows, columns = model.model.diffusion_model.get_submodule(name).weight.shape
        for side, shape in (("A", (4, columns)), ("B", (rows, 4))):
            tensor = strength * torch.randn(shape, generator=generator)
            lora[f"diffusion_model.{name}.lora_{side}.weight"] = tensor
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def test_a_lora_before_equals_one_behind(float_model, exact):
    before = _lora(float_model)
    _forward(before)  # so that the weights hold the LoRA when they are to be quantized
    quantized = _quantize(before)
    for name, (q, _) in _int8(exact).items():
        assert torch.equal(q, _int8(quantized)[name][0]), "the LoRA is no part of the weights"
    out = _forward(quantized)
    assert torch.equal(out, _forward(_lora(exact)))
    assert goldens.relative_error(out, _forward(exact)) > 1e-2
    assert goldens.relative_error(out, _forward(before)) < NEAR


@pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "get_clone_model_override"),
    reason="this ComfyUI loads no model twice",
)
def test_hosts_can_load_it_again(paths):
    quantized = _quantize(load_turbo_model(paths[1]))
    again = quantized.clone(force_deepcopy=True)
    assert again.model is not quantized.model
    for name, tensors in _int8(quantized).items():
        assert all(map(torch.equal, _int8(again)[name], tensors))
    assert torch.equal(_forward(again), _forward(quantized))


# Report, memory, cancel


def test_the_report_names_every_layer(float_model, caplog):
    caplog.set_level(logging.INFO)
    out = W8A8Quantize.execute(float_model, "exact", True)
    quantized, text = out.args
    assert out.ui.as_dict() == {"text": (text,)}
    errors = dict(re.findall(r"^(blocks\S+) +(\S+)$", text, re.M))
    assert set(errors) == set(_int8(quantized))
    for name, (q, scale) in _int8(quantized).items():
        weight = float_model.model.diffusion_model.get_submodule(name).weight
        expected = goldens.relative_error(dequantize_weight(q, scale, torch.float32), weight)
        assert float(errors[name]) == pytest.approx(expected, abs=1e-5)
    worst = max(errors, key=lambda name: float(errors[name]))
    assert f"worst {errors[worst]} (" in text
    assert any(text in message for message in caplog.messages)
    caplog.clear()
    out = W8A8Quantize.execute(float_model, "exact", False)
    assert (out.args[1], out.ui) == ("", None)
    (line,) = [m for m in caplog.messages if m.startswith("TurboDiffusion")]
    assert "quantized 20 linears to INT8, exact; the model had 0.0" in line


def test_a_cancel_leaves_the_input_as_it_was(float_model, monkeypatch):
    before, layers = _forward(float_model), []

    def cancel():
        layers.append(1)
        if len(layers) == 3:
            raise comfy.model_management.InterruptProcessingException

    management = quantize_model.comfy.model_management
    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        _quantize(float_model)
    monkeypatch.undo()
    assert torch.equal(_forward(float_model), before)


CHILD = """
import sys
tests, path = sys.argv[1:]  # ComfyUI takes the arguments from here on
sys.path.append(tests)
import conftest
import gc, json
import torch
import in_comfyui
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model

torch.set_num_threads(1)
told = []
with torch.inference_mode():
    model = load_turbo_model(path)
    for report in (False, True):
        with peak_anonymous() as peak:
            quantized, _ = quantize_model(model, report=report)
        told.append(peak.bytes)
        sizes = quantized.model_size(), model.model_size()
        del quantized
        gc.collect()
sys.stdout.write(json.dumps([*told, *sizes]))
"""
# Else glibc keeps some of the memory that is given back to it, now more, now less.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@on_cpu
@pytest.mark.skipif(in_comfyui.DYNAMIC, reason="the simulated GPU's memory is the process's own")
@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
def test_it_takes_the_new_model_and_one_layer(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(official_zeros(num_layers=1, quantized=False), path)
    command = [sys.executable, "-c", CHILD, str(Path(__file__).resolve().parent.parent), str(path)]
    environment = {**os.environ, **RETURN_MEMORY}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    peak, peak_with_report, size, float_size = json.loads(run.stdout)
    layer = 2048 * 8192 * 4  # bytes of the largest weight in float32
    block = 64 * MIB  # in INT8
    assert size == pytest.approx(float_size - block, rel=1e-3)
    assert peak < size + layer
    assert peak_with_report < size + 4 * layer


def _int8_weights(model):
    modules = model.model.diffusion_model.modules()
    return [unpack(m.weight)[0] for m in modules if is_int8(getattr(m, "weight", None))]


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="only Linux's C library keeps them")
def test_weights_have_pages_of_their_own(float_model, exact, monkeypatch):
    monkeypatch.setattr(weights, "OWN_PAGES", 1)
    ours, expected = _int8_weights(_quantize(float_model)), _int8_weights(exact)
    assert {weight.data_ptr() % mmap.PAGESIZE for weight in ours} == {0}
    assert all(map(torch.equal, ours, expected))


@pytest.mark.skipif(not can_measure(), reason="needs /proc")
def test_pages_leave_with_their_weight():
    weight = weights.room_for((3, 1 << 20), torch.device("cpu")).fill_(1)
    place = weight.data_ptr()
    assert _is_mapped(place)
    del weight
    assert not _is_mapped(place)


def _is_mapped(place):
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines)
    return any(int(start, 16) <= place < int(end, 16) for start, end in ranges)


# Faults


def _packed(tensors):
    class Packed(torch.Tensor):
        pass

    model = _stock(tensors)
    linear = model.model.diffusion_model.blocks[1].ffn[0]
    codes = torch.zeros(linear.weight.shape, dtype=torch.uint8).as_subclass(Packed)
    linear.weight = torch.nn.Parameter(codes, requires_grad=False)
    return model


def _compiled(tensors):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = _stock(tensors)
    set_torch_compile_wrapper(model, backend="eager")
    return model


def _two_experts(tensors):
    head = tensors["head.head.bias"]
    other = _stock({**tensors, "head.head.bias": head + 1})
    return experts.switch_experts(_stock(tensors), other, 0.9)


def _injected(tensors):
    from comfy.patcher_extension import PatcherInjection

    model = _stock(tensors)
    model.set_injections("bypass_lora", [PatcherInjection(lambda _: None, lambda _: None)])
    return model


def _closed_over(tensors):
    model = _stock(tensors)
    model.add_object_patch("diffusion_model.blocks.0.ffn.forward", lambda x: x)
    return model


def _not_finite(tensors):
    name = "blocks.1.cross_attn.k.weight"
    weight = tensors[name].clone()
    weight[3, 5] = float("nan")
    return _stock({**tensors, name: weight})


def _with_more(tensors):
    model = _stock(tensors)
    model.model.diffusion_model.adapter = torch.nn.Linear(2, 2)
    return model


FAULTS = {
    "a format unknown here": (
        _packed,
        r"blocks\.1\.ffn\.0 holds its weight in a format unknown here, got Packed torch\.uint8 in "
        r"a comfy\.ops\.\S*Linear.*ComfyUI's own loader",
    ),
    "torch.compile": (
        _compiled,
        r"tied to its float weights, got torch\.compile\. Put W8A8Quantize before",
    ),
    "two experts": (
        _two_experts,
        r"two experts, got one from Wan22ExpertSwitch\. Quantize each expert by itself, before",
    ),
    "an injection": (_injected, r"got bypass_lora .*Put W8A8Quantize before the node that adds it"),
    "a closure": (
        _closed_over,
        rf"got diffusion_model\.blocks\.0\.ffn\.forward by {__name__}\. Put W8A8Quantize before",
    ),
    "not finite": (
        _not_finite,
        r"blocks\.1\.cross_attn\.k has values that are not finite, got 1 of 65536.*download it",
    ),
    "more than Wan": (
        _with_more,
        r"not built as ComfyUI's WanModel, got 2 tensors too many and 0 too few \(adapter.weight\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_quantized_is_refused(stock_tensors, fault):
    make, match = FAULTS[fault]
    with pytest.raises(ValueError, match=match):
        _quantize(make(stock_tensors))


def test_int8_already_is_refused(paths, exact):
    for model in (exact, load_turbo_model(paths[0])):
        with pytest.raises(ValueError, match=r"all 20 linears .* INT8 already.*Leave W8A8Quantize"):
            _quantize(model)


def test_int8_weights_beside_float_ones_are_kept(paths):
    model = load_turbo_model(paths[0])
    linear = model.model.diffusion_model.blocks[1].ffn[2]
    linear.assign(linear.weight.dequantize())
    kept = _int8(model)
    quantized = _int8(_quantize(model))
    assert len(kept) == 19
    assert len(quantized) == 20
    for name, tensors in kept.items():
        assert all(map(torch.equal, quantized[name], tensors))


def test_an_unknown_granularity_is_refused(float_model):
    with pytest.raises(ValueError, match="granularity must be one of fast, exact, got 'int4'"):
        _quantize(float_model, "int4")


def test_a_model_that_is_not_wan_is_refused(float_model):
    other = torch.nn.Module()
    other.diffusion_model = torch.nn.Linear(2, 2)
    patcher = comfy.model_patcher.ModelPatcher(other, in_comfyui.DEVICE, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"needs a Wan MODEL.*got Linear"):
        _quantize(patcher)


def test_the_old_model_can_go(paths):
    model = load_turbo_model(paths[1])
    quantized = _quantize(model)
    before, base = _forward(quantized), weakref.ref(model.model)
    del model
    gc.collect()
    assert base() is None
    assert torch.equal(_forward(quantized), before)
