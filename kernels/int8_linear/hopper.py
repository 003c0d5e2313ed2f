"""The INT8 linear layer on Hopper, in CUDA C++: see hopper.cu."""

from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import multiprocessors

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
TILE_L, TILE_N = 128, 256
THREADS = 384
STAGE_BYTES = (TILE_L + TILE_N) * 128
FETCHED = 256  # bytes of a row: the next step's come along, in half as many requests to memory
# Alignment and hopper.cu's Shared.
SHARED_BYTES = 1024 + 4 * (STAGE_BYTES + 16) + 2 * (TILE_N * 8 + 16)
Operands = nvrtc.operands(
    maps="x_map w_map",
    pointers="x_scale w_scale bias gate residual out squares",
    integers="batch length n k gate_b residual_b residual_l out_b out_l",
)


def unfit(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> str | None:
    """Why the kernel cannot compute this linear, with a scale per row; None where it can."""
    optional = [x for x in (bias, residual, gate) if x is not None]
    device, dtype = x_q.device, out.dtype
    for x in (x_scale, w_q, w_scale, *optional):
        if x.device != device:
            return "tensors are on different devices"
    if dtype == torch.float32:
        return "the output is float32"
    for x in (bias, residual):
        if x is not None and x.dtype != dtype:
            return "bias or residual are of another dtype than the output"
    together = w_scale.data_ptr()  # the bits of all addresses that must be multiples of 8
    if gate is not None:
        sample, _, channel = gate.stride()
        if gate.dtype != torch.float32 or gate.shape[1] != 1:
            return "the gate is not one float32 vector a sample"
        if channel != 1 or sample % 2:
            return "the gate is not contiguous"
        together |= gate.data_ptr()
    for x in (x_q, w_q, out) if residual is None else (x_q, w_q, out, residual):
        if not in_steps_of_16_bytes(x):
            return "rows do not begin at multiples of 16 bytes"
        if max(x.stride()) >= 2**31:
            return "strides exceed int32"
    if together % 8 or (bias is not None and bias.data_ptr() % 4) or out.shape[2] % 8:
        return "columns do not come in aligned eights"
    return None


def tiles(multiprocessors: int) -> tuple[int, int, int]:
    """Rows and columns of what a cluster takes at a time, and how many there are at once."""
    return 2 * TILE_L, TILE_N, max(multiprocessors // 2, 1)


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    squares: Tensor | None = None,
) -> Tensor:
    """`int8_linear` with a scale per row, of what is not `unfit`; to `squares` as below."""
    batch, length, k = x_q.shape
    n = w_q.shape[0]
    rows, columns, at_once = tiles(multiprocessors(x_q.device))
    pairs = batch * -(-length // rows) * -(-n // columns)
    x_scale = x_scale.contiguous()
    operands = Operands(
        nvrtc.tensor_map(x_q, TILE_L, FETCHED), nvrtc.tensor_map(w_q, TILE_N // 2, FETCHED),
        *map(nvrtc.address, (x_scale, w_scale, bias, gate, residual, out, squares)),
        batch, length, n, k, 0 if gate is None else gate.stride(0),
        *((0, 0) if residual is None else residual.stride()[:2]), *out.stride()[:2],
    )  # fmt: skip
    kernel = nvrtc.load(
        SOURCE, "int8_linear", TARGET, SHARED_BYTES, Operands, x_q.get_device(),
        BF16=int(out.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(2 * min(pairs, at_once), THREADS, operands)
    return out


def linear_and_squares(*operands: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`linear` without a residual, and what its rows' squares add up to before they are rounded.

    float32 [B, P, L], in P parts to add up; None where the columns are not whole tiles.
    """
    out = operands[-1]
    batch, length, n = out.shape
    if n % TILE_N:
        return linear(*operands), None
    squares = torch.empty(batch, n // TILE_N, length, dtype=torch.float32, device=out.device)
    return linear(*operands, squares), squares
