"""INT8 quantization in Triton: the same integers as the reference, every value read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm.triton import row_launch

BLOCK = 128
# Bandwidth-bound: the same launch on every card.
BLOCKS_LAUNCH = {"BLOCK": BLOCK, "num_warps": 8, "num_stages": 1}


def quantize_blocks(x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    row_blocks, column_blocks = triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)
    batched = x.reshape(-1, rows, columns)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(
        (*x.shape[:-2], row_blocks, column_blocks), dtype=torch.float32, device=x.device
    )
    with torch.cuda.device_of(x):
        quantize_blocks_kernel[(scale.numel(),)](
            batched, q, scale, rows, columns, *batched.stride(), activation, **BLOCKS_LAUNCH
        )
    return q, scale


def quantize_rows(x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    batched = x.reshape(-1, rows, columns)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(scale.numel(),)](
            batched, q, scale, rows, columns, *batched.stride(), activation, **row_launch(columns)
        )
    return q, scale


@triton.jit
def round_to_int8(x, amax):
    """The reference's int8: round half to even of x * (128 / amax)."""
    scaled = x * tl.div_rn(tl.full(amax.shape, 128.0, tl.float32), amax)
    # Clamped first: the product must be rounded before the addition, which no FMA can then skip.
    scaled = tl.clamp(scaled, -128.0, 127.0)
    # Adding 1.5 * 2^23 leaves no bit for the fraction, and fp32 additions round half to even.
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_tile(x):
    """int8 of fp32 x and its scale, one for all of it."""
    amax = tl.maximum(tl.max(tl.abs(x)), 1e-8)
    return round_to_int8(x, amax), amax * (1 / 128)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 x; each maps 0, and so what is masked, to 0."""
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)). Beyond 10 it is 0 or 1, and fp32 would overflow.
        near = tl.clamp(x, -10.0, 10.0)
        exponent = -2.302208198144325 * (near + 0.044715 * near * near * near)  # -2u / ln 2
        x = x / (1 + tl.exp2(exponent))
    return x


@triton.jit(do_not_specialize=["rows"])
def quantize_blocks_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    columns,
    stride_b,
    stride_r,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, BLOCK)
    row_blocks = tl.cdiv(rows, BLOCK)
    batch = (pid // (row_blocks * column_blocks)).to(tl.int64)
    r = (pid // column_blocks % row_blocks * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    c = (pid % column_blocks * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(
        x_ptr + batch * stride_b + r[:, None] * stride_r + c[None, :] * stride_c,
        mask=inside,
        other=0.0,
    )  # [BLOCK, BLOCK]
    q, scale = quantize_tile(activate(x.to(tl.float32), ACTIVATION))
    tl.store(q_ptr + (batch * rows + r[:, None]) * columns + c[None, :], q, mask=inside)
    tl.store(scale_ptr + pid, scale)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    columns,
    stride_b,
    stride_r,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    x_ptr += (pid // rows).to(tl.int64) * stride_b + (pid % rows).to(tl.int64) * stride_r
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < columns, other=0.0)
    q, scale = quantize_tile(activate(x.to(tl.float32), ACTIVATION))
    tl.store(q_ptr + pid.to(tl.int64) * columns + c, q, mask=c < columns)
    tl.store(scale_ptr + pid, scale)
