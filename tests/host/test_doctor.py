"""TurboDoctor inside ComfyUI."""

import re

import comfyui_install
import pytest
import torch
from in_comfyui import DEVICE, DYNAMIC, comfy
from turbodiffusion_pack.nodes.doctor import TurboDoctor
from turbodiffusion_pack.turbo_core import diagnosis
from turbodiffusion_pack.turbo_core.host import doctor


@pytest.fixture
def no_trials(monkeypatch):
    """The trials have their own test; here they would only take time on a GPU."""
    monkeypatch.setattr(diagnosis, "trials", lambda device: {})


def test_the_node_shows_what_it_returns(no_trials):
    out = TurboDoctor.execute()
    (text,) = out.args
    assert text.startswith("TurboDiffusion for Wan ")
    assert f"\nModels run on: {DEVICE}" in text
    assert out.ui.as_dict() == {"text": (text,)}


def test_it_names_the_running_comfyui(no_trials):
    (line,) = (x for x in doctor.doctor_report().splitlines() if x.startswith("ComfyUI"))
    versions = comfyui_install.find().joinpath("comfyui_version.py").read_text(encoding="utf-8")
    (version,) = re.findall('__version__ = "(.+)"', versions)
    assert line.startswith(f"ComfyUI {version}, ")
    assert re.search(r", \w+ attention, \d+\.\d GiB RAM$", line)
    if DYNAMIC:
        assert ", dynamic VRAM, " in line
    elif not torch.cuda.is_available():
        assert ", VRAM state DISABLED, " in line


def test_dynamic_vram_is_told(monkeypatch):
    memory = pytest.importorskip("comfy.memory_management", reason="newer hosts have it")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    assert ", dynamic VRAM, " in doctor.comfyui_line()
    monkeypatch.setattr(memory, "aimdo_enabled", False)
    assert ", VRAM state " in doctor.comfyui_line()


def test_it_examines_anew_in_every_run():
    assert TurboDoctor.fingerprint_inputs() != TurboDoctor.fingerprint_inputs()


def test_it_leaves_models_where_they_are(no_trials):
    before = list(comfy.model_management.current_loaded_models)
    doctor.doctor_report()
    assert comfy.model_management.current_loaded_models == before
