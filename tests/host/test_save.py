"""TurboSaveCheckpoint: what a MODEL's weights are is what the file holds, and loads again."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import goldens
import in_comfyui
import model_folders
import pytest
import torch
from in_comfyui import comfy
from layouts import assert_same, conv
from peak_memory import can_measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.nodes.loader import TurboLoader
from turbodiffusion_pack.nodes.save import TurboSaveCheckpoint, folder_paths
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host import int8_tensor
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings
from zero_checkpoint import official_zeros

TESTS = Path(__file__).resolve().parent.parent
KEY = "t2v.ragged"
MODELS = ("t2v-quant.pth", "t2v.pth")
Q0 = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def official(paths):
    """The official files' tensors, with the patch embedding as ComfyUI has it."""
    return {Path(path).name: conv(torch.load(path)) for path in paths}


@pytest.fixture(scope="module")
def files(paths):
    return {Path(path).name: path for path in paths}


def _forward(model):
    data = goldens.load("forward")
    x = data[f"{KEY}.x"][..., :1, :, :]  # 224 tokens
    return in_comfyui.velocity(model, x, data[f"{KEY}.context"], 987.5)


def _save(model, folder, name="saved.safetensors"):
    save_turbo_model(model, folder / name)
    return folder / name


def _lora(seed=3, targets=(".q", "ffn.2")):
    """A LoRA of rank 4 with ComfyUI's key names, as large as to be seen."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for block in (0, 1):
        for name in ("self_attn.q", "cross_attn.q", "ffn.2"):
            if name.endswith(targets):
                width = 512 if name == "ffn.2" else 256
                key = f"diffusion_model.blocks.{block}.{name}"
                lora[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator) * 0.05
                lora[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.05
    return lora


def _with_lora(model, strength=0.7):
    return comfy.sd.load_lora_for_models(model, None, _lora(), strength, 0.0)[0]


# What is saved


@pytest.mark.parametrize("name", MODELS)
def test_what_was_loaded_is_saved_bit_for_bit(files, official, tmp_path, name):
    model = load_turbo_model(files[name])
    before = _forward(model)
    saved = _save(model, tmp_path)
    assert_same(load_file(saved), official[name])
    again = load_turbo_model(str(saved))
    assert torch.equal(_forward(again), before)
    assert_same(load_file(_save(again, tmp_path, "again.safetensors")), official[name])


def test_attention_patches_change_nothing(files, official, tmp_path):
    model = load_turbo_model(files["t2v-quant.pth"])
    dense = patch_attention(model, SLASettings("dense"))
    _forward(dense)
    assert_same(load_file(_save(dense, tmp_path)), official["t2v-quant.pth"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_model_of_comfyuis_own_loader(official, tmp_path, dtype):
    tensors = {n: t for n, t in official["t2v.pth"].items() if "proj_l" not in n}
    options = {"dtype": dtype}
    stock = comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options=options)
    saved = load_file(_save(stock, tmp_path))
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        # With dynamic VRAM the host keeps the file's dtypes and casts at use.
        kept = tensor.dtype if in_comfyui.DYNAMIC else dtype
        if saved[name].dtype != torch.float32:  # ComfyUI keeps the patch embedding in float32
            assert saved[name].dtype == kept, name
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name
    assert read_checkpoint(tmp_path / "saved.safetensors").has_sla is False
    loaded = load_turbo_model(str(tmp_path / "saved.safetensors"))
    # What is cast to fp8 at use only is saved as it was: fp8 itself is 3e-2 away from that.
    bound = 4e-2 if in_comfyui.DYNAMIC and dtype.itemsize == 1 else 2e-2
    assert goldens.relative_error(_forward(loaded), _forward(stock)) < bound


@pytest.mark.parametrize(("granularity", "scales"), [("fast", (256,)), ("exact", (2, 2))])
def test_what_w8a8_quantize_made(files, tmp_path, granularity, scales):
    model, _ = quantize_model(load_turbo_model(files["t2v.pth"]), granularity)
    before = _forward(model)
    saved = _save(model, tmp_path)
    assert load_file(saved)[f"{Q0}.scale"].shape == scales
    again = load_turbo_model(str(saved), granularity)
    assert torch.equal(_forward(again), before)
    assert_same(load_file(_save(again, tmp_path, "again.safetensors")), load_file(saved))


def test_a_scale_per_channel_is_multiplied_with_whatever_is_asked_for(files, tmp_path):
    model, _ = quantize_model(load_turbo_model(files["t2v.pth"]), "fast")
    exact = load_turbo_model(str(_save(model, tmp_path)), "exact")
    assert torch.equal(_forward(exact), _forward(model)), "these weights have no blocks"


def test_comfyuis_own_loader_takes_the_float_file_and_refuses_the_int8_one(files, tmp_path):
    """Under ComfyUI's names it would take the integers for values without a word."""
    for name, usable in {"t2v.pth": True, "t2v-quant.pth": False}.items():
        saved = str(_save(load_turbo_model(files[name]), tmp_path, f"{name}.sft"))
        if usable:
            assert type(comfy.sd.load_diffusion_model(saved).model).__name__ == "WAN21"
        else:
            with pytest.raises((KeyError, RuntimeError)):
                comfy.sd.load_diffusion_model(saved)


# LoRA


def test_a_lora_is_baked_into_int8_weights(files, official, tmp_path):
    model = load_turbo_model(files["t2v-quant.pth"])
    before = _forward(model)
    patched = _with_lora(model, 4.0)
    expected = _forward(patched)
    saved = _save(patched, tmp_path)
    out = _forward(load_turbo_model(str(saved)))
    # ComfyUI adds a LoRA in float32 on the CPU and in fp16 on a GPU, which computes in bf16 too;
    # with dynamic VRAM to a weight in bf16.
    bound = 1e-2 if torch.cuda.is_available() or in_comfyui.DYNAMIC else 2e-3
    assert goldens.relative_error(out, expected) < bound
    assert goldens.relative_error(before, expected) > 2 * bound, "the LoRA matters"
    assert torch.equal(_forward(model), before), "the MODEL is untouched"
    assert_same(load_file(_save(model, tmp_path, "plain.safetensors")), official["t2v-quant.pth"])


def test_baked_int8_weights_are_dequantized_added_and_quantized(files, official, tmp_path):
    patched = _with_lora(load_turbo_model(files["t2v-quant.pth"]))
    tensors, lora, plain = load_file(_save(patched, tmp_path)), _lora(), official["t2v-quant.pth"]
    changed = {n for n in plain if not torch.equal(tensors[n], plain[n])}
    targets = {n.split(".lora")[0].removeprefix("diffusion_model.") for n in lora}
    assert changed == {f"{t}.{part}" for t in targets for part in ("int8_weight", "scale")}
    for target in targets:
        scale = plain[f"{target}.scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        key = f"diffusion_model.{target}"
        delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
        weight = plain[f"{target}.int8_weight"] * scale + 0.7 * delta
        q, scale = int8_tensor.quantize_weight(weight, "blocks")
        torch.testing.assert_close(tensors[f"{target}.scale"], scale, rtol=1e-6, atol=0)
        off = (tensors[f"{target}.int8_weight"].int() - q.int()).abs()
        assert off.max() <= 1
        assert off.float().mean() < 1e-4, "only ties may round the other way"


def test_a_lora_is_baked_into_float_weights(files, official, tmp_path):
    patched = _with_lora(load_turbo_model(files["t2v.pth"]))
    tensors, lora = load_file(_save(patched, tmp_path)), _lora()
    key = f"diffusion_model.{Q0}"
    delta = lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
    expected = official["t2v.pth"][f"{Q0}.weight"].float() + 0.7 * delta
    assert tensors[f"{Q0}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(tensors[f"{Q0}.weight"].float(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(tensors["head.head.weight"], official["t2v.pth"]["head.head.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_same_wherever_the_weights_are(files, official, tmp_path, name):
    """Loaded with the LoRA in them, streamed, or not loaded at all; this MODEL or a clone."""
    model = load_turbo_model(files[name])
    patched = _with_lora(model)
    first = _save(patched, tmp_path, "never_loaded.safetensors").read_bytes()
    _forward(patched)
    assert _save(patched, tmp_path, "loaded.safetensors").read_bytes() == first
    assert_same(load_file(_save(model, tmp_path, "clone.safetensors")), official[name])
    with in_comfyui.streamed(patched):
        assert _save(patched, tmp_path, "streamed.safetensors").read_bytes() == first


# Memory, measured in a fresh process

CHILD = """
import sys
tests, source, target = sys.argv[1:]  # ComfyUI takes the arguments from here on
sys.path.append(tests)
import conftest
import pathlib
import torch
import in_comfyui
from in_comfyui import comfy
from peak_memory import peak_anonymous
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model

torch.set_num_threads(1)
with torch.inference_mode():
    model = load_turbo_model(source)
    key = "diffusion_model.blocks.0.ffn.2"
    lora = {f"{key}.lora_A.weight": torch.ones(1, 8192)}
    lora[f"{key}.lora_B.weight"] = torch.ones(2048, 1)
    model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    with peak_anonymous() as peak:
        save_turbo_model(model, pathlib.Path(target))
sys.stdout.write(str(peak.bytes))
"""
ONE_WEIGHT = 2048 * 8192 * 4  # bytes of the largest weight in float32


@pytest.mark.skipif(not can_measure(), reason="needs /proc/self/status")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's driver takes memory of its own")
def test_saving_takes_the_memory_of_a_few_weights(tmp_path):
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(official_zeros(num_layers=5), source)
    command = [sys.executable, "-c", CHILD, str(TESTS), str(source), str(target)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    size = target.stat().st_size
    source.unlink()
    target.unlink()
    assert size > 6 * ONE_WEIGHT
    assert int(run.stdout) < 5 * ONE_WEIGHT


# The node


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder, whose diffusion_models its loaders list."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folder = tmp_path / "diffusion_models"
    hidden = types.SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(TurboSaveCheckpoint, "hidden", hidden)
    with model_folders.listed("diffusion_models", folder):
        yield folder


def _default_prefix():
    (prefix,) = (i for i in TurboSaveCheckpoint.define_schema().inputs if i.id != "model")
    return prefix.default


def test_the_node_saves_where_loaders_look(files, official, output):
    model = load_turbo_model(files["t2v-quant.pth"])
    shown = TurboSaveCheckpoint.execute(model, _default_prefix()).ui.as_dict()
    TurboSaveCheckpoint.execute(model, _default_prefix())
    names = [f"TurboDiffusion_{number:05}_.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in output.iterdir()) == names
    assert shown == {"text": (str(Path("diffusion_models", names[0])),)}
    assert_same(load_file(output / names[1]), official["t2v-quant.pth"])
    assert TurboLoader.validate_inputs(names[0]) is True
    with safe_open(output / names[0], framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prompt"]) == {"1": {}}
    assert json.loads(metadata["workflow"]) == {"nodes": []}


def test_the_workflow_is_left_out_on_request(files, output, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", True)
    model = load_turbo_model(files["t2v-quant.pth"])
    TurboSaveCheckpoint.execute(model, "diffusion_models/a")
    with safe_open(output / "a_00001_.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_place_outside_the_output_folder(files, output):
    model = load_turbo_model(files["t2v-quant.pth"])
    for prefix in ("../../elsewhere/a", "../a", str(output.parents[1] / "a"), ".."):
        with pytest.raises(ValueError, match="is outside the output folder, where") as caught:
            TurboSaveCheckpoint.execute(model, prefix)
        assert str(output.parent) not in str(caught.value)
    assert not output.exists()


# Faults


def _fp8_layout():
    """The name of the host's own layout for FP8 weights."""
    names = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout")
    layouts = getattr(comfy.quant_ops, "LAYOUTS", vars(comfy.quant_ops))
    return next(name for name in names if name in layouts)


def test_a_foreign_quantization_is_refused_by_name(files, tmp_path):
    model = load_turbo_model(files["t2v.pth"])
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    weight = comfy.quant_ops.QuantizedTensor.from_float(linear.weight.detach(), _fp8_layout())
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    match = rf"{Q0}.weight is in another quantized format, got a QuantizedTensor.*use ComfyUI's"
    with pytest.raises(ValueError, match=match):
        _save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scaled_fp8_is_refused_by_name(files, tmp_path):
    """As ComfyUI 0.3.75 holds it: a plain FP8 parameter with its scale beside it."""
    model = load_turbo_model(files["t2v.pth"])
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    norm = model.model.diffusion_model.blocks[0].self_attn.norm_q
    norm.register_buffer("scale_weight", torch.ones(()))
    match = r"makes no checkpoint .*another format, got \S*norm_q.scale_weight.*ModelSave"
    with pytest.raises(ValueError, match=match):
        _save(model, tmp_path)


def test_what_turbo_loader_could_not_load_is_refused(files, tmp_path):
    model = load_turbo_model(files["t2v-quant.pth"])
    norm = model.model.diffusion_model.blocks[1].self_attn.norm_q
    norm.weight = torch.nn.Parameter(torch.full((256,), float("nan")), requires_grad=False)
    match = r"makes no checkpoint for TurboLoader \(blocks.1.self_attn.norm_q.weight has 256 of 256"
    with pytest.raises(ValueError, match=match):
        _save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_experts_are_refused(files, tmp_path):
    high, low = (load_turbo_model(files[name]) for name in MODELS)
    both = switch_experts(high, low, 0.9)
    with pytest.raises(ValueError, match=r"two experts, got one from Wan22ExpertSwitch.*by itself"):
        _save(both, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_modules_beside_the_models_own_are_refused(files, tmp_path):
    model = load_turbo_model(files["t2v-quant.pth"])
    model.set_injections("bypass_lora", [])
    with pytest.raises(ValueError, match=r"not its own, got bypass_lora.*from before the node"):
        _save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_wan(tmp_path):
    model = torch.nn.Module()
    model.diffusion_model = torch.nn.Linear(1, 1)
    patcher = comfy.model_patcher.ModelPatcher(model, in_comfyui.DEVICE, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"needs a Wan MODEL.*got Linear.*Connect a Wan"):
        _save(patcher, tmp_path)


def test_an_older_file_and_a_full_disk(files, tmp_path, monkeypatch):
    model = load_turbo_model(files["t2v-quant.pth"])
    (tmp_path / "old.safetensors").write_text("old")
    with pytest.raises(FileExistsError, match=r"^old.safetensors exists already: choose another"):
        _save(model, tmp_path, "old.safetensors")
    usage = namedtuple("Usage", "free")(1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"^new.safetensors needs .* GB left: free some space"):
        _save(model, tmp_path, "new.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_text() == "old"


def test_two_servers_that_save_under_one_name(files, tmp_path, monkeypatch):
    """Both found the number free; who is second is told so, and no file is lost."""
    model = load_turbo_model(files["t2v-quant.pth"])
    fsync = os.fsync

    def be_second(file):
        (tmp_path / "saved.safetensors").write_text("the other's")
        fsync(file)

    monkeypatch.setattr(os, "fsync", be_second)
    with pytest.raises(FileExistsError, match=r"^saved.safetensors exists by now, as another"):
        _save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.safetensors"]
    assert (tmp_path / "saved.safetensors").read_text() == "the other's"


def test_the_node_takes_the_next_number_where_another_server_was_first(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = load_turbo_model(files["t2v-quant.pth"])
    first, second = (tmp_path / f"m_0000{number}_.safetensors" for number in (1, 2))
    fsync = os.fsync

    def be_second(file):
        if not first.exists():
            first.write_text("the other's")
        fsync(file)

    monkeypatch.setattr(os, "fsync", be_second)
    hidden = types.SimpleNamespace(prompt=None, extra_pnginfo=None)
    monkeypatch.setattr(TurboSaveCheckpoint, "hidden", hidden)
    out = TurboSaveCheckpoint.execute(model, "m")
    assert out.ui.as_dict() == {"text": (second.name,)}
    assert first.read_text() == "the other's"
    assert read_checkpoint(second).has_sla
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_drive_that_fails_is_not_called_full(files, tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path))

    model = load_turbo_model(files["t2v-quant.pth"])
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"^saved.safetensors .*\(Input/output error\)") as caught:
        _save(model, tmp_path)
    assert "space" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_an_interrupted_save_leaves_nothing(files, tmp_path):
    model = load_turbo_model(files["t2v-quant.pth"])
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        _save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
