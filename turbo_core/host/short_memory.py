"""A GPU whose memory is short: torch's cache goes back to it first, and where memory ends.

The allocator that the host has torch use, cudaMallocAsync, cannot give a tensor what is free in
pieces between others, and takes more of the GPU for it: 3.7 GB of tensors took 4.3 to 5.2 GB of it.
Where the GPU has no more it neither waits for what is free only once kernels are done, nor gives
back what it has free. So an operation that found no room is run again after both: it had not begun.
"""

import contextlib
from collections.abc import Iterator

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch.utils._python_dispatch import TorchDispatchMode

from .. import run_report

ENOUGH = 2  # times what is needed; with less memory is short
ACTIVATIONS = 5  # of bf16, that a pass needs
CACHED = 2**28  # bytes of torch's cache that are worth waiting for the GPU


@contextlib.contextmanager
def tried_again(device: torch.device, needed: float) -> Iterator[None]:
    """Around what works in so many bytes of `device`."""
    if not _is_short(device, needed):
        yield
        return
    if _cached(device) >= CACHED:  # nothing of what was before is left in between
        comfy.model_management.soft_empty_cache()
    with TriedAgain(device):
        yield


def around_pass(
    x: torch.Tensor, dim: int, transformer_options: dict
) -> contextlib.AbstractContextManager:
    """The same around a pass of the latents x [B, C, T, H, W] through `dim` channels.

    Not where a node wraps the pass, torch.compile perhaps: it compiles nothing below such a mode.
    """
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if any(wrappers.values()):
        return contextlib.nullcontext()
    batch, _, frames, height, width = x.shape
    tokens = batch * frames * -(-height // 2) * -(-width // 2)
    return tried_again(x.device, ACTIVATIONS * 2 * tokens * dim)


def _is_short(device: torch.device, needed: float) -> bool:
    free = comfy.model_management.get_free_memory
    return device.type == "cuda" and free(device) < ENOUGH * needed


def _cached(device: torch.device) -> int:
    """Bytes that torch has of the GPU and no tensor has."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _is_capturing() -> bool:
    """Whether a CUDA graph is made, in which the GPU cannot be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class TriedAgain(TorchDispatchMode):
    """While this lasts an operation that runs out of the memory of `device` is run once more,
    behind torch's cache given back. The report is told."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError:
            if func._schema.is_mutable or _is_capturing():
                raise
        before = _cached(self.device)
        comfy.model_management.soft_empty_cache()
        run_report.note_out_of_memory(max(before - _cached(self.device), 0))
        return func(*args, **kwargs)
