"""Where the GPU's memory is short, operations are run again once torch's cache is given back."""

import logging
from functools import partial

import goldens
import in_comfyui
import pytest
import torch
from full_gpu import FullGPU
from in_comfyui import comfy
from torch.utils._python_dispatch import TorchDispatchMode
from turbodiffusion_pack.turbo_core.host import patch, short_memory
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas


@pytest.fixture
def model(tmp_path):
    return load_turbo_model(str(goldens.unpack_checkpoint("t2v-quant.pth", tmp_path)))


@pytest.fixture
def short(monkeypatch):
    """As on a GPU with little memory, of which torch has nothing that no tensor has."""
    monkeypatch.setattr(short_memory, "_is_short", lambda device, needed: True)
    monkeypatch.setattr(short_memory, "_cached", lambda device: 0)
    monkeypatch.setattr(short_memory, "MOST", 10**6)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", lambda: None)


def _run(model):
    data = goldens.load("rcm")
    guider = comfy.samplers.CFGGuider(model)
    prompt = in_comfyui.pad_context(data["t2v.context"])
    guider.inner_set_conds({"positive": [[prompt, {}]], "negative": [[prompt / 2, {}]]})
    guider.set_cfg(1.0)
    noise = data["t2v.noise0"]
    return guider.sample(
        noise, torch.zeros_like(noise), rcm_sampler("ode"), rcm_sigmas(2, 80), disable_pbar=True
    )


def _on_a_full_gpu(model, monkeypatch) -> tuple[torch.Tensor, FullGPU]:
    full = FullGPU()
    monkeypatch.setattr(patch, "_forward", full.during(patch._forward))
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", full.give_back)
    with full:
        return _run(model), full


def test_a_run_goes_on_with_the_same_bits(model, short, monkeypatch, caplog):
    expected = _run(model)
    with caplog.at_level(logging.INFO):
        found, full = _on_a_full_gpu(model, monkeypatch)
    assert torch.equal(found, expected)
    times = full.asked // full.EVERY
    assert times > 10 and f"memory ran out {times} times, went on with 0.00 GB" in caplog.text


def test_where_memory_is_not_short_it_ends_the_run(model, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _on_a_full_gpu(model, monkeypatch)


def test_memory_that_stays_short_ends_the_run(model, short, monkeypatch):
    monkeypatch.setattr(FullGPU, "give_back", lambda self: None)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        _on_a_full_gpu(model, monkeypatch)


class Once(TorchDispatchMode):
    """The first operation finds no memory."""

    ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran += 1
        if self.ran == 1:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_what_writes_into_what_it_is_given_is_not_run_again(short):
    x = torch.zeros(3)
    with Once() as once, short_memory.TriedAgain(x.device), pytest.raises(torch.OutOfMemoryError):
        x.add_(1)
    assert once.ran == 1
    with Once() as once, short_memory.TriedAgain(x.device):
        assert x.add(1).sum() == 3
    assert once.ran >= 2


def test_no_more_than_some_are_run_again(short, monkeypatch, caplog):
    monkeypatch.setattr(short_memory, "MOST", 2)
    full = FullGPU()
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", full.give_back)
    add = full.during(lambda: [torch.zeros(1) for _ in range(3 * full.EVERY)])
    again = short_memory.tried_again(torch.device("cpu"), 1)
    with caplog.at_level(logging.INFO), pytest.raises(torch.OutOfMemoryError), full, again:
        add()
    assert caplog.text.count("memory ran out") == caplog.text.count("ran out 2 times") == 1


def test_less_than_twice_what_is_needed_is_short(monkeypatch):
    free, gpu = {}, torch.device("cuda")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free.get)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    for gigabytes, short in ((7.5, True), (8, False)):
        free[gpu] = gigabytes * 1e9
        assert short_memory._is_short(gpu, 4e9 - 1e8) == short
    assert not short_memory._is_short(torch.device("cpu"), 1e15)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert not short_memory._is_short(gpu, 1e15)  # gives back what it has free by itself


def test_a_pass_needs_five_activations(monkeypatch):
    needed, network = [], torch.nn.Module()
    network.dim = 5120
    monkeypatch.setattr(short_memory, "_is_short", lambda device, size: needed.append(size))
    with short_memory.around_pass(torch.empty(1, 16, 21, 90, 160, device="meta"), network, {}):
        assert needed == [5 * 2 * 75600 * 5120]


def _through(executor, *args, **kwargs):
    return executor(*args, **kwargs)


def _hooked(model) -> None:
    block = model.model.diffusion_model.blocks[1]
    block.norm3.register_forward_hook(lambda module, given, out: None)


def _compiled(model) -> None:
    head = model.model.diffusion_model.head
    head._compiled_call_impl = head.forward


def _wrapped(kind: str, model) -> None:
    wrappers = getattr(comfy.patcher_extension.WrappersMP, kind)
    model.add_wrapper_with_key(wrappers, "another node", _through)


def _attended_by_another(model) -> None:
    def attend(attention, *args, **kwargs):
        return attention(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = attend


# What is there besides us in a pass, where operations are not run again.
OTHERS = {
    "hooked": _hooked,
    "compiled": _compiled,
    "wrapped": partial(_wrapped, "DIFFUSION_MODEL"),
    "wrapped around": partial(_wrapped, "APPLY_MODEL"),
    "attention": _attended_by_another,
}


@pytest.mark.parametrize("case", ["", "not short", "little is cached", *OTHERS])
def test_a_cache_goes_back_before_each_pass_of_ours_alone(model, short, monkeypatch, case):
    emptied = []
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", lambda: emptied.append(True))
    cached = short_memory.CACHED - (case == "little is cached")
    monkeypatch.setattr(short_memory, "_cached", lambda device: cached)
    if case == "not short":
        monkeypatch.setattr(short_memory, "_is_short", lambda device, needed: False)
    OTHERS.get(case, lambda model: None)(model)
    before, forward = [], patch._forward
    monkeypatch.setattr(patch, "_forward", lambda *a: before.append(len(emptied)) or forward(*a))
    try:
        _run(model)
    finally:
        model.model.diffusion_model.head._compiled_call_impl = None
    assert before[1] - before[0] == int(case == "")
