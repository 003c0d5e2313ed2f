"""LayerNorm and INT8 quantization in one Triton kernel; the normalised values stay on the chip."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import BLOCK
from ..int8_quant.triton import loop_grid, quantize_row, quantize_tile
from ..launching import launched
from ..norm.triton import (
    layer_norm_operands,
    load_row,
    modulate,
    modulate_row,
    normalize_row,
    row_pieces,
)
from ..room import in_whole_blocks
from ..tuning import LAYER_NORM_BLOCKS, LAYER_NORM_ROWS, RowLoop, of_width

BLOCKS_LAUNCH = {"BLOCK": BLOCK, **LAYER_NORM_BLOCKS}


def layer_norm_quant(
    x: Tensor,
    granularity: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    operands, strides = layer_norm_operands(x, weight, bias, scale, shift)
    per_token = any(m is not None and m.shape[1] > 1 for m in (scale, shift))
    q = in_whole_blocks(batch, length, channels, torch.int8, x.device)
    if granularity == "rows":
        loop = of_width(LAYER_NORM_ROWS, channels)
        kernel, grid = layer_norm_rows_kernel, loop_grid(loop, batch, length, x.device)
        scales = batch, length
        launch = rows_launch(loop, channels, per_token)
    else:
        row_blocks = -(-length // BLOCK)
        kernel, grid = layer_norm_blocks_kernel, (batch * row_blocks,)
        scales = batch, row_blocks, -(-channels // BLOCK)
        launch = BLOCKS_LAUNCH
    q_scale = torch.empty(*scales, dtype=torch.float32, device=x.device)
    kernel[grid](x, *operands, q, q_scale, length, channels, eps, *strides, per_token, **launch)
    return q, q_scale


@functools.cache
def rows_launch(loop: RowLoop, channels: int, per_token: bool) -> dict[str, object]:
    """Launch of `layer_norm_rows_kernel`.

    Rows of scale and shift, where every token has its own, are too much to read ahead.
    """
    loop = loop._replace(stages=1) if per_token else loop
    return {"PIECES": row_pieces(channels), **loop.launch()}


@triton.jit
def constant_row(VALUE: tl.constexpr, PIECES: tl.constexpr):
    row = ()
    for i in tl.static_range(len(PIECES)):
        row += (tl.full([PIECES[i][1]], VALUE, tl.float32),)
    return row


@launched
@triton.jit(do_not_specialize=["length"])
def layer_norm_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, q_ptr, q_scale_ptr, length,
    CHANNELS: tl.constexpr, eps,
    stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
    stride_shift_b, stride_shift_l, stride_shift_c,
    PER_TOKEN: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    first, step = tl.program_id(1), tl.num_programs(1)
    x_ptr += batch * stride_xb
    scale_offset, shift_offset = batch * stride_scale_b, batch * stride_shift_b
    if not PER_TOKEN:
        # What 1 becomes without what is added, and what 0 becomes.
        factors = modulate_row(
            constant_row(1.0, PIECES), weight_ptr, None, scale_ptr, None, scale_offset,
            shift_offset, stride_scale_c, stride_shift_c, CHANNELS, PIECES,
        )  # fmt: skip
        offsets = modulate_row(
            constant_row(0.0, PIECES), weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_offset,
            shift_offset, stride_scale_c, stride_shift_c, CHANNELS, PIECES,
        )  # fmt: skip
    for i in tl.range(0, tl.cdiv(length - first, step), num_stages=STAGES):
        row = (first + i * step).to(tl.int64)
        x = load_row(x_ptr + row * stride_xl, stride_xc, CHANNELS, PIECES)
        normalized = normalize_row(x, eps, CHANNELS, PIECES)
        if PER_TOKEN:
            y = modulate_row(
                normalized, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
                scale_offset + row * stride_scale_l, shift_offset + row * stride_shift_l,
                stride_scale_c, stride_shift_c, CHANNELS, PIECES,
            )  # fmt: skip
        else:
            y = ()
            for j in tl.static_range(len(PIECES)):
                y += (normalized[j] * factors[j] + offsets[j],)
        out = batch * length + row
        quantize_row(y, q_ptr + out * CHANNELS, q_scale_ptr + out, CHANNELS, PIECES)


@triton.jit
def _row_moments(x_ptr, channels, eps, stride_xc, BLOCK: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of the rows at x_ptr [BLOCK, 1], both [BLOCK, 1]."""
    mean = tl.zeros([BLOCK, 1], tl.float32)
    squares = tl.zeros([BLOCK, 1], tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + c.to(tl.int64) * stride_xc, mask=c < channels, other=0.0)
        x = x.to(tl.float32)
        count = tl.minimum(channels - start, BLOCK)
        chunk_mean = tl.sum(x, 1, keep_dims=True) / count
        # Lanes beyond the last channel hold 0, which is not the mean.
        centered = tl.where(c < channels, x - chunk_mean, 0.0)
        # Chan, Golub, LeVeque 1979: as exact as a second pass, without reading x for it.
        share = count / (start + count)
        delta = chunk_mean - mean
        mean += delta * share
        # No mean came before the first chunk's: infinite squares times 0 would be NaN.
        delta = tl.where(start > 0, delta, 0.0)
        squares += tl.sum(centered * centered, 1, keep_dims=True) + delta * delta * (start * share)
    return mean, tl.rsqrt(squares / channels + eps)


@launched
@triton.jit(do_not_specialize=["length"])
def layer_norm_blocks_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, q_ptr, q_scale_ptr, length, channels, eps,
    stride_xb, stride_xl, stride_xc, stride_scale_b, stride_scale_l, stride_scale_c,
    stride_shift_b, stride_shift_l, stride_shift_c,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(length, BLOCK)
    batch = (pid // row_blocks).to(tl.int64)
    row = (pid % row_blocks * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    # Rows beyond the last repeat it, which leaves every amax as it is.
    source = tl.minimum(row, length - 1)
    x_ptr += batch * stride_xb + source * stride_xl  # [BLOCK, 1]
    mean, rstd = _row_moments(x_ptr, channels, eps, stride_xc, BLOCK)
    token = source if PER_TOKEN else 0
    blocks = tl.cdiv(channels, BLOCK)
    for done in range(0, blocks):
        # Backwards: the columns read last are the likeliest to be in the cache still.
        block = blocks - 1 - done
        c = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        wide = c.to(tl.int64)
        x = tl.load(x_ptr + wide * stride_xc, mask=c < channels, other=0.0).to(tl.float32)
        y = tl.where(c < channels, (x - mean) * rstd, 0.0)
        scale_offset = batch * stride_scale_b + token * stride_scale_l + wide * stride_scale_c
        shift_offset = batch * stride_shift_b + token * stride_shift_l + wide * stride_shift_c
        y = modulate(
            y, c, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_offset, shift_offset
        )
        q, q_scale = quantize_tile(y)
        inside = (row < length) & (c < channels)
        tl.store(q_ptr + (batch * length + row) * channels + c, q, mask=inside)
        tl.store(q_scale_ptr + pid.to(tl.int64) * blocks + block, q_scale)
