"""RMSNorm and modulated LayerNorm in Triton: one program per row, read once into registers.

Other kernels that hold whole rows build on it: a row is padded to a power of two (`row_launch`),
or is a tuple of pieces (`row_pieces`).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launched
from ..tuning import LAYER_NORM_ROWS, ROWS, of_width


@functools.cache
def row_launch(channels: int) -> dict[str, int]:
    """Launch of a program that pads its row, see kernels/tuning.py."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": ROWS.warps(block), "num_stages": 1}


@functools.cache
def row_pieces(channels: int) -> tuple[tuple[int, int], ...]:
    """First channel and size of the pieces of a row, all powers of two.

    The last may reach beyond the row, by a sixteenth of it at most: what is held there takes as
    long as what is not.
    """
    pieces, first = [], 0
    while first < channels:
        size = triton.next_power_of_2(channels - first)
        if first + size - channels > channels // 16:
            size //= 2
        pieces.append((first, size))
        first += size
    return tuple(pieces)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    y = torch.empty(*x.shape, dtype=x.dtype, device=x.device)
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
    y = torch.empty(batch, length, channels, dtype=x.dtype, device=x.device)
    operands, strides = layer_norm_operands(x, weight, bias, scale, shift)
    layer_norm_kernel[(batch * length,)](
        x, *operands, y, length, eps, *strides, channels, row_pieces(channels),
        **layer_norm_launch(channels),
    )  # fmt: skip
    return y


def layer_norm_launch(channels: int) -> dict[str, int]:
    """The warps that go through the rows for `layer_norm_quant` suit one row as well."""
    return {"num_warps": of_width(LAYER_NORM_ROWS, channels).warps, "num_stages": 1}


def layer_norm_operands(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[list[Tensor | None], list[int]]:
    """Weight, bias, scale and shift as the kernels take them; strides of x, scale and shift."""
    vectors = [None if v is None else v.contiguous() for v in (weight, bias)]
    strides = *modulation_strides(scale), *modulation_strides(shift)
    return [*vectors, scale, shift], [*x.stride(), *strides]


def modulation_strides(modulation: Tensor | None) -> tuple[int, int, int]:
    """Of scale or shift [1 or B, 1 or L, C] as [B, L, C]."""
    if modulation is None:
        return 0, 0, 1
    (batch, length, _), (stride_b, stride_l, stride_c) = modulation.shape, modulation.stride()
    return stride_b if batch > 1 else 0, stride_l if length > 1 else 0, stride_c


@launched
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
def load_row(ptr, stride, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """The row at ptr: fp32 pieces, 0 beyond the last channel."""
    row = ()
    for i in tl.static_range(len(PIECES)):
        c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        x = tl.load(ptr + c.to(tl.int64) * stride, mask=c < CHANNELS, other=0.0)
        row += (x.to(tl.float32),)
    return row


@triton.jit
def store_row(ptr, row, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        tl.store(ptr + c, row[i], mask=c < CHANNELS)


@triton.jit
def normalize_row(row, eps, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """The row's pieces with mean 0 and variance 1, still 0 beyond the last channel."""
    total = 0.0
    for i in tl.static_range(len(PIECES)):
        total += tl.sum(row[i])
    centered, squares = (), 0.0
    for i in tl.static_range(len(PIECES)):
        c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        # Lanes beyond the last channel hold 0, which is not the mean.
        piece = tl.where(c < CHANNELS, row[i] - total / CHANNELS, 0.0)
        squares += tl.sum(piece * piece)
        centered += (piece,)
    rstd = tl.rsqrt(squares / CHANNELS + eps)
    y = ()
    for i in tl.static_range(len(PIECES)):
        y += (centered[i] * rstd,)
    return y


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
def modulate_row(
    y, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_offset, shift_offset,
    stride_scale_c, stride_shift_c, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """`modulate` of a row's pieces y, whose scale and shift begin at the offsets."""
    modulated = ()
    for i in tl.static_range(len(PIECES)):
        c = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        piece = modulate(
            y[i], c, CHANNELS, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
            scale_offset + c.to(tl.int64) * stride_scale_c,
            shift_offset + c.to(tl.int64) * stride_shift_c,
        )  # fmt: skip
        modulated += (piece,)
    return modulated


@launched
@triton.jit(do_not_specialize=["length"])
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, length, eps,
    stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
    stride_shift_b, stride_shift_l, stride_shift_c,
    CHANNELS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, row = (pid // length).to(tl.int64), (pid % length).to(tl.int64)
    x = load_row(x_ptr + batch * stride_xb + row * stride_xl, stride_xc, CHANNELS, PIECES)
    scale_offset = batch * stride_scale_b + row * stride_scale_l
    shift_offset = batch * stride_shift_b + row * stride_shift_l
    y = modulate_row(
        normalize_row(x, eps, CHANNELS, PIECES), weight_ptr, bias_ptr, scale_ptr, shift_ptr,
        scale_offset, shift_offset, stride_scale_c, stride_shift_c, CHANNELS, PIECES,
    )  # fmt: skip
    store_row(y_ptr + pid.to(tl.int64) * CHANNELS, y, CHANNELS, PIECES)
