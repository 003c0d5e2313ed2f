"""What a file or a LoRA says about the attention of single layers (ComfyUI 0.40), on any host."""

import json
import logging

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import file_tensors, read_checkpoint
from turbodiffusion_pack.turbo_core.host import (
    layer_settings,
    self_attention,
)
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model
from turbodiffusion_pack.turbo_core.host.self_attention import optimized_attention
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

SELF0, CROSS1 = "blocks.0.self_attn", "blocks.1.cross_attn"
MODULE = "comfy_attention"
SETTING = {"attention": "comfy_kitchen_int8"}


class ComfyAttention(torch.nn.Module):
    """A newer host's module, after its protocol: a setting in, a function out, no weights."""

    calls = []

    def __init__(self, setting=None):
        super().__init__()
        self.config, self.function = None, None
        if setting is not None:
            self.load_state_dict({"config": _encoded(setting)})

    def _load_from_state_dict(self, state_dict, prefix, *args):
        setting = state_dict.pop(f"{prefix}config", None)
        self.config = None if setting is None else json.loads(setting.numpy().tobytes())
        self.function = None if setting is None else self._attend

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.config is not None:
            destination[f"{prefix}config"] = _encoded(self.config)

    def _attend(self, q, k, v, heads, **options):
        self.calls.append((self.config["attention"], tuple(k.shape)))
        return torch.zeros_like(q)


def _encoded(setting):
    return torch.tensor(list(json.dumps(setting).encode()), dtype=torch.uint8)


def _decoded(tensor):
    return json.loads(bytes(tensor.tolist()))


@pytest.fixture
def newer_host(monkeypatch):
    """The host with a ComfyAttention in every attention, and an attention function that asks it."""
    attention = comfy.ldm.wan.model.WanSelfAttention
    init, function = attention.__init__, optimized_attention

    def with_module(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.comfy_attention = ComfyAttention()

    def asking(q, k, v, heads, preferred_attention=None, **options):
        if preferred_attention is not None and preferred_attention.function is not None:
            return preferred_attention.function(q, k, v, heads, **options)
        return function(q, k, v, heads, **options)

    monkeypatch.setattr(attention, "__init__", with_module)
    monkeypatch.setattr(self_attention, "optimized_attention", asking)
    monkeypatch.setattr(ComfyAttention, "calls", [])


@pytest.fixture(params=["this host", "newer host"])
def host(request):
    # A host that has the modules itself is the newer one, whatever the parameter says.
    if request.param == "newer host":
        request.getfixturevalue("newer_host")
    return request.param


@pytest.fixture(scope="module")
def files(paths, tmp_path_factory):
    """The golden checkpoints, INT8 and float, with a setting in two of their four layers."""
    folder, files = tmp_path_factory.mktemp("settings"), []
    for path in paths:
        tensors = file_tensors(read_checkpoint(path), "comfy")
        for layer in (SELF0, CROSS1):
            tensors[f"{layer}.{MODULE}.config"] = _encoded(SETTING)
        files.append(str(folder / f"{len(files)}.safetensors"))
        save_file(tensors, files[-1])
    return files


def _forward(model):
    data = goldens.load("forward")
    x = data["t2v.ragged.x"][..., :1, :, :]  # 224 tokens
    return in_comfyui.velocity(model, x, data["t2v.ragged.context"], 987.5)


def _settings(model):
    return {
        name: _decoded(setting)
        for name, setting in layer_settings.layer_settings(
            model.model.diffusion_model, model.model.diffusion_model.get_submodule
        ).items()
    }


EXPECTED = {f"{layer}.{MODULE}.config": SETTING for layer in (SELF0, CROSS1)}


@pytest.mark.parametrize("index", [0, 1], ids=["INT8", "float"])
def test_a_file_with_settings_loads_and_keeps_them(files, host, caplog, tmp_path, index):
    caplog.set_level(logging.INFO)
    model = load_turbo_model(files[index])
    assert _settings(model) == EXPECTED
    (told,) = [line for line in caplog.messages if "ask for an attention backend" in line]
    assert told.startswith("TurboDiffusion: 2 layers")
    assert ("where SLA does not run" in told) == (host == "newer host")
    assert not [line for line in caplog.messages if "unexpected" in line or "left over" in line]
    save_turbo_model(model, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert {name: _decoded(saved[name]) for name in EXPECTED} == EXPECTED
    assert _settings(load_turbo_model(tmp_path / "saved.safetensors")) == EXPECTED


def test_a_setting_of_a_layer_that_is_not_there(files, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    tensors = {name: t for name, t in load_file(files[1]).items() if name not in EXPECTED}
    tensors[f"blocks.9.self_attn.{MODULE}.config"] = _encoded(SETTING)
    save_file(tensors, tmp_path / "some.safetensors")
    assert _settings(load_turbo_model(str(tmp_path / "some.safetensors"))) == {}
    assert any("1 layers ask" in line and "left out" in line for line in caplog.messages)


def test_w8a8_carries_settings(files, host):
    model = load_turbo_model(files[1])
    quantized, _ = quantize_model(model)
    assert _settings(quantized) == EXPECTED
    if host == "newer host":
        _forward(patch_attention(quantized, SLASettings("dense")))
        assert [name for name, _ in ComfyAttention.calls] == ["comfy_kitchen_int8"] * 2


@pytest.mark.parametrize("attention", ["dense", "sla"])
@pytest.mark.parametrize("index", [0, 1], ids=["INT8", "float"])
def test_the_hosts_attention_is_told(files, newer_host, monkeypatch, attention, index):
    """Where SLA runs it takes the place of any backend; elsewhere the layer gets its own."""
    model = load_turbo_model(files[index])
    _forward(patch_attention(model, SLASettings(attention, 0.34)))
    tokens = {length for _, (_, length, _) in ComfyAttention.calls}
    ours = index == 0  # float blocks run as this host has them, and it asks nobody
    assert tokens == (({224, 512} if attention == "dense" else {512}) if ours else set())


def test_an_older_host_is_told_nothing(paths, monkeypatch):
    asked, function = [], optimized_attention

    def watched(*args, **options):
        asked.append(set(options))
        return function(*args, **options)

    monkeypatch.setattr(self_attention, "optimized_attention", watched)
    model = load_turbo_model(paths[0])
    has_modules = hasattr(model.model.diffusion_model.blocks[0].self_attn, MODULE)
    _forward(patch_attention(model, SLASettings("dense")))
    assert len(asked) == 4
    assert all(("preferred_attention" in names) == has_modules for names in asked)


# As a LoRA brings it: an object patch, which is a module without weights


def _with_lora(path, setting):
    model = load_turbo_model(path)
    model = patch_attention(model, SLASettings("dense"))
    patch = ComfyAttention(setting)
    model.add_object_patch(f"diffusion_model.{SELF0}.{MODULE}", patch)
    return model


def test_w8a8_takes_a_lora_with_settings(paths, newer_host):
    quantized, _ = quantize_model(_with_lora(paths[1], {"attention": "theirs"}))
    _forward(quantized)
    assert ComfyAttention.calls == [("theirs", (1, 224, 256))]


def test_w8a8_refuses_a_module_with_weights(paths):
    model = load_turbo_model(paths[1])
    for patch in (torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False)):
        model.add_object_patch(f"diffusion_model.{SELF0}.{MODULE}", patch)
        with pytest.raises(ValueError, match="tied to its float weights"):
            quantize_model(model)


def test_the_switch_takes_a_lora_with_settings(paths, newer_host):
    """INT8 and float weights count as two experts."""
    high, low = (_with_lora(path, {"attention": n}) for path, n in zip(paths, "ab", strict=True))
    low, _ = quantize_model(low)
    data = goldens.load("rcm")
    model = switch_experts(high, low, 0.9)
    sampler = rcm_sampler("ode")
    noise = torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    in_comfyui.sample(model, sampler, rcm_sigmas(4, 200), noise, data["t2v.context"])
    assert [name for name, _ in ComfyAttention.calls] == ["a", "a", "b", "b"]


def test_the_save_node_takes_a_lora_with_settings(files, newer_host, tmp_path):
    """The file is of the MODEL given, whatever a clone of it has loaded now."""
    plain = load_turbo_model(files[0])
    patched = plain.clone()
    theirs = ComfyAttention({"attention": "a"})
    patched.add_object_patch(f"diffusion_model.{SELF0}.{MODULE}", theirs)
    for loaded in (plain, patched):
        comfy.model_management.load_models_gpu([loaded])
        for model, expected in ((plain, SETTING), (patched, {"attention": "a"})):
            path = tmp_path / "saved.safetensors"
            path.unlink(missing_ok=True)
            save_turbo_model(model, path)
            saved = load_file(path)
            assert _decoded(saved[f"{SELF0}.{MODULE}.config"]) == expected
            assert _decoded(saved[f"{CROSS1}.{MODULE}.config"]) == SETTING
