"""Rotary position embedding in Triton: one read and one write of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launched
from ..tuning import ROPE as LAUNCH


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, heads, head_dim = x.shape
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
    cos, sin = (angles.expand(batch, -1, -1) for angles in (cos, sin))
    grid = (-(-length * heads // LAUNCH["ROWS"]), batch)
    rope_kernel[grid](
        x,
        cos,
        sin,
        y,
        length,
        heads,
        *x.stride(),
        *cos.stride(),
        *sin.stride(),
        HEAD_DIM=head_dim,
        **LAUNCH,
    )
    return y


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    length,
    heads,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_xd,
    stride_cos_b,
    stride_cos_l,
    stride_cos_d,
    stride_sin_b,
    stride_sin_l,
    stride_sin_d,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64), row % heads
    o_d = tl.arange(0, HEAD_DIM)
    o_pair = tl.arange(0, HEAD_DIM // 2)
    inside = (token < length)[:, None]
    p_x = x_ptr + batch * stride_xb + (token * stride_xl + head.to(tl.int64) * stride_xh)[:, None]
    x = tl.load(p_x + o_d[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
    p_cos = cos_ptr + batch * stride_cos_b + token[:, None] * stride_cos_l
    p_sin = sin_ptr + batch * stride_sin_b + token[:, None] * stride_sin_l
    cos = tl.load(p_cos + o_pair[None, :] * stride_cos_d, mask=inside, other=0.0)
    sin = tl.load(p_sin + o_pair[None, :] * stride_sin_d, mask=inside, other=0.0)
    a, b = tl.split(x.reshape(ROWS, HEAD_DIM // 2, 2))  # [ROWS, HEAD_DIM / 2] each
    y = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(ROWS, HEAD_DIM)
    p_y = y_ptr + (batch * length * heads + row) * HEAD_DIM
    tl.store(p_y[:, None] + o_d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
