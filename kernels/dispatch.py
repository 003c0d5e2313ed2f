"""Which implementation of an op runs: decided before the call, from declared constraints."""

import contextlib
import functools
import logging

import torch

OLDEST_TRITON = (3, 4)
HOPPER = (9, 0)  # its compute capability

try:
    import triton

    _TRITON_PROBLEM = None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        _TRITON_PROBLEM = f"Triton {triton.__version__} is too old, 3.4 is the oldest that works"
except ImportError as error:
    _TRITON_PROBLEM = f"Triton is not installed ({error})"

BACKENDS = ("auto", "triton", "reference")

log = logging.getLogger(__name__)

_HERE = contextlib.nullcontext()


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


def use_triton(op: str, backend: str, x: torch.Tensor, *unsupported: str | None) -> bool:
    """Choose between the Triton and the reference version of `op`.

    Args:
        op: the op's name, for messages.
        backend: "auto" takes Triton where it can run; "triton" insists; "reference" avoids it. On
            Hopper CUDA C++ stands in for Triton in the ops that have it.
        x: a tensor on the device the op runs on.
        unsupported: further reasons against Triton that the op declares, None where one holds not.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is unknown, use one of {', '.join(BACKENDS)}")
    reason = reference_reason(backend, x, *unsupported)
    if reason is None:
        return True
    if backend == "triton":
        raise RuntimeError(f"{op}: Triton was asked for, but {reason}. Use 'auto'.")
    if backend == "auto" and x.device.type == "cuda":
        say_once(f"{op} runs on the slow torch reference: {reason}")
    return False


def reference_reason(backend: str, x: torch.Tensor, *unsupported: str | None) -> str | None:
    """Why an op on `x` runs its torch reference; None where it runs Triton. See `use_triton`."""
    if backend == "reference":
        return "it was asked for"
    unavailable = triton_unavailable(x.device)
    if unavailable or any(unsupported):
        return "; ".join(reason for reason in (unavailable, *unsupported) if reason)
    return "Triton only interprets here" if backend == "auto" and interpreting() else None


def launching_on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context to launch a kernel on x in: its device is the current one there."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


@functools.cache
def say_once(message: str) -> None:
    """Log `message` as a warning, the first time only."""
    log.warning(message)
