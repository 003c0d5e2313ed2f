"""Requantization in CUDA C++, on cards of mma.sync: see mma.cu."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import capability, multiprocessors

SOURCE = Path(__file__).with_suffix(".cu")
CHUNK = 16  # numbers that a thread takes at once
MOST = 9  # of them it has registers for
FEWEST_WARPS, MOST_WARPS = 2, 8  # of a row
MOST_PROGRAMS = 16  # that sm_86 holds on a multiprocessor
Operands = nvrtc.operands(pointers="q scale out row_scale", integers="n q_n")


def unfit(q: Tensor) -> str | None:
    """Why the kernel cannot requantize this weight; None where it can."""
    columns = q.shape[1]
    if columns % CHUNK or columns > CHUNK * 32 * MOST * MOST_WARPS:
        return f"rows of {columns} numbers do not divide into threads"
    if q.stride(1) != 1 or not in_steps_of_16_bytes(q):
        return "rows do not begin at multiples of 16 bytes"
    if q.stride(0) >= 2**31:
        return "strides exceed int32"
    return None


@functools.cache
def shape_of_program(columns: int) -> tuple[int, int, int]:
    """Warps of a program, chunks of each thread, and programs of a multiprocessor."""
    chunks = columns // CHUNK
    warps = max(-(-chunks // (32 * MOST)), FEWEST_WARPS)
    each = -(-chunks // (32 * warps))
    registers = 5 * each + 46
    at_once = 4 * (16384 // (32 * registers))  # warps, on four schedulers
    return warps, each, min(at_once // warps, MOST_PROGRAMS)


def programs_of(rows: int, at_once: int) -> int:
    """As few programs as take the rows in no more turns than `at_once` would: all as many."""
    return -(-rows // -(-rows // at_once))


def requantize_rows(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`requantize_rows` of the Triton file, of what is not `unfit`."""
    rows, columns = q.shape
    warps, each, programs = shape_of_program(columns)
    out = torch.empty(rows, columns, dtype=torch.int8, device=q.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=q.device)
    scale = scale.contiguous()
    operands = Operands(*map(nvrtc.address, (q, scale, out, row_scale)), rows, q.stride(0))
    kernel = nvrtc.load(
        SOURCE, "requantize_rows", nvrtc.target_of(capability(q.device), q.device), 8 * warps,
        Operands, q.get_device(), COLUMNS=columns, WARPS=warps, EACH=each, PROGRAMS=programs,
    )  # fmt: skip
    at_once = programs * multiprocessors(q.device)
    kernel.launch(programs_of(rows, at_once), 32 * warps, operands)
    return out, row_scale
