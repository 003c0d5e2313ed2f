"""Which implementation of an op runs: decided before the call, from declared constraints.

An op has a torch reference, a Triton file with the same functions, and in some cases CUDA C++ that
stands in for Triton: for Hopper, or by mma.sync for GeForce cards and A100. `choose` takes one of
them and tells whoever listens.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from . import nvrtc
from .checks import Remembered

OLDEST_TRITON = (3, 4)
HOPPER = (9, 0)  # its compute capability
# Major compute capabilities of the cards whose tensor cores know no faster instruction than
# mma.sync. Data center Blackwell has one that Triton uses.
BY_MMA_SYNC = (8, 12)

try:
    import triton

    _TRITON_PROBLEM = None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        _TRITON_PROBLEM = f"Triton {triton.__version__} is too old, 3.4 is the oldest that works"
except ImportError as error:
    _TRITON_PROBLEM = f"Triton is not installed ({error})"

BACKENDS = ("auto", "triton", "reference")

# What `choose` tells its listener that an op runs in.
REFERENCE, TRITON, CUDA = "torch reference", "Triton", "CUDA"

Listener = Callable[[str, str, str | None], None]

log = logging.getLogger(__name__)

_HERE = contextlib.nullcontext()
_unfitting = Remembered()  # what modules in CUDA C++ said of operands of a layout
_listener = contextvars.ContextVar("kernel_listener", default=None)
listener = _listener.get  # who is told of ops now, see `listening`, or None


def has_triton() -> bool:
    """Whether the Triton files can be imported at all."""
    return _TRITON_PROBLEM is None


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (tests do that)."""
    return has_triton() and triton.knobs.runtime.interpret


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) for any other."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device, 1 for any other."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_tma(device: torch.device) -> bool:
    """Whether `device` has the copy engine (TMA) that reads by tensor maps (sm_90 and newer)."""
    return capability(device) >= (9, 0)


def has_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of `device` take fp8 e4m3 (sm_89 and newer)."""
    return capability(device) >= (8, 9)


@functools.cache
def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    if not has_triton():
        return _TRITON_PROBLEM
    if interpreting():
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {device.type}, the kernels are for NVIDIA GPUs"
    if capability(device) < (8, 0):
        major, minor = capability(device)
        return f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"
    return None


def cuda_kernels(
    device: torch.device, hopper: ModuleType | None, mma: ModuleType | None
) -> ModuleType | None:
    """Whichever of an op's modules in CUDA C++ can run on `device`; None where neither can."""
    cuda = _cuda_for(device, hopper, mma)
    return None if cuda is None or triton_unavailable(device) or nvrtc.unavailable() else cuda


def cuda_unavailable(device: torch.device) -> str | None:
    """Why Hopper's CUDA C++ kernels cannot run on `device`; None where they can."""
    if capability(device) != HOPPER:
        return "they are for Hopper, sm_90"
    return triton_unavailable(device) or nvrtc.unavailable()


def choose(
    op: str,
    backend: str,
    x: torch.Tensor,
    reference: ModuleType,
    triton: ModuleType | None,
    hopper: ModuleType | None = None,
    mma: ModuleType | None = None,
    unsupported: tuple[str | None, ...] = (),
    operands: tuple = (),
    layout: object = None,
) -> ModuleType:
    """The implementation that runs `op` on `x`, told to the listener, see `listening`.

    Args:
        op: the op's name, for messages and the listener.
        backend: "auto" takes Triton where it can run; "triton" insists; "reference" avoids it. On
            GPUs CUDA C++ stands in for Triton in the ops that have it.
        x: a tensor on the device the op runs on.
        reference, triton: the op's modules; triton is None where it cannot be imported.
        hopper, mma: its modules in CUDA C++ for Hopper and for cards of mma.sync, whose
            `unfit(*operands)` says why they cannot take them.
        layout: stands for all that it looks at, if given: then it is asked once for each.
        unsupported: further reasons against Triton that the op declares, None where one does not
            hold.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    why = why_reference(op, backend, x, *unsupported)
    if why is not None:
        name, module = REFERENCE, reference
    elif hopper is mma is None or (cuda := _cuda_for(x.device, hopper, mma)) is None:
        name, module = TRITON, triton
    elif why := nvrtc.unavailable() or _unfit(cuda, operands, layout):
        name, module = TRITON, triton
        say_once(f"{op} runs in Triton, more slowly: {why}")
    else:
        name, module = CUDA, cuda
    # Inside torch.compile the telling would be traced.
    if not torch.compiler.is_compiling() and (tell := _listener.get()):
        tell(op, name, why)
    return module


def _cuda_for(
    device: torch.device, hopper: ModuleType | None, mma: ModuleType | None
) -> ModuleType | None:
    """Whichever of an op's modules in CUDA C++ is for this device."""
    if (card := capability(device)) == HOPPER:
        return hopper
    return mma if card[0] in BY_MMA_SYNC else None


def _unfit(cuda: ModuleType, operands: tuple, layout: object) -> str | None:
    """Why a module in CUDA C++ cannot take `operands`; None where it can."""
    if layout is None:
        return cuda.unfit(*operands)
    key = cuda, layout
    return _unfitting[key] if key in _unfitting else _unfitting.put(key, cuda.unfit(*operands))


@contextlib.contextmanager
def listening(tell: Listener) -> Iterator[None]:
    """Meanwhile, in this context, call tell(op, name, why) for each op that is about to run.

    `name` is REFERENCE, TRITON or CUDA, `why` the reason if a faster one was declined.
    """
    token = _listener.set(tell)
    try:
        yield
    finally:
        _listener.reset(token)


def why_reference(op: str, backend: str, x: torch.Tensor, *unsupported: str | None) -> str | None:
    """Why `op` on `x` runs its torch reference; None where it runs a kernel. See `choose`.

    Where that is slower than the GPU could be, the log tells once.
    """
    if backend == "reference":
        return "it was asked for"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is unknown, use one of {', '.join(BACKENDS)}")
    unavailable = triton_unavailable(x.device)
    if not unavailable and not any(unsupported):
        return "Triton only interprets here" if backend == "auto" and interpreting() else None
    reason = "; ".join(reason for reason in (unavailable, *unsupported) if reason)
    if backend == "triton":
        raise RuntimeError(f"{op}: Triton was asked for, but {reason}. Use 'auto'.")
    if x.device.type == "cuda":
        say_once(f"{op} runs on the slow torch reference: {reason}")
    return reason


def launching_on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context to launch a kernel on x in: its device is the current one there."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


@functools.cache
def say_once(message: str) -> None:
    """Log `message` as a warning, the first time only."""
    log.warning(message)
