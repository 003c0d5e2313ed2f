"""The first thing that a worker does: it becomes as ComfyUI's own process is."""

import sys

import comfy.options
import torch


def set_up(device: int | None, arguments: list[str]) -> None:
    """Take the GPU `device`, None for the CPU, and ComfyUI's command line; imports no model yet."""
    sys.argv[1:] = arguments
    comfy.options.enable_args_parsing()
    if device is not None:
        torch.cuda.set_device(device)
