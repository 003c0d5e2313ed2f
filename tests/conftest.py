"""Makes the pack importable without ComfyUI, as `turbodiffusion_pack.kernels` and so on."""

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The pack's own `nodes` folder must not shadow ComfyUI's nodes.py.
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "support"))

import dynamic_vram  # noqa: E402

if dynamic_vram.wanted():
    dynamic_vram.prepare()

import pytest  # noqa: E402
import torch  # noqa: E402

pack = types.ModuleType("turbodiffusion_pack")
pack.__path__ = [str(ROOT)]
sys.modules["turbodiffusion_pack"] = pack

# Without a GPU the Triton kernels run in Triton's interpreter; set before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU of sm_80 or newer")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
