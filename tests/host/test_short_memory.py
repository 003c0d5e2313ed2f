"""Where the GPU's memory is short, operations are run again once torch's cache is given back."""

import logging

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


@pytest.mark.parametrize("case", ["in place", "capturing"])
def test_what_may_have_begun_is_not_run_again(short, monkeypatch, case):
    x = torch.zeros(3)
    monkeypatch.setattr(short_memory, "_is_capturing", lambda: case == "capturing")
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", lambda: None)
    with Once() as once, short_memory.TriedAgain(x.device), pytest.raises(torch.OutOfMemoryError):
        x.add_(1) if case == "in place" else x.add(1)
    assert once.ran == 1
    monkeypatch.setattr(short_memory, "_is_capturing", lambda: False)
    with Once() as once, short_memory.TriedAgain(x.device):
        assert x.add(1).sum() == 3
    assert once.ran >= 2


def test_less_than_twice_what_is_needed_is_short(monkeypatch):
    free, gpu = {}, torch.device("cuda")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free.get)
    for gigabytes, short in ((7.5, True), (8, False)):
        free[gpu] = gigabytes * 1e9
        assert short_memory._is_short(gpu, 4e9 - 1e8) == short
    assert not short_memory._is_short(torch.device("cpu"), 1e15)


def test_a_pass_needs_five_activations(monkeypatch):
    needed = []
    monkeypatch.setattr(short_memory, "_is_short", lambda device, size: needed.append(size))
    with short_memory.around_pass(torch.empty(1, 16, 21, 90, 160, device="meta"), 5120, {}):
        assert needed == [5 * 2 * 75600 * 5120]


def _compiled(executor, *args, **kwargs):
    return executor(*args, **kwargs)


@pytest.mark.parametrize("case", ["", "not short", "little is cached", "compiled"])
def test_a_cache_goes_back_before_each_pass_of_a_short_memory(model, short, monkeypatch, case):
    emptied = []
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", lambda: emptied.append(True))
    cached = short_memory.CACHED - (case == "little is cached")
    monkeypatch.setattr(short_memory, "_cached", lambda device: cached)
    if case == "not short":
        monkeypatch.setattr(short_memory, "_is_short", lambda device, needed: False)
    if case == "compiled":
        wrappers = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        model.add_wrapper_with_key(wrappers, "torch.compile", _compiled)
    before, forward = [], patch._forward
    monkeypatch.setattr(patch, "_forward", lambda *a: before.append(len(emptied)) or forward(*a))
    _run(model)
    assert before[1] - before[0] == int(case == "")
