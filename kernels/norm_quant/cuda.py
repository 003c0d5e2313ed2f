"""LayerNorm and INT8 of rows in CUDA C++, on Hopper and on cards of mma.sync: see cuda.cu."""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import capability, multiprocessors
from ..norm.triton import modulation_strides
from ..room import in_whole_blocks

SOURCE = Path(__file__).with_suffix(".cu")
SPAN = 256  # channels that a warp takes at once
MOST = 10  # of them a thread has registers for, this row's and the next one's
BARRIERS = 15  # for warps that share a row
Operands = nvrtc.operands(
    pointers="x weight bias scale shift q q_scale",
    integers="length programs x_b x_l scale_b shift_b eps",
)


def unfit(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> str | None:
    """Why the kernel cannot normalize these rows, with a scale for each; None where it can."""
    if x.dtype == torch.float32:
        return "the rows are float32"
    if shape_of_program(x.shape[-1]) is None:
        return f"rows of {x.shape[-1]} channels do not divide into warps"
    given = [v for v in (weight, bias, scale, shift) if v is not None]
    if any(v.dtype != torch.float32 for v in given):
        return "weight, bias, scale or shift are not float32"
    if any(v.shape[1] != 1 for v in (scale, shift) if v is not None):
        return "every token has its own scale or shift"
    if any(v.stride(-1) != 1 for v in (x, *given)):
        return "channels do not lie side by side"
    if not all(map(in_steps_of_16_bytes, (x, *given))):
        return "rows do not begin at multiples of 16 bytes"
    if max(x.stride()) >= 2**31:
        return "strides exceed int32"
    return None


def layer_norm_quant(
    x: Tensor,
    granularity: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_quant` of the Triton file, of what is not `unfit`."""
    batch, length, channels = x.shape
    q = in_whole_blocks(batch, length, channels, torch.int8, x.device)
    q_scale = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    sides, each, teams = shape_of_program(channels)
    programs = min(-(-length // teams), -(-multiprocessors(x.device) // batch))
    operands = Operands(
        *map(nvrtc.address, (x, weight, bias, scale, shift, q, q_scale)),
        length, programs, *x.stride()[:2],
        modulation_strides(scale)[0], modulation_strides(shift)[0],
        int.from_bytes(struct.pack("<f", eps), "little"),
    )  # fmt: skip
    target = nvrtc.target_of(capability(x.device), x.device)
    kernel = nvrtc.load(
        SOURCE, "layer_norm_quant", target, shared_bytes(channels, sides * teams), Operands,
        x.device.index,
        SIDES=sides, EACH=each, TEAMS=teams, BF16=int(x.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(batch * programs, 32 * sides * teams, operands)
    return q, q_scale


@functools.cache
def shape_of_program(channels: int) -> tuple[int, int, int] | None:
    """Warps of a row, spans of each, and how many such teams there are in a program, as registers
    and barriers allow; None where channels do not divide into them."""
    spans, rest = divmod(channels, SPAN)
    sides = 1 if spans % 2 else 2
    each = spans // sides
    if rest or not 1 <= each <= MOST:
        return None
    warps = 65536 // (32 * (12 * each + 48))
    return sides, each, min(warps, 2 * BARRIERS) // sides


def shared_bytes(channels: int, warps: int) -> int:
    """cuda.cu's Shared: what belongs to the channels, and what the warps of a row tell."""
    return 2 * channels * 4 + -(-warps * 12 // 16) * 16
