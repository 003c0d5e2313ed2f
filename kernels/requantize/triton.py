"""Requantization in Triton: one pass over the weight, a program per output channel."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import BLOCK
from ..int8_quant.triton import larger, largest, round_to_int8
from ..launching import launched
from ..tuning import REQUANTIZE_ROWS


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


@launched
@triton.jit
def requantize_rows_kernel(
    q_ptr,
    scale_ptr,
    out_ptr,
    row_scale_ptr,
    columns,
    stride_r,
    stride_c,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr = BLOCK,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(columns, BLOCK)
    c = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BLOCKS, BLOCK]
    inside = c < columns
    q = tl.load(q_ptr + row * stride_r + c * stride_c, mask=inside, other=0)
    scale = tl.load(scale_ptr + row // BLOCK * blocks + block, mask=block < blocks, other=0.0)
    w = q.to(tl.float32) * scale[:, None]
    amax = larger(largest(tl.abs(w)), 1e-8)
    tl.store(out_ptr + row * columns + c, round_to_int8(w, amax), mask=inside)
    tl.store(row_scale_ptr + row, amax * (1 / 128))
