"""Convolutions of frames in Triton, as a product of pixels with each tap's weights.

A program has a patch of pixels of one frame. The copy engine (TMA) brings the patch as a tap sees
it, with zeros beyond the frame's sides, and the tap's weights. Two products side by side make up
for output channels that are no power of 2.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import launching_on


def frames_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, config: dict
) -> Tensor:
    batch, read, height, width, channels = x.shape
    taps_t, taps_h, taps_w, out_channels, _ = weight.shape
    frames = read - taps_t + 1
    y = x.new_empty(batch, frames, height, width, out_channels)
    columns, more = config["COLUMNS"], config["MORE"]
    rows, across, depth = config["PATCH_H"], config["PATCH_W"], config["DEPTH"]
    x_map = TensorDescriptor.from_tensor(x.flatten(0, 1), [1, rows, across, depth])
    taps = weight.view(-1, channels)
    w_map = TensorDescriptor.from_tensor(taps, [columns, depth])
    more_map = TensorDescriptor.from_tensor(taps, [more, depth]) if more else None
    patches = triton.cdiv(height, rows) * triton.cdiv(width, across)
    tiles = triton.cdiv(out_channels, columns + more)
    with launching_on(x):
        frames_conv_kernel[(tiles * frames * patches, batch)](
            x_map, w_map, more_map, bias, residual, y, frames, height, width,
            *((0, 0, 0, 0) if residual is None else residual.stride()[:4]),
            CHANNELS=channels, OUT=out_channels, TAPS_T=taps_t, TAPS_H=taps_h, TAPS_W=taps_w,
            **config,
        )  # fmt: skip
    return y


@triton.jit
def finish(
    acc, bias_ptr, residual_ptr, y_ptr, pixel, residual_pixel, inside, first,
    OUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round, add bias and residual, rounding after each, and write [P, WIDTH] channels."""
    dtype = y_ptr.dtype.element_ty
    c = first + tl.arange(0, WIDTH)
    mask = inside[:, None] & (c < OUT)[None, :]
    y = acc.to(dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < OUT, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + bias[None, :]).to(dtype)
    if residual_ptr is not None:
        offsets = residual_pixel[:, None] + c[None, :]
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + residual).to(dtype)
    tl.store(y_ptr + pixel[:, None] * OUT + c[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def frames_conv_kernel(
    x_map, w_map, more_map, bias_ptr, residual_ptr, y_ptr, frames, height, width,
    stride_rb, stride_rt, stride_rh, stride_rw,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
    TAPS_T: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (OUT + COLUMNS + MORE - 1) // (COLUMNS + MORE)
    STEPS: tl.constexpr = CHANNELS // DEPTH
    PIXELS: tl.constexpr = PATCH_H * PATCH_W
    # Programs that read the same pixels run together: all tiles of all frames of a patch.
    index = tl.program_id(0)
    first = index % TILES * (COLUMNS + MORE)
    index //= TILES
    t = index % frames
    patch = index // frames
    across = tl.cdiv(width, PATCH_W)
    row, column = patch // across * PATCH_H, patch % across * PATCH_W
    batch = tl.program_id(1)
    frame = batch * (frames + TAPS_T - 1) + t

    acc = tl.zeros((PIXELS, COLUMNS), tl.float32)
    if MORE:
        acc_more = tl.zeros((PIXELS, MORE), tl.float32)
    for i in range(TAPS_T * TAPS_H * TAPS_W * STEPS):
        tap = i // STEPS
        k = i % STEPS * DEPTH
        h = row + tap // TAPS_W % TAPS_H - TAPS_H // 2
        w = column + tap % TAPS_W - TAPS_W // 2
        x = x_map.load([frame + tap // (TAPS_H * TAPS_W), h, w, k]).reshape(PIXELS, DEPTH)
        acc = tl.dot(x, w_map.load([tap * OUT + first, k]).T, acc)
        if MORE:
            acc_more = tl.dot(x, more_map.load([tap * OUT + first + COLUMNS, k]).T, acc_more)

    m = tl.arange(0, PIXELS)
    h, w = row + m // PATCH_W, column + m % PATCH_W
    inside = (h < height) & (w < width)
    pixel = ((batch * frames + t).to(tl.int64) * height + h) * width + w
    residual_pixel = batch.to(tl.int64) * stride_rb + t.to(tl.int64) * stride_rt
    residual_pixel += h.to(tl.int64) * stride_rh + w.to(tl.int64) * stride_rw
    finish(acc, bias_ptr, residual_ptr, y_ptr, pixel, residual_pixel, inside, first, OUT, COLUMNS)
    if MORE:
        finish(
            acc_more, bias_ptr, residual_ptr, y_ptr, pixel, residual_pixel, inside,
            first + COLUMNS, OUT, MORE,
        )  # fmt: skip
