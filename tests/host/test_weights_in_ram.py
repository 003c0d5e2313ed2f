"""Weights that are streamed: kept and pinned in RAM, a block ahead, LoRAs merged once, told."""

import contextlib
import functools
import gc
import threading
import types
from pathlib import Path

import dynamic_vram
import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host import (
    arrivals,
    block,
    experts,
    in_ram,
    patch,
    prefetch,
    weights,
)
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.int8_tensor import is_int8, unpack
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear, int8_weights
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

management = comfy.model_management
legacy = pytest.mark.skipif(in_comfyui.DYNAMIC, reason="dynamic VRAM moves no weights")
SIGMAS = rcm_sigmas(3, 80)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return str(goldens.unpack_checkpoint("t2v-quant.pth", folder))


@pytest.fixture
def model(path):
    return patch_attention(load_turbo_model(path), SLASettings("sla", 0.34))


def _linear(out=256, inner=128):
    op = Linear(inner, out, dtype=torch.bfloat16)
    q = torch.randint(-127, 128, (out, inner), dtype=torch.int8)
    op.assign(q, torch.zeros(out), torch.rand(out // 128, inner // 128))
    return op


def _linears(model):
    """Those of the blocks, by the name of their weight."""
    linears = in_ram._linears(model.model)
    return {name: op for name, op in linears.items() if is_int8(op.weight)}


def _run(model, sigmas=SIGMAS, callback=None, seed=0):
    data = goldens.load("rcm")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[in_comfyui.pad_context(data["t2v.context"]), {}]]})
    noise = data["t2v.noise0"]
    options = {"callback": callback, "disable_pbar": True, "seed": seed}
    return guider.sample(noise, torch.zeros_like(noise), rcm_sampler("ode"), sigmas, **options)


def _free(monkeypatch, size):
    """So much memory is free, on the GPU as in RAM."""

    def free(device=None, torch_free_too=False):
        return (size, size) if torch_free_too else size

    monkeypatch.setattr(management, "get_free_memory", free)


def _without_room(monkeypatch):
    monkeypatch.setattr(weights, "LEFT_TO_OTHERS", 1e15)


# To the GPU and back


def test_a_weight_comes_back_as_what_it_was():
    op = _linear()
    own = op.weight
    assert op.to("meta").weight.device.type == "meta"
    assert op.to(torch.float16).weight.device.type == "meta"
    assert op.to_empty(device="cpu").weight is own  # the bias, which floats, is moved
    assert op.to(torch.float16).weight is own


def test_a_weight_that_was_changed_on_the_gpu_does_not():
    op = _linear()
    own, changed = op.weight, torch.ones(256, 128)
    for inplace in (False, True):
        op.weight = own
        op.to("meta")
        op.set_weight(changed.to("meta"), inplace_update=inplace)
        assert weights.in_ram(op.weight) is None


def test_without_room_in_ram_weights_are_moved(monkeypatch):
    _without_room(monkeypatch)
    op = _linear()
    op.to("meta")
    assert weights.in_ram(op.weight) is None


# Pinned


@pytest.fixture
def pins(monkeypatch):
    """Where the host's pinned weights are: pinning does nothing else here."""
    pinned = set()

    def pin_memory(tensor):
        new = tensor.data_ptr() not in pinned
        pinned.add(tensor.data_ptr())
        return new

    monkeypatch.setattr(management, "pin_memory", pin_memory)
    monkeypatch.setattr(management, "unpin_memory", lambda t: pinned.remove(t.data_ptr()))
    kind = type(_linear().weight)
    monkeypatch.setattr(kind, "is_pinned", lambda t: t.data_ptr() in pinned)
    return pinned


@legacy
def test_what_the_host_pins_stays_pinned_as_long_as_the_model_lives(path, pins):
    model = load_turbo_model(path)
    with in_comfyui.streamed(model):
        streamed = set(pins)
        assert {op.weight.data_ptr() for op in _linears(model).values()} <= streamed
    linears = in_ram._linears(model.model).values()
    assert pins == {op.weight.data_ptr() for op in linears}  # the rest the host has unpinned
    with in_comfyui.streamed(model):
        assert pins == streamed
    del model
    gc.collect()
    assert not pins


def _two_experts(path, monkeypatch):
    """A model of two experts with other weights, as on a GPU, and the second one."""
    monkeypatch.setattr(experts, "is_device_cpu", lambda _: False)
    other = load_turbo_model(path)
    for op in _linears(other).values():
        unpack(op.weight)[0].add_(1)
    return switch_experts(load_turbo_model(path), other, 0.9), other


@legacy
def test_experts_that_do_not_fit_together_are_pinned(path, pins, monkeypatch):
    model, _ = _two_experts(path, monkeypatch)
    size = 2 * model.model_size()
    for room, pinned in ((1e13, False), (size, True)):
        _free(monkeypatch, room)
        monkeypatch.setattr(in_ram, "ram_allows", lambda _: True)
        _run(model, rcm_sigmas(2, 200))
        assert bool(pins) is pinned
    assert len(pins) == 2 * len(in_ram._linears(model.model))


@legacy
def test_a_cancelled_run_pins_nothing_more(path, pins, monkeypatch):
    monkeypatch.setattr(experts, "fit_together", lambda *_: False)
    pinned, may_go_on = in_ram.pin, threading.Event()
    model, other = _two_experts(path, monkeypatch)

    def slowly(expert, goes_on=lambda: True):
        if expert.model is other.model:
            may_go_on.wait(60)
        pinned(expert, goes_on)

    def cancels(*_):
        threading.Timer(0.1, may_go_on.set).start()
        raise management.InterruptProcessingException

    monkeypatch.setattr(experts, "pin", slowly)
    with pytest.raises(management.InterruptProcessingException):
        _run(model, rcm_sigmas(2, 200), callback=cancels)
    assert len(pins) == len(in_ram._linears(model.model))  # those of the first expert


@legacy
def test_a_run_is_cancelled_while_its_first_expert_is_pinned(path, pins, monkeypatch):
    monkeypatch.setattr(experts, "fit_together", lambda *_: False)
    model, _ = _two_experts(path, monkeypatch)
    pin_memory = management.pin_memory

    def cancels(tensor):
        management.interrupt_current_processing()
        return pin_memory(tensor)

    monkeypatch.setattr(management, "pin_memory", cancels)
    with pytest.raises(management.InterruptProcessingException):
        _run(model, rcm_sigmas(2, 200))
    assert len(pins) == 1


@legacy
def test_why_an_expert_could_not_be_pinned_is_logged(monkeypatch, caplog):
    run = types.SimpleNamespace(low=None, ended=False)

    def fails(*_):
        raise OSError("cannot read the file")

    monkeypatch.setattr(experts, "pin", fails)
    experts.ExpertRun._pin_low(run)
    assert "cannot read the file" in caplog.text


@legacy
def test_pinning_leaves_ram_to_others(model, pins, monkeypatch):
    monkeypatch.setattr(in_ram, "ram_allows", lambda size: len(pins) < 3)
    in_ram.pin(model)
    assert len(pins) == 3


# A LoRA on what is streamed


def _lora(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, op in _linears(model).items():
        key = name.removesuffix(".weight")
        if key.endswith((".q", "ffn.0")):
            lora[f"{key}.lora_A.weight"] = torch.randn(4, op.in_features, generator=generator) / 20
            lora[f"{key}.lora_B.weight"] = torch.randn(op.out_features, 4, generator=generator) / 20
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], len(lora) // 2


def _inputs():
    data = goldens.load("forward")
    return data["t2v.ragged.x"], data["t2v.ragged.context"], 987.5


@pytest.fixture
def merges(monkeypatch):
    """How often a LoRA was added to a weight."""
    made, calculate = [], comfy.lora.calculate_weight

    def counted(patches, weight, key, **options):
        made.append(key)
        return calculate(patches, weight, key, **options)

    monkeypatch.setattr(comfy.lora, "calculate_weight", counted)
    return made


def _multiplied(model):
    """What each INT8 layer multiplies with where activations are bfloat16, as on a GPU."""
    fetch = functools.partial(int8_weights, dtype=torch.bfloat16, device=in_comfyui.DEVICE)
    return [x for op in _linears(model).values() for x in fetch(op)[:2]]


@legacy
def test_a_lora_is_added_to_a_streamed_weight_once(model, merges, monkeypatch):
    patched, layers = _lora(model)
    inputs = _inputs()
    management.load_models_gpu([patched], force_full_load=True)
    expected, resident = in_comfyui.apply(patched, *inputs), _multiplied(patched)
    assert len(merges) == layers
    merges.clear()
    for _ in range(2):  # kept while the model is away
        with in_comfyui.streamed(patched):
            assert all(map(torch.equal, _multiplied(patched), resident))
            for _ in range(2):
                assert torch.equal(in_comfyui.apply(patched, *inputs), expected)
    assert len(merges) == layers
    other, _ = _lora(model, seed=4)
    with in_comfyui.streamed(other):
        assert not torch.equal(in_comfyui.apply(other, *inputs), expected)
    assert len(merges) == 2 * layers
    with in_comfyui.streamed(model):
        in_comfyui.apply(model, *inputs)
    assert not any("merged" in vars(op) for op in _linears(model).values())


@legacy
def test_a_bias_that_changes_later_reaches_what_is_merged(model):
    patched, _ = _lora(model)
    other, inputs = patched.clone(), _inputs()
    shapes = model.model.state_dict()
    keys = [n.removesuffix("weight") + "bias" for n in _linears(model) if n.endswith("q.weight")]
    other.add_patches({key: ("diff", (torch.full_like(shapes[key], 0.5),)) for key in keys})
    with in_comfyui.streamed(other):
        expected = in_comfyui.apply(other, *inputs)
    in_ram._drop_merged(model)
    for lora in (patched, other):
        with in_comfyui.streamed(lora):
            found = in_comfyui.apply(lora, *inputs)
    assert torch.equal(found, expected)


@legacy
def test_what_is_merged_goes_with_the_model_where_ram_is_short(model, monkeypatch):
    patched, layers = _lora(model)
    with in_comfyui.streamed(patched):
        in_comfyui.apply(patched, *_inputs())
        assert sum("merged" in vars(op) for op in _linears(model).values()) == layers
        _without_room(monkeypatch)
    assert not any("merged" in vars(op) for op in _linears(model).values())


@legacy
def test_without_room_in_ram_a_lora_is_added_at_each_use(model, merges, monkeypatch):
    patched, layers = _lora(model)
    _without_room(monkeypatch)
    with in_comfyui.streamed(patched):
        for _ in range(2):
            in_comfyui.apply(patched, *_inputs())
    assert len(merges) == 2 * layers


@pytest.mark.parametrize("loaded_in", [True, False])
@pytest.mark.parametrize("unloaded_in", [True, False])
def test_a_lora_is_taken_out_in_any_mode(path, loaded_in, unloaded_in):
    """ComfyUI runs nodes in inference mode, training outside of it, and one unloads for another."""
    with torch.inference_mode(loaded_in):
        model = load_turbo_model(path)
        own = {name: unpack(op.weight)[0].clone() for name, op in _linears(model).items()}
        patched, layers = _lora(model)
        management.load_models_gpu([patched], force_full_load=True)
        assert in_comfyui.DYNAMIC or len(patched.backup) == layers
    with torch.inference_mode(unloaded_in):
        patched.detach()
    linears = _linears(model)
    assert all(torch.equal(unpack(linears[name].weight)[0], q) for name, q in own.items())


# A block ahead


def _host_with_a_queue(monkeypatch, events):
    """The host's queue as events: what it brings, in the order of what the blocks compute."""

    def make(entries, device, options):
        return [None, *entries, None]

    def pop(queue, device, module):
        queue.pop(0)
        if queue[0] is not None:
            events.append(("comes", len(queue[0])))
            queue[0] = (None, (module, []))

    monkeypatch.setattr(prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(prefetch, "prefetch_queue_pop", pop)
    fused, queue_of = block._fused, patch.queue_of

    def where_vram_is_dynamic(wan, device, options):
        return queue_of(wan, device, {**options, "prefetch_dynamic_vbars": True})

    monkeypatch.setattr(patch, "queue_of", where_vram_is_dynamic)

    def computed(wan_block, index, *args):
        events.append(("computes", index))
        return fused(wan_block, index, *args)

    monkeypatch.setattr(block, "_fused", computed)


def test_each_block_is_asked_for_before_it_computes(model, monkeypatch):
    events = []
    _host_with_a_queue(monkeypatch, events)
    wan = model.model.diffusion_model
    for op in wan.modules():
        if isinstance(op, Linear) and not in_comfyui.DYNAMIC:
            monkeypatch.setattr(op, "_v", None, raising=False)
    monkeypatch.setattr(arrivals, "came", lambda *_: False)
    _run(model)
    first, second = [("comes", n) for n in _sizes(wan)], [("comes", n - 2) for n in _sizes(wan)]
    step = [("computes", index) for index in range(len(wan.blocks))]
    assert events[:4] == [first[0], step[0], first[1], step[1]]
    assert events[4:8] == [second[0], step[0], second[1], step[1]]  # without the text's layers
    assert len(events) == 3 * 4


def _sizes(wan):
    return [sum(hasattr(op, "_v") for op in b.modules()) for b in wan.blocks]


def test_no_queue_where_blocks_may_be_left_out(model, monkeypatch):
    events = []
    _host_with_a_queue(monkeypatch, events)

    def replaced(args, extra):
        return extra["original_block"](args)

    model.set_model_patch_replace(replaced, "dit", "double_block", 0)
    _run(model, SIGMAS[-2:])
    assert [what for what, _ in events] == ["computes"] * 2


@pytest.fixture
def hosts_queue(monkeypatch):
    """The host's own queue, though there is no GPU with streams here."""
    model_prefetch = pytest.importorskip("comfy.model_prefetch")

    def make(entries, device, options):
        queue = [None, *entries, None]
        model_prefetch.PREFETCH_QUEUES.append(queue)
        return queue

    monkeypatch.setattr(prefetch, "make_prefetch_queue", make)
    yield model_prefetch
    model_prefetch.cleanup_prefetch_queues()


def _pinned_on_gpu(model):
    vbars = model.model.dynamic_vbars.values()
    return sum(sum(vbar.pins.values()) for vbar in vbars)


dynamic_on_cpu = pytest.mark.skipif(
    not in_comfyui.DYNAMIC or torch.cuda.is_available(), reason="looks into simulated VRAM"
)


@dynamic_on_cpu
@pytest.mark.parametrize("room", [True, False])
def test_what_the_hosts_queue_brings_is_what_is_fetched(model, hosts_queue, monkeypatch, room):
    with monkeypatch.context() as only_here:
        only_here.setattr(prefetch, "make_prefetch_queue", lambda *_: None)
        expected = _run(model)
    with contextlib.nullcontext() if room else dynamic_vram.full():
        assert torch.equal(_run(model), expected)
    assert _pinned_on_gpu(model) == 0
    assert not any("_prefetch" in vars(op) for op in model.model.modules())


def _wrap(model, wrapper):
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "another node", wrapper)


def _skips_the_second(calls, executor, x, *args, **more):
    calls.append(x)
    return x / 2 if len(calls) == 2 else executor(x, *args, **more)


def _leaves_the_second_block_out(calls, executor, *args, **more):
    calls.append(args)
    if len(calls) != 2:
        return executor(*args, **more)
    wan = executor.class_obj
    blocks, wan.blocks = wan.blocks, wan.blocks[:1]
    try:
        return executor(*args, **more)
    finally:
        wan.blocks = blocks


def _runs_twice(calls, executor, *args, **more):
    return (executor(*args, **more) + executor(*args, **more)) / 2


@dynamic_on_cpu
@pytest.mark.parametrize("wraps", [_skips_the_second, _leaves_the_second_block_out, _runs_twice])
def test_nothing_stays_pinned_where_another_node_runs_other_passes(
    model, hosts_queue, monkeypatch, wraps
):
    with monkeypatch.context() as only_here:
        only_here.setattr(prefetch, "make_prefetch_queue", lambda *_: None)
        plain = model.clone()
        _wrap(plain, functools.partial(wraps, []))
        expected = _run(plain)
    _wrap(model, functools.partial(wraps, []))
    assert torch.equal(_run(model), expected)
    assert _pinned_on_gpu(model) == 0
    assert not any("_prefetch" in vars(op) for op in model.model.modules())


@dynamic_on_cpu
def test_a_cancelled_pass_leaves_nothing_pinned(model, hosts_queue, monkeypatch):
    expected = _run(model)
    fused = block._fused

    def cancels(wan_block, index, *args):
        if index == 1:
            raise management.InterruptProcessingException
        return fused(wan_block, index, *args)

    with monkeypatch.context() as only_here:
        only_here.setattr(block, "_fused", cancels)
        with pytest.raises(management.InterruptProcessingException):
            _run(model)
    assert _pinned_on_gpu(model) > 0
    hosts_queue.cleanup_prefetch_queues()  # as the host does after each node
    assert _pinned_on_gpu(model) == 0
    assert torch.equal(_run(model), expected)


@pytest.mark.skipif(not in_comfyui.DYNAMIC, reason="without dynamic VRAM all is mapped")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_host_can_read_weights_from_the_file(path, tmp_path, suffix):
    """And not through its mapping, which would hold them in RAM beside what is pinned."""
    file = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        file.write_bytes(Path(path).read_bytes())
    else:
        save_file(torch.load(path, weights_only=True), file)
    read = comfy.memory_management.read_tensor_file_slice_into
    for op in _linears(load_turbo_model(str(file))).values():
        own = unpack(op.weight)[0]
        room = torch.zeros_like(own)
        assert read(own, room)
        assert torch.equal(room, own)


# Told


class Clock:
    def __init__(self, time):
        self.time = time

    def elapsed_time(self, other):
        return other.time - self.time

    def synchronize(self):
        pass


def test_the_line_tells_what_was_streamed_and_waited_for(model, monkeypatch, caplog):
    ticks = iter(range(100000))
    monkeypatch.setattr(arrivals, "_now", lambda device: Clock(next(ticks)))
    monkeypatch.setattr(weights, "resident", lambda *_: None)
    monkeypatch.setattr(weights, "is_away", lambda op, device: isinstance(op, Linear))
    monkeypatch.setattr(weights, "came", lambda *_: True)
    caplog.set_level("INFO")
    _run(model, SIGMAS[-2:])
    wan = model.model.diffusion_model
    used = [op for op in wan.modules() if isinstance(op, Linear)]
    size = sum(arrivals.bytes_of(op) for op in used) / 1e9
    text = next(line for line in caplog.messages if "forward pass" in line)
    assert f"{size:.2f} GB of weights streamed, {len(used)} ms waited for them" in text


def test_the_line_tells_of_no_streaming_where_there_is_none(model, caplog):
    caplog.set_level("INFO")
    if not in_comfyui.DYNAMIC:
        _run(model, SIGMAS[-2:])
        assert not any("streamed" in line for line in caplog.messages)


# Cancelled, out of memory


def _ends(error):
    def callback(arguments):
        raise error

    return callback


@legacy
def test_out_of_memory_is_told_and_leaves_nothing_pinned_or_merged(path, pins, monkeypatch):
    model = load_turbo_model(path)
    in_ram.pin(model)
    op = next(iter(_linears(model).values()))
    vars(op)["merged"] = None, ()
    assert pins

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 740.00 MiB")

    with pytest.raises(torch.OutOfMemoryError, match=r"takes about [\d.]+ GB .*740.00 MiB"):
        _run(model, callback=fails)
    assert not pins
    assert "merged" not in vars(op)


@legacy
def test_out_of_memory_in_either_expert_leaves_nothing_pinned(path, pins, monkeypatch):
    monkeypatch.setattr(experts, "fit_together", lambda *_: False)
    model, _ = _two_experts(path, monkeypatch)

    def fails(failing, step, *_):
        if step == failing:
            raise torch.OutOfMemoryError("no room")

    for step in range(2):
        with pytest.raises(torch.OutOfMemoryError, match=r"^the GPU has .*\(no room\)$"):
            _run(model, rcm_sigmas(2, 200), callback=functools.partial(fails, step))
        assert not pins


@pytest.mark.parametrize("error", [management.InterruptProcessingException, torch.OutOfMemoryError])
def test_the_next_run_works_after_one_that_ended_in_a_step(model, monkeypatch, error):
    expected = _run(model)
    products, product = [], block.int8_product

    def fails(*args, **options):
        products.append(args)
        if len(products) == 15:
            raise error()
        return product(*args, **options)

    with monkeypatch.context() as only_here:
        only_here.setattr(block, "int8_product", fails)
        with pytest.raises(error):
            _run(model)
    assert run_report._current.get() is None
    assert torch.equal(_run(model), expected)
