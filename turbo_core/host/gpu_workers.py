"""The workers of this ComfyUI: one for each further GPU, started when first needed, then kept."""

import atexit
import contextlib
import itertools
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.options
import torch
import torch.distributed as dist

from ..parallel.workers import Workers

SET_UP = ".turbo_core.host.split_start:set_up"

ON_CPUS = False  # True in tests: then each "GPU" of a CPU is a process

_workers: Workers | None = None
_device: torch.device | None = None  # that of this process, which workers have no part of
_keys, _numbers = weakref.WeakKeyDictionary(), itertools.count()


def why_no_workers(gpus: int, device: torch.device) -> str | None:
    """Why this process cannot have `gpus` GPUs together with `device`; None where it can."""
    if sys.platform != "linux":
        return "sharing needs Linux, where GPUs can exchange by NCCL; on Windows take WSL"
    if device.type != "cuda" and not (ON_CPUS and device.type == "cpu"):
        return f"sharing is for NVIDIA GPUs, not for {device.type}"
    if device.type == "cuda" and (seen := torch.cuda.device_count()) < gpus:
        only = f"only {seen} is" if seen == 1 else f"only {seen} are"
        return f"{gpus} GPUs are asked for and {only} visible; was it started with --cuda-device?"
    if not dist.is_available() or (device.type == "cuda" and not dist.is_nccl_available()):
        return "this torch cannot exchange between GPUs"
    if device.type == "cuda" and _numbered(device) != _numbered(torch.device("cuda")):
        return f"the model is on {device}, and only ComfyUI's own GPU can be among those that share"
    if dist.is_initialized() and not _is_running():
        return "another node has workers of its own in this process"
    return None


def workers_for(gpus: int, device: torch.device) -> Workers:
    """The workers that make `gpus` GPUs with `device`; others are ended."""
    global _workers, _device
    device = _numbered(device)
    if _workers is None or (_workers.count, _device) != (gpus, device):
        stop()
        _workers, _device = _made(gpus, device), device
    return _workers


def running_workers(device: torch.device | None = None) -> Workers | None:
    """The workers there are at this moment; of `device` only, where one is given."""
    if device is not None and _numbered(device) != _device:
        return None
    return _workers if _is_running() and _workers.running else None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While this lasts ComfyUI does not look whether the user has cancelled, and finds out later.

    It looks before each layer, and a rank that stops there leaves the others waiting.
    """
    look = comfy.model_management.throw_exception_if_processing_interrupted
    comfy.model_management.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = look


def stop() -> None:
    """End all workers."""
    global _workers
    if _workers is not None:
        _workers.stop()
    _workers = None


atexit.register(stop)


def key_of(model: torch.nn.Module) -> int:
    """The number that workers know a model by, for as long as it is here."""
    if model not in _keys:
        _keys[model] = next(_numbers)
    return _keys[model]


def keys_alive() -> set[int]:
    """The numbers of all models that are still here."""
    return set(_keys.values())


def _is_running() -> bool:
    return _workers is not None and _workers.ranks is not None


def _numbered(device: torch.device) -> torch.device:
    """The same with its number: "cuda" is the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _made(gpus: int, device: torch.device) -> Workers:
    """Workers that start with the first job."""
    comfyui = Path(comfy.model_management.__file__).parents[1]
    arguments = sys.argv[1:] if comfy.options.args_parsing else []
    if device.type == "cpu":
        backend, devices = "gloo", [None] * (gpus - 1)
    else:
        backend = "cpu:gloo,cuda:nccl"
        others = (i for i in range(torch.cuda.device_count()) if i != device.index)
        devices = list(itertools.islice(others, gpus - 1))
    first = SET_UP, [(d, arguments) for d in devices]
    return Workers(gpus, backend, [str(comfyui)], first)
