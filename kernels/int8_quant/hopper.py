"""INT8 of rows on Hopper, in CUDA C++: see hopper.cu."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import multiprocessors
from ..room import in_whole_blocks

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
SPAN = 256  # channels that a warp takes at once
MOST = 6  # of them a thread has registers for, this row's and the next one's
MOST_WARPS = 16
Operands = nvrtc.operands(pointers="x q scale", integers="length rows x_b x_l")


def unfit(x: Tensor) -> str | None:
    """Why the kernel cannot quantize these rows; None where it can."""
    if x.dtype == torch.float32:
        return "the rows are float32"
    if shape_of_program(x.shape[-1]) is None:
        return f"rows of {x.shape[-1]} channels do not divide into warps"
    if x.stride(-1) != 1:
        return "channels do not lie side by side"
    if not in_steps_of_16_bytes(x):
        return "rows do not begin at multiples of 16 bytes"
    if max(x.stride()) >= 2**31:
        return "strides exceed int32"
    return None


@functools.cache
def shape_of_program(channels: int) -> tuple[int, int, int] | None:
    """Warps of a program, spans of each, and programs of a multiprocessor; None if there is no such
    division."""
    spans, rest = divmod(channels, SPAN)
    for each in range(MOST, 0, -1):
        if rest == 0 and spans and spans % each == 0 and spans <= MOST_WARPS * each:
            warps = spans // each
            registers = 12 * each + 40
            return warps, each, 65536 // (32 * warps * registers)
    return None


def quantize_rows(
    x: Tensor, activation: str | None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the Triton file, without an amax, of what is not `unfit`."""
    warps, each, programs = shape_of_program(x.shape[-1])
    load = functools.partial(
        nvrtc.load, SOURCE, "quantize_rows", TARGET, 8 * warps, ACTIVATE=int(activation is not None)
    )
    return launch(load, x, warps, each, programs)


def launch(
    load: Callable[..., nvrtc.Kernel], x: Tensor, warps: int, each: int, programs: int
) -> tuple[Tensor, Tensor]:
    """What the kernel that `load` gives makes of x, here and in mma.py; see `shape_of_program`."""
    batch, length, channels = x.shape
    q = in_whole_blocks(*x.shape, torch.int8, x.device)
    scale = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    rows = batch * length
    operands = Operands(*map(nvrtc.address, (x, q, scale)), length, rows, *x.stride()[:2])
    kernel = load(
        Operands, x.device.index, WARPS=warps, EACH=each, CHANNELS=channels, PROGRAMS=programs,
        BF16=int(x.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(min(rows, programs * multiprocessors(x.device)), 32 * warps, operands)
    return q, scale
