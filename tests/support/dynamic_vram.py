"""Turns on a newer ComfyUI's dynamic VRAM in the test process, as its main.py does at its start.

`DYNAMIC_VRAM=1` in the environment asks for it. It needs comfy-aimdo and an NVIDIA GPU; without a
GPU it is simulated, see simulated_vram.py.
"""

import contextlib
import os

import simulated_vram


def wanted() -> bool:
    return bool(os.environ.get("DYNAMIC_VRAM"))


def prepare() -> None:
    """Load comfy-aimdo; before torch, whose calls to the driver it takes over."""
    import comfy_aimdo.control

    # It does not load where there is no driver, which enable() finds out.
    comfy_aimdo.control.init()


def enable() -> None:
    """Make every MODEL from now on a dynamic one; ComfyUI is imported, no model is."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control
    import torch

    if torch.cuda.is_available():
        devices = comfy.model_management.get_all_torch_devices()
        if not comfy_aimdo.control.init_devices((device.index, 0) for device in devices):
            raise RuntimeError("DYNAMIC_VRAM is set, but comfy-aimdo takes none of the GPUs")
    else:
        simulated_vram.enable()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


@contextlib.contextmanager
def full():
    """While this lasts no weight finds room on the GPU, so each is fetched for each use."""
    import comfy_aimdo.model_vbar

    fault = comfy_aimdo.model_vbar.vbar_fault
    comfy_aimdo.model_vbar.vbar_fault = lambda _: None
    try:
        yield
    finally:
        comfy_aimdo.model_vbar.vbar_fault = fault
