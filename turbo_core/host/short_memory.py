"""A GPU whose memory is short: torch's cache goes back to it first, and where memory ends.

The allocator that the host has torch use, cudaMallocAsync, cannot give a tensor what is free in
pieces between others, and takes more of the GPU for it: 3.7 GB of tensors took 4.3 to 5.2 GB of it.
Where the GPU has no more it neither waits for what is free only once kernels are done, nor gives
back what it has free. So an operation that found no room is run again after both.
"""

import contextlib
from collections.abc import Iterator

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch.utils._python_dispatch import TorchDispatchMode

from .. import run_report
from .cross_attention import OVERRIDE
from .pass_graph import OUR_WRAPPERS
from .patch_owner import is_hooked, is_ours, is_stock

ENOUGH = 2  # times what is needed; with less memory is short
ACTIVATIONS = 5  # of bf16, that a pass needs
CACHED = 2**28  # bytes of torch's cache that are worth waiting for the GPU
MOST = 256  # operations that are run again, some at each block, before it is an error as ever


@contextlib.contextmanager
def tried_again(device: torch.device, needed: float) -> Iterator[None]:
    """Around what works in so many bytes of `device`, and runs nobody else's code."""
    if not _is_short(device, needed):
        yield
        return
    if _cached(device) >= CACHED:  # nothing of what was before is left in between
        _give_back(device)
    mode = TriedAgain(device)
    try:
        with mode:
            yield
    finally:
        if mode.times:
            run_report.note_out_of_memory(mode.times, mode.given_back)


@torch.compiler.disable
def around_pass(
    x: torch.Tensor, network: torch.nn.Module, transformer_options: dict
) -> contextlib.AbstractContextManager:
    """The same around a pass of the latents x [B, C, T, H, W] through `network`.

    Not where another node's code runs in it: below such a mode nothing is compiled, and attention
    of a higher order fails. Nor where GPUs share it, which have to keep step.
    """
    batch, _, frames, height, width = x.shape
    tokens = batch * frames * -(-height // 2) * -(-width // 2)
    needed = ACTIVATIONS * 2 * tokens * network.dim
    if _is_short(x.device, needed) and _is_ours_alone(network, transformer_options):
        return tried_again(x.device, needed)
    return contextlib.nullcontext()


def _is_ours_alone(network: torch.nn.Module, options: dict) -> bool:
    wrappers = options.get("wrappers", {})
    return not (
        any(wrappers.get(WrappersMP.APPLY_MODEL, {}).values())
        or wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).keys() - OUR_WRAPPERS
        or any(options.get(name) for name in ("patches", "patches_replace", OVERRIDE))
        or not all(map(_is_as_it_was, network.modules()))
    )


def _is_as_it_was(module: torch.nn.Module) -> bool:
    own = vars(module)
    ours = is_ours(own.get("forward")) and not is_hooked(module)
    return not own.get("_compiled_call_impl") and (ours or is_stock(module))


def _is_short(device: torch.device, needed: float) -> bool:
    """Whether `device` has little more than `needed`; not if torch's own allocator has it, which
    gives back what is free by itself."""
    if device.type != "cuda" or torch.cuda.get_allocator_backend() == "native":
        return False
    return comfy.model_management.get_free_memory(device) < ENOUGH * needed


def _cached(device: torch.device) -> int:
    """Bytes that torch has of the GPU and no tensor has."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _give_back(device: torch.device) -> int:
    """Torch's cache to the GPU, once it is done; how many bytes that were."""
    before = _cached(device)
    torch.cuda.synchronize(device)
    comfy.model_management.soft_empty_cache()
    return max(before - _cached(device), 0)


class TriedAgain(TorchDispatchMode):
    """While this lasts an operation of torch's own that finds no room on `device` is run once more,
    behind torch's cache given back.

    Nothing is seen of what it has done by then: those that write into what they are given are left
    out. Only the allocator's own error counts; the driver's may be of an operation before.

    Attributes:
        times, given_back: operations, and bytes for them.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.times, self.given_back = device, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError:
            if func.namespace != "aten" or func._schema.is_mutable or self.times == MOST:
                raise
        self.times += 1
        self.given_back += _give_back(self.device)
        return func(*args, **kwargs)
