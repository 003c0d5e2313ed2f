"""The CUDA driver, as far as kernels need it to start: the same calls for Triton's and CUDA C++."""

import contextlib
import contextvars
import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterator

import torch

log = logging.getLogger(__name__)

# Numbers of torch's current stream on a device and of its current device, which Triton asks for as
# well: what torch.cuda makes of them takes ten times as long. A torch without CUDA has neither.
_stream_on = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_current_device = getattr(torch._C, "_cuda_getDevice", None)

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_recorder = contextvars.ContextVar("launch_recorder", default=None)
recorder = _recorder.get  # the tape's Recorder that hears of launches now, or None


@contextlib.contextmanager
def told_to(recorder: object) -> Iterator[None]:
    """Meanwhile, in this context, a tape's Recorder is told of each launch."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def stream_on(device: int) -> int:
    """Torch's current stream on a device."""
    return _stream_on(device)


def on_device(device: int) -> contextlib.AbstractContextManager:
    """The context to launch on `device` in: it is the current one there."""
    return contextlib.nullcontext() if _current_device() == device else torch.cuda.device(device)


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def check(code: int) -> None:
    """Raise what a call of the driver gave.

    Raises:
        torch.OutOfMemoryError: of the GPU's memory, as torch and ComfyUI know it: there was none
            left for a kernel's code, say.
        RuntimeError: the driver refused.
    """
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        kind = torch.OutOfMemoryError if code == OUT_OF_MEMORY else RuntimeError
        raise kind(f"the CUDA driver failed: {(text.value or b'unknown').decode()}")


def with_room(load: Callable):
    """load(), which brings a kernel's code to the GPU; where that has no memory left for it, once
    more behind what torch keeps there for later given back.

    Raises:
        torch.OutOfMemoryError: there is none then either. Triton raises a plain RuntimeError.
    """
    try:
        return load()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
    log.info("TurboDiffusion: torch's cache on the GPU is given back for a kernel's code")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    try:
        return load()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def start(
    function: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    device: int,
    parameters: ctypes.Array,
) -> None:
    """Start a kernel that was loaded on `device` on torch's current stream there.

    `parameters` are addresses of what the kernel takes, which the driver reads before it returns.

    Raises:
        RuntimeError: the driver refuses.
    """
    if _current_device() != device:
        with torch.cuda.device(device):
            start(function, grid, threads, shared_bytes, device, parameters)
        return
    x, y, z = grid
    stream = ctypes.c_void_p(_stream_on(device))
    # Each by itself: with `*grid` the call takes half as long again.
    code = driver().cuLaunchKernel(
        function, x, y, z, threads, 1, 1, shared_bytes, stream, parameters, None
    )
    if code:
        check(code)
