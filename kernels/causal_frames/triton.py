"""Frames between causal convolutions in Triton: a program has some pixels with all channels."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launched
from .reference import smallest

VALUES = 4096  # that a program holds at once


@functools.cache
def _launch(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    pixels = max(1, VALUES // block)
    return {"CHANNELS": channels, "BLOCK_P": pixels, "BLOCK_C": block, "num_warps": 4}


def causal_frames(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> Tensor:
    out = _frames_like(y, cache.shape[1] + y.shape[1])
    _run(y, cache, cache, gamma, bias, residual, out, keep, APART=False)
    return out


def frames_apart(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out, after = _frames_like(y, max(y.shape[1] - cache.shape[1], 0)), torch.empty_like(cache)
    _run(y, cache, after, gamma, bias, residual, out, keep, APART=True)
    return out, after


def _frames_like(y: Tensor, frames: int) -> Tensor:
    batch, _, *size = y.shape
    return torch.empty(batch, frames, *size, dtype=y.dtype, device=y.device)


def _run(y, cache, after, gamma, bias, residual, out, keep: bool, **options: bool) -> None:
    batch, frames, height, width, channels = y.shape
    launch = _launch(channels)
    grid = triton.cdiv(height * width, launch["BLOCK_P"]), batch
    causal_frames_kernel[grid](
        y, cache, after, gamma, bias, residual, out, frames, height, width,
        channels**0.5, smallest(y.dtype), *y.stride()[:4], *_strides(residual),
        BEFORE=cache.shape[1], KEEP=keep and not (bias is None and residual is None),
        **options, **launch,
    )  # fmt: skip


def resample_frames(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, split: int, scale: int, corner: int
) -> Tensor:
    batch, frames, height, width, channels = y.shape
    rows, columns = scale * height + corner, scale * width + corner
    shape = batch, split * frames, rows, columns, channels // split
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    launch = _launch(channels // split)
    grid = triton.cdiv(rows * columns, launch["BLOCK_P"]), split * frames, batch
    resample_frames_kernel[grid](
        y, bias, residual, out, split * frames, height, width, rows, columns,
        *y.stride()[:4], *_strides(residual), SPLIT=split, SCALE=scale, **launch,
    )  # fmt: skip
    return out


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()[:4]


@triton.jit
def wide(pixels):
    """One number for each row of a tile, in 64 bits: what is divided is cheaper in 32."""
    return pixels.to(tl.int64)[:, None]


@triton.jit
def finished(y_ptr, y_offset, bias_ptr, residual_ptr, residual_offset, c, inside):
    """y + bias + residual in fp32, rounded to their dtype after each sum."""
    dtype = y_ptr.dtype.element_ty
    x = tl.load(y_ptr + y_offset, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_offset, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def norm_silu(x, gamma, scale, eps, dtype: tl.constexpr):
    """Wan's RMS norm and SiLU of pixels x [P, C] in fp32, rounded to dtype after each step."""
    length = tl.sqrt_rn(tl.sum(x * x, axis=1)).to(dtype).to(tl.float32)
    x = tl.div_rn(x, tl.maximum(length, eps)[:, None]).to(dtype).to(tl.float32)
    x = (x * scale).to(dtype).to(tl.float32)
    x = (x * gamma).to(dtype).to(tl.float32)
    return x / (1 + tl.exp(-x))


@launched
@triton.jit(do_not_specialize=["frames", "height", "width"])
def causal_frames_kernel(
    y_ptr, cache_ptr, after_ptr, gamma_ptr, bias_ptr, residual_ptr, out_ptr, frames, height, width,
    scale, eps, stride_yb, stride_yt, stride_yh, stride_yw,
    stride_rb, stride_rt, stride_rh, stride_rw,
    CHANNELS: tl.constexpr, BEFORE: tl.constexpr, KEEP: tl.constexpr, APART: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    size = height * width
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < size)[:, None] & (c < CHANNELS)
    row, column = wide(pixel // width), wide(pixel % width)
    y_ptr += batch * stride_yb
    y_offset = row * stride_yh + column * stride_yw + c
    residual_offset = batch * stride_rb + row * stride_rh + column * stride_rw + c
    offset = wide(pixel) * CHANNELS + c
    step = size.to(tl.int64) * CHANNELS
    cache_ptr += batch * BEFORE * step
    after_ptr += batch * BEFORE * step
    out_ptr += batch * (tl.maximum(frames - BEFORE, 0) if APART else BEFORE + frames) * step
    for t in tl.static_range(BEFORE):
        stays = inside & (t >= frames)
        frame = tl.load(cache_ptr + t * step + offset, mask=stays if APART else inside)
        if not APART:
            tl.store(out_ptr + t * step + offset, frame, mask=inside)
            tl.debug_barrier()  # a slot is read before the next frame moves into it
        tl.store(after_ptr + (t - frames) * step + offset, frame, mask=stays)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    for t in range(frames):
        x = finished(
            y_ptr, y_offset + t * stride_yt, bias_ptr,
            residual_ptr, residual_offset + t * stride_rt, c, inside,
        )  # fmt: skip
        if KEEP:
            tl.store(y_ptr + y_offset + t * stride_yt, x, mask=inside)
        if gamma_ptr is not None:
            x = norm_silu(x, gamma, scale, eps, y_ptr.dtype.element_ty)
        slot = BEFORE - frames + t
        written = inside & (slot < 0) if APART else inside
        tl.store(out_ptr + ((0 if APART else BEFORE) + t) * step + offset, x, mask=written)
        tl.store(after_ptr + slot * step + offset, x, mask=inside & (slot >= 0))


@launched
@triton.jit(do_not_specialize=["frames", "height", "width", "rows", "columns"])
def resample_frames_kernel(
    y_ptr, bias_ptr, residual_ptr, out_ptr, frames, height, width, rows, columns,
    stride_yb, stride_yt, stride_yh, stride_yw, stride_rb, stride_rt, stride_rh, stride_rw,
    CHANNELS: tl.constexpr, SPLIT: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, frame = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    size = rows * columns
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)[None, :]
    row, column = wide(pixel // columns // SCALE), wide(pixel % columns // SCALE)
    written = (pixel < size)[:, None] & (c < CHANNELS)
    inside = written & (row < height) & (column < width)
    c_from = frame % SPLIT * CHANNELS + c
    t = frame // SPLIT
    y_offset = batch * stride_yb + t * stride_yt + row * stride_yh + column * stride_yw
    residual_offset = batch * stride_rb + t * stride_rt + row * stride_rh + column * stride_rw
    x = finished(
        y_ptr, y_offset + c_from, bias_ptr, residual_ptr, residual_offset + c_from, c_from, inside
    )
    out_offset = ((batch * frames + frame) * size + wide(pixel)) * CHANNELS + c
    tl.store(out_ptr + out_offset, x, mask=written)
