"""TurboDoctor inside ComfyUI."""

from pathlib import Path

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..diagnosis import GIB, comfyui_version, report
from .versions import has_dynamic_vram


def doctor_report() -> str:
    """TurboDoctor's text for the device that ComfyUI runs models on."""
    return report(comfy.model_management.get_torch_device(), comfyui_line())


def comfyui_line() -> str:
    """The running ComfyUI: version, how it manages memory, its attention."""
    version = comfyui_version(Path(comfy.samplers.__file__).parents[1])
    state = comfy.model_management.vram_state.name
    memory = "dynamic VRAM" if has_dynamic_vram() else f"VRAM state {state}"
    ram = comfy.model_management.get_total_memory(torch.device("cpu")) / GIB
    attention = optimized_attention.__name__.removeprefix("attention_")
    return f"ComfyUI {version}, {memory}, {attention} attention, {ram:.1f} GiB RAM"
