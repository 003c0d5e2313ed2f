"""INT8 of rows after GELU in CUDA C++, on cards of mma.sync: see mma.cu. Plain rows are as fast in
Triton."""

import functools
from pathlib import Path

from torch import Tensor

from .. import nvrtc
from ..dispatch import capability
from . import hopper

SOURCE = Path(__file__).with_suffix(".cu")
SPAN = 256  # channels that a warp takes at once
MOST = 6  # of them a thread has registers for
FEWEST_WARPS, MOST_WARPS = 2, 16  # of a row
MOST_PROGRAMS = 16  # that sm_86 holds on a multiprocessor


def unfit(x: Tensor) -> str | None:
    """Why the kernel cannot quantize these rows; None where it can."""
    if shape_of_program(x.shape[-1]) is None:
        return f"rows of {x.shape[-1]} channels do not divide into warps"
    return hopper.unfit(x)  # the same rows otherwise


@functools.cache
def shape_of_program(channels: int) -> tuple[int, int, int] | None:
    """Warps of a program, spans of each, and programs of a multiprocessor; None if there is no such
    division."""
    spans, rest = divmod(channels, SPAN)
    for each in range(MOST, 0, -1):
        warps = spans // each
        if rest == 0 and spans % each == 0 and FEWEST_WARPS <= warps <= MOST_WARPS:
            registers = 4 * each + 32
            at_once = 4 * (16384 // (32 * registers))  # warps, on four schedulers
            return warps, each, min(at_once // warps, MOST_PROGRAMS)
    return None


def quantize_rows(
    x: Tensor, activation: str | None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the Triton file, after GELU, of what is not `unfit`."""
    warps, each, programs = shape_of_program(x.shape[-1])
    target = nvrtc.target_of(capability(x.device), x.device)
    load = functools.partial(nvrtc.load, SOURCE, "activate_rows", target, 12 * warps)
    return hopper.launch(load, x, warps, each, programs)
