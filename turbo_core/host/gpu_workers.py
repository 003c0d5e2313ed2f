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

_workers: Workers | None = None
_keys, _numbers = weakref.WeakKeyDictionary(), itertools.count()


def why_no_workers(gpus: int, device: torch.device) -> str | None:
    """Why this process cannot have `gpus` GPUs together with `device`; None where it can.

    On a CPU each "GPU" is a process, for tests.
    """
    if sys.platform != "linux":
        return "sharing needs Linux, where GPUs can exchange by NCCL; on Windows take WSL"
    if device.type not in ("cuda", "cpu"):
        return f"sharing is for NVIDIA GPUs, not for {device.type}"
    if device.type == "cuda" and (seen := torch.cuda.device_count()) < gpus:
        only = f"only {seen} is" if seen == 1 else f"only {seen} are"
        return f"{gpus} GPUs are asked for and {only} visible; was it started with --cuda-device?"
    if not dist.is_available() or (device.type == "cuda" and not dist.is_nccl_available()):
        return "this torch cannot exchange between GPUs"
    if dist.is_initialized() and not _is_running():
        return "another node has workers of its own in this process"
    return None


def workers_for(gpus: int, device: torch.device) -> Workers:
    """The workers that make `gpus` GPUs with `device`; others are ended."""
    global _workers
    if _workers is None or _workers.count != gpus:
        stop()
        _workers = _made(gpus, device)
    return _workers


def running_workers() -> Workers | None:
    """The workers there are at this moment."""
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


def _made(gpus: int, device: torch.device) -> Workers:
    """Workers that start with the first job."""
    comfyui = Path(comfy.model_management.__file__).parents[1]
    arguments = sys.argv[1:] if comfy.options.args_parsing else []
    if device.type == "cpu":
        backend, devices = "gloo", [None] * (gpus - 1)
    else:
        own = torch.cuda.current_device() if device.index is None else device.index
        backend = "cpu:gloo,cuda:nccl"
        devices = [i for i in range(torch.cuda.device_count()) if i != own][: gpus - 1]
    first = SET_UP, [(d, arguments) for d in devices]
    return Workers(gpus, backend, [str(comfyui)], first)
