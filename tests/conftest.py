"""Makes the pack importable, and skips what needs a GPU where there is none."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "support"))

import dynamic_vram
import interpreter
import pack  # noqa: F401

if dynamic_vram.wanted():
    dynamic_vram.prepare()

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; set before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.speed_up()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU of sm_80 or newer")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
