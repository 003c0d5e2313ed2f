"""RMSNorm and modulated LayerNorm in Triton: one program per row, read once into registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def row_launch(channels: int) -> dict[str, int]:
    """Launch of a program that holds a whole row: at most 32 values a thread to 32768 channels.

    Bandwidth-bound: the same on every card.
    """
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 4), 32), "num_stages": 1}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight.contiguous(), y, channels, eps, *rows.stride(), **row_launch(channels)
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
    operands, strides = layer_norm_operands(x, weight, bias, scale, shift)
    with torch.cuda.device_of(x):
        layer_norm_kernel[(batch * length,)](
            x, *operands, y, length, channels, eps, *strides, **row_launch(channels)
        )
    return y


def layer_norm_operands(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[list[Tensor | None], list[int]]:
    """Weight, bias, scale and shift as the kernels take them; strides of x, scale and shift."""
    vectors = [None if v is None else v.contiguous() for v in (weight, bias)]
    modulations = [None if m is None else m.expand(x.shape) for m in (scale, shift)]
    strides = [(0, 0, 1) if m is None else m.stride() for m in modulations]
    return [*vectors, *modulations], [*x.stride(), *strides[0], *strides[1]]


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, channels, eps, stride_r, stride_c, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    x_ptr += row * stride_r
    x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / channels + eps)
    tl.store(y_ptr + row * channels + c, x * rstd * weight, mask=inside)


@triton.jit
def modulate(
    y, c, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_offset, shift_offset
):
    """(y * weight + bias) * (1 + scale) + shift at the channels c, without what is None.

    What is 0 in y beyond the last channel stays 0.
    """
    inside = c < channels
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        y *= 1 + tl.load(scale_ptr + scale_offset, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + shift_offset, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_row(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, length, channels, eps,
    stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
    stride_shift_b, stride_shift_l, stride_shift_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The program's row, normalised and modulated: fp32 [BLOCK], 0 beyond the last channel."""
    pid = tl.program_id(0)
    batch, row = (pid // length).to(tl.int64), (pid % length).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    wide = c.to(tl.int64)
    x_ptr += batch * stride_xb + row * stride_xl
    x = tl.load(x_ptr + wide * stride_xc, mask=inside, other=0.0).to(tl.float32)
    # Lanes beyond the last channel hold 0, which is not the mean.
    centered = tl.where(inside, x - tl.sum(x) / channels, 0.0)
    y = centered * tl.rsqrt(tl.sum(centered * centered) / channels + eps)
    scale_offset = batch * stride_scale_b + row * stride_scale_l + wide * stride_scale_c
    shift_offset = batch * stride_shift_b + row * stride_shift_l + wide * stride_shift_c
    return modulate(
        y, c, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_offset, shift_offset
    )


@triton.jit(do_not_specialize=["length"])
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, length, channels, eps,
    stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
    stride_shift_b, stride_shift_l, stride_shift_c,
    BLOCK: tl.constexpr,
):  # fmt: skip
    y = layer_norm_row(
        x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, length, channels, eps,
        stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
        stride_shift_b, stride_shift_l, stride_shift_c, BLOCK,
    )  # fmt: skip
    c = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * channels + c, y, mask=c < channels)
