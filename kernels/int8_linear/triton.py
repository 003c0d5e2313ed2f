"""INT8 linear layer in Triton: one kernel for both granularities of the scales."""

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import dispatch, tuning
from ..checks import in_steps_of_16_bytes


@functools.cache
def linear_config(
    capability: tuple[int, int], by_blocks: bool, tma: bool, n: int, k: int
) -> dict[str, int]:
    """Launch configuration, see kernels/tuning.py.

    It does not look at the length: a new resolution never compiles again.
    """
    tiles = tuning.of_card(tuning.INT8_LINEAR, capability)
    kind = "pointers" if not tma else "blocks" if by_blocks else "rows"
    if kind == "rows" and k > 2048 and n >= 3072 and "wide" in tiles:
        kind = "wide"
    return tiles[kind].launch()


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    batch, length, k = x_q.shape
    n = w_q.shape[0]
    by_blocks = x_scale.ndim == 3
    matrices = x_q, w_q[None], residual, out
    capability = dispatch.capability(x_q.device)
    tma = dispatch.has_tma(x_q.device) and all(
        matrix is None or in_steps_of_16_bytes(matrix) for matrix in matrices
    )
    config = linear_config(capability, by_blocks, tma, n, k)
    tiles = -(-length // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    if tma:
        x, w, residual_, out_ = _tensor_maps(matrices, config)
        strides = [(0, 0)] * 4  # the maps hold them
    else:
        x, w, residual_, out_ = x_q, w_q, residual, out
        strides = [(0, 0) if matrix is None else matrix.stride()[:2] for matrix in matrices]
    with dispatch.launching_on(x_q):
        linear_kernel[(tiles, batch)](
            x,
            x_scale.contiguous(),
            w,
            w_scale,
            bias,
            gate,
            residual_,
            out_,
            length,
            n,
            k,
            *strides[0],
            strides[1][1],
            *((0, 0, 0) if gate is None else gate.stride()),
            *strides[2],
            *strides[3],
            BY_BLOCKS=by_blocks,
            TMA=tma,
            GATE_ROWS=gate is not None and gate.shape[1] > 1,
            **config,
        )
    return out


def tensor_map_blocks(config: dict[str, int]) -> list[list[int]]:
    """What the kernel copies at a time of x, w, residual and out."""
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    return [[1, m, k], [1, n, k], [1, m, n // 2], [1, m, n // 2]]


def _tensor_maps(matrices, config: dict[str, int]) -> list[TensorDescriptor | None]:
    return [
        None if matrix is None else TensorDescriptor.from_tensor(matrix, block)
        for matrix, block in zip(matrices, tensor_map_blocks(config), strict=True)
    ]


@triton.jit
def _load(
    matrix_ptr,
    sample,
    row,
    column,
    rows,
    columns,
    stride_b,
    stride_r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] of a matrix [B, rows, columns], zero outside; a tensor map under TMA."""
    if TMA:
        return matrix_ptr.load([sample, row, column]).reshape(ROWS, COLUMNS)
    else:
        o_r = row + tl.arange(0, ROWS)
        o_c = column + tl.arange(0, COLUMNS)
        inside = (o_r < rows)[:, None] & (o_c < columns)[None, :]
        offsets = sample * stride_b + o_r.to(tl.int64)[:, None] * stride_r + o_c[None, :]
        return tl.load(matrix_ptr + offsets, mask=inside, other=0)


@triton.jit
def _store(
    matrix_ptr,
    tile,
    sample,
    row,
    column,
    rows,
    columns,
    stride_b,
    stride_r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write tile [ROWS, COLUMNS], as far as it is inside of the matrix [B, rows, columns]."""
    if TMA:
        matrix_ptr.store([sample, row, column], tile.to(matrix_ptr.dtype).reshape(1, ROWS, COLUMNS))
    else:
        o_r = row + tl.arange(0, ROWS)
        o_c = column + tl.arange(0, COLUMNS)
        inside = (o_r < rows)[:, None] & (o_c < columns)[None, :]
        offsets = sample * stride_b + o_r.to(tl.int64)[:, None] * stride_r + o_c[None, :]
        tl.store(matrix_ptr + offsets, tile.to(matrix_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def linear_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    out_ptr,
    length,
    n,
    k,
    stride_xb,
    stride_xl,
    stride_wn,
    stride_gb,
    stride_gl,
    stride_gn,
    stride_rb,
    stride_rl,
    stride_ob,
    stride_ol,
    BY_BLOCKS: tl.constexpr,
    TMA: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    half: tl.constexpr = BLOCK_N // 2
    tiles_m, tiles_n = tl.cdiv(length, BLOCK_M), tl.cdiv(n, BLOCK_N)
    k_blocks = tl.cdiv(k, BLOCK_K)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    batch = tl.program_id(1).to(tl.int64)
    # Coordinates of a tensor map are int32.
    b = tl.program_id(1) if TMA else batch

    if BY_BLOCKS:
        x_scale_ptr += (batch * tiles_m + tile_m) * k_blocks
        w_scale_ptr += tile_n * k_blocks
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for block in range(k_blocks):
        start = block * BLOCK_K
        # [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K].
        x = _load(x_ptr, b, row, start, length, k, stride_xb, stride_xl, BLOCK_M, BLOCK_K, TMA)
        w = _load(w_ptr, 0, column, start, n, k, 0, stride_wn, BLOCK_N, BLOCK_K, TMA)
        if BY_BLOCKS:
            scale = tl.load(x_scale_ptr + block) * tl.load(w_scale_ptr + block)
            y += tl.dot(x, w.T, out_dtype=tl.int32).to(tl.float32) * scale
        else:
            y = tl.dot(x, w.T, y, out_dtype=tl.int32)

    # Half the columns at a time: a whole tile with its epilogue does not fit the registers.
    left, right = y.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
    o_m = row + tl.arange(0, BLOCK_M)
    for i in tl.static_range(2):
        first = column + i * half
        y = (left if i == 0 else right).to(tl.float32)  # [BLOCK_M, half]
        o_n = first + tl.arange(0, half)
        if not BY_BLOCKS:
            x_scale = tl.load(x_scale_ptr + batch * length + o_m, mask=o_m < length, other=0.0)
            w_scale = tl.load(w_scale_ptr + o_n, mask=o_n < n, other=0.0)
            y = y * x_scale[:, None] * w_scale[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None:
            p_gate = gate_ptr + batch * stride_gb + o_n.to(tl.int64) * stride_gn
            if GATE_ROWS:
                p_gate = p_gate[None, :] + o_m.to(tl.int64)[:, None] * stride_gl
                inside = (o_m < length)[:, None] & (o_n < n)[None, :]
                y *= tl.load(p_gate, mask=inside, other=0.0).to(tl.float32)
            else:
                y *= tl.load(p_gate, mask=o_n < n, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual = _load(
                residual_ptr, b, row, first, length, n, stride_rb, stride_rl, BLOCK_M, half, TMA
            )
            y += residual.to(tl.float32)
        _store(out_ptr, y, b, row, first, length, n, stride_ob, stride_ol, BLOCK_M, half, TMA)
