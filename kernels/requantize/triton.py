"""Requantization in Triton: one pass over the weight, a program per output channel."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import BLOCK
from ..int8_quant.triton import larger, largest, round_to_int8
from ..launching import launched
from ..tuning import REQUANTIZE_ROWS
from .reference import MOST


@functools.cache
def config(columns: int) -> dict[str, int]:
    """Launch of a program that holds a whole row, see kernels/tuning.py."""
    blocks = triton.next_power_of_2(triton.cdiv(columns, BLOCK))
    warps = REQUANTIZE_ROWS.warps(blocks * BLOCK)
    return {"BLOCKS": blocks, "num_warps": warps, "num_stages": 1}


def requantize_rows(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    row_scale = torch.empty(rows, dtype=torch.float32, device=q.device)
    requantize_rows_kernel[(rows,)](
        q, scale.contiguous(), out, row_scale, columns, *q.stride(), **config(columns)
    )
    return out, row_scale


def requantize_rows_of(weights: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    count, (first, _) = len(weights), weights[0]
    rows, columns = first.shape
    out = torch.empty(count, rows, columns, dtype=torch.int8, device=first.device)
    row_scale = torch.empty(count, rows, dtype=torch.float32, device=first.device)
    given = [*weights, *weights[:1] * (MOST - count)]  # what is too much is not read
    requantize_rows_of_kernel[rows, count](
        *(q.contiguous() for q, _ in given), *(scale.contiguous() for _, scale in given),
        out, row_scale, columns, **config(columns),
    )  # fmt: skip
    return list(zip(out.unbind(), row_scale.unbind(), strict=True))


@triton.jit
def requantize_row(
    q_ptr, scale_ptr, out_ptr, row_scale_ptr, row, columns, stride_r, stride_c,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the weight at q_ptr; what comes of it is the first one at out_ptr."""
    block = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(columns, BLOCK)
    c = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    inside = c < columns
    q = tl.load(q_ptr + row * stride_r + c * stride_c, mask=inside, other=0)
    scale = tl.load(scale_ptr + row // BLOCK * blocks + block, mask=block < blocks, other=0.0)
    w = q.to(tl.float32) * scale[:, None]
    amax = larger(largest(tl.abs(w)), 1e-8)
    tl.store(out_ptr + c, round_to_int8(w, amax), mask=inside)
    tl.store(row_scale_ptr, amax * (1 / 128))


@launched
@triton.jit
def requantize_rows_kernel(
    q_ptr, scale_ptr, out_ptr, row_scale_ptr, columns, stride_r, stride_c,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr = BLOCK,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    requantize_row(
        q_ptr, scale_ptr, out_ptr + row * columns, row_scale_ptr + row, row, columns,
        stride_r, stride_c, BLOCKS, BLOCK,
    )  # fmt: skip


@launched
@triton.jit
def requantize_rows_of_kernel(
    q0_ptr, q1_ptr, q2_ptr, q3_ptr, q4_ptr, q5_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, scale4_ptr, scale5_ptr,
    out_ptr, row_scale_ptr, columns, BLOCKS: tl.constexpr, BLOCK: tl.constexpr = BLOCK,
):  # fmt: skip
    row, weight = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_ptr, scale_ptr = q0_ptr, scale0_ptr
    if weight == 1:
        q_ptr, scale_ptr = q1_ptr, scale1_ptr
    elif weight == 2:
        q_ptr, scale_ptr = q2_ptr, scale2_ptr
    elif weight == 3:
        q_ptr, scale_ptr = q3_ptr, scale3_ptr
    elif weight == 4:
        q_ptr, scale_ptr = q4_ptr, scale4_ptr
    elif weight == 5:
        q_ptr, scale_ptr = q5_ptr, scale5_ptr
    out = weight * tl.num_programs(0) + row
    requantize_row(
        q_ptr, scale_ptr, out_ptr + out * columns, row_scale_ptr + out, row, columns,
        columns, 1, BLOCKS, BLOCK,
    )  # fmt: skip
