"""RMSNorm and modulated LayerNorm in Triton: one program per row, in chunks of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bandwidth-bound: the same launch on every card.
LAUNCH = {"CHUNK": 1024, "num_warps": 4, "num_stages": 1}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight.contiguous(), y, channels, eps, *rows.stride(), **LAUNCH
        )
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    scale, shift = (None if m is None else m.expand(x.shape) for m in (scale, shift))
    with torch.cuda.device_of(x):
        layer_norm_kernel[(batch * length,)](
            x,
            weight,
            bias,
            scale,
            shift,
            y,
            length,
            channels,
            eps,
            *x.stride(),
            *_strides(scale),
            *_strides(shift),
            **LAUNCH,
        )
    return y


def _strides(modulation: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 1) if modulation is None else modulation.stride()


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    channels,
    eps,
    stride_r,
    stride_c,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_r
    y_ptr += row * channels
    squares = tl.zeros([CHUNK], tl.float32)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < channels, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / channels + eps)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < channels, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
        tl.store(y_ptr + c, x * rstd * weight, mask=c < channels)


@triton.jit
def _moments(x_ptr, channels, eps, stride_c, CHUNK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of one row."""
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < channels, other=0.0)
        total += x.to(tl.float32)
    mean = tl.sum(total) / channels
    squares = tl.zeros([CHUNK], tl.float32)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < channels, other=0.0)
        # Lanes beyond the last channel hold 0, which is not the mean.
        centered = tl.where(c < channels, x.to(tl.float32) - mean, 0.0)
        squares += centered * centered
    return mean, tl.rsqrt(tl.sum(squares) / channels + eps)


@triton.jit(do_not_specialize=["length"])
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    length,
    channels,
    eps,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_scale_b,
    stride_scale_l,
    stride_scale_c,
    stride_shift_b,
    stride_shift_l,
    stride_shift_c,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0)
    batch, row = (pid // length).to(tl.int64), (pid % length).to(tl.int64)
    x_ptr += batch * stride_xb + row * stride_xl
    y_ptr += pid.to(tl.int64) * channels
    mean, rstd = _moments(x_ptr, channels, eps, stride_xc, CHUNK)
    for start in range(0, channels, CHUNK):
        c = start + tl.arange(0, CHUNK)
        inside = c < channels
        wide = c.to(tl.int64)
        y = (tl.load(x_ptr + wide * stride_xc, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            p_scale = scale_ptr + batch * stride_scale_b + row * stride_scale_l
            y *= 1 + tl.load(p_scale + wide * stride_scale_c, mask=inside, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            p_shift = shift_ptr + batch * stride_shift_b + row * stride_shift_l
            y += tl.load(p_shift + wide * stride_shift_c, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + c, y, mask=inside)
