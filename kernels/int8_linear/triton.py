"""INT8 linear layer in Triton, one kernel per granularity of the scales."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch

BLOCK = 128
# Row tiles that share their columns of w in L2 before the next columns are taken.
GROUP = 8


def blocks_config(capability: tuple[int, int]) -> dict[str, int]:
    """Launch configuration with block scales; a tile is one block of scales on every side."""
    tile = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_K": BLOCK, "GROUP": GROUP, "num_warps": 8}
    return {**tile, "num_stages": _stages(capability)}


def rows_config(capability: tuple[int, int], out_dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration with row scales; a wide tile only where it does not spill."""
    tile = {"BLOCK_M": 128, "BLOCK_K": 128, "GROUP": GROUP, "num_warps": 8}
    wide = capability[0] == 9 and out_dtype.itemsize == 2
    return {**tile, "BLOCK_N": 256 if wide else 128, "num_stages": _stages(capability)}


def _stages(capability: tuple[int, int]) -> int:
    """Stages of 32 KB: 227 KB a block on data center Hopper and Blackwell, 99 KB on most others."""
    return 4 if capability[0] in (9, 10) else 3


def linear_blocks(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    config = blocks_config(dispatch.capability(x_q.device))
    return _launch(linear_blocks_kernel, config, x_q, x_scale, w_q, w_scale, bias, out_dtype)


def linear_rows(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    config = rows_config(dispatch.capability(x_q.device), out_dtype)
    return _launch(linear_rows_kernel, config, x_q, x_scale, w_q, w_scale, bias, out_dtype)


def _launch(kernel, config, x_q, x_scale, w_q, w_scale, bias, out_dtype) -> Tensor:
    batch, length, k = x_q.shape
    n = w_q.shape[0]
    y = torch.empty(batch, length, n, dtype=out_dtype, device=x_q.device)
    bias = None if bias is None else bias.contiguous()
    tiles = triton.cdiv(length, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    with torch.cuda.device_of(x_q):
        kernel[(tiles, batch)](
            x_q,
            x_scale.contiguous(),
            w_q,
            w_scale.contiguous(),
            bias,
            y,
            length,
            n,
            k,
            *x_q.stride()[:2],
            w_q.stride(0),
            **config,
        )
    return y


@triton.jit
def _tile(length, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program: sample, row tile, column tile."""
    tiles_m = tl.cdiv(length, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP)
    return tl.program_id(1).to(tl.int64), tile_m, tile_n


@triton.jit
def _store(y, y_ptr, bias_ptr, batch, length, n, o_m, o_n):
    """Add the bias and write the tile y."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32)[None, :]
    inside = (o_m < length)[:, None] & (o_n < n)[None, :]
    row = batch * length + o_m
    tl.store(y_ptr + row[:, None] * n + o_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def linear_blocks_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    length,
    n,
    k,
    stride_xb,
    stride_xl,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    batch, tile_m, tile_n = _tile(length, n, BLOCK_M, BLOCK_N, GROUP)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    k_blocks = tl.cdiv(k, BLOCK_K)
    x_scale_ptr += (batch * tl.cdiv(length, BLOCK_M) + tile_m) * k_blocks
    w_scale_ptr += tile_n * k_blocks
    p_x = x_ptr + batch * stride_xb + o_m.to(tl.int64)[:, None] * stride_xl + o_k[None, :]
    p_w = w_ptr + o_n.to(tl.int64)[None, :] * stride_wn + o_k[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(k_blocks):
        inside_k = o_k < k - block * BLOCK_K
        x = tl.load(p_x, mask=(o_m < length)[:, None] & inside_k[None, :], other=0)
        w = tl.load(p_w, mask=(o_n < n)[None, :] & inside_k[:, None], other=0)
        scale = tl.load(x_scale_ptr + block) * tl.load(w_scale_ptr + block)
        y += tl.dot(x, w, out_dtype=tl.int32).to(tl.float32) * scale
        p_x += BLOCK_K
        p_w += BLOCK_K
    _store(y, y_ptr, bias_ptr, batch, length, n, o_m, o_n)


@triton.jit(do_not_specialize=["length"])
def linear_rows_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    length,
    n,
    k,
    stride_xb,
    stride_xl,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    batch, tile_m, tile_n = _tile(length, n, BLOCK_M, BLOCK_N, GROUP)
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    p_x = x_ptr + batch * stride_xb + o_m.to(tl.int64)[:, None] * stride_xl + o_k[None, :]
    p_w = w_ptr + o_n.to(tl.int64)[None, :] * stride_wn + o_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        inside_k = o_k < k - start
        x = tl.load(p_x, mask=(o_m < length)[:, None] & inside_k[None, :], other=0)
        w = tl.load(p_w, mask=(o_n < n)[None, :] & inside_k[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        p_x += BLOCK_K
        p_w += BLOCK_K
    x_scale = tl.load(x_scale_ptr + batch * length + o_m, mask=o_m < length, other=0.0)
    w_scale = tl.load(w_scale_ptr + o_n, mask=o_n < n, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    _store(y, y_ptr, bias_ptr, batch, length, n, o_m, o_n)
