"""RMS norm, SiLU and their gradients in Triton: a program has some pixels with all channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launched
from .reference import LEAST

VALUES = 4096  # that a program holds at once
MOST_PROGRAMS = 2048  # of the gradients; each has a sum of gamma's


def norm_silu(x: Tensor, gamma: Tensor, before: int) -> Tensor:
    batch, frames, height, width, channels = x.shape
    x = x.contiguous()
    y = torch.empty(batch, before + frames, height, width, channels, dtype=x.dtype, device=x.device)
    y[:, :before] = 0
    launch = _launch(channels)
    pixels = batch * frames * height * width
    grid = (triton.cdiv(pixels, launch["BLOCK_P"]),)
    sizes = pixels, frames * height * width, before * height * width
    norm_silu_kernel[grid](x, gamma, y, *sizes, channels**0.5, LEAST, **launch)
    return y


def gradients(x: Tensor, gamma: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and gamma, from that of the result, whose first frames are zeros."""
    batch, frames, height, width, channels = x.shape
    x, dy = x.contiguous(), dy.contiguous()
    before = dy.shape[1] - frames
    launch = _launch(channels)
    pixels = batch * frames * height * width
    programs = min(triton.cdiv(pixels, launch["BLOCK_P"]), MOST_PROGRAMS)
    dx = torch.empty_like(x)
    sums = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    sizes = pixels, frames * height * width, before * height * width
    gradients_kernel[(programs,)](
        x, gamma, dy, dx, sums, *sizes, programs, channels**0.5, LEAST, **launch
    )
    return dx, sums.sum(0).to(gamma.dtype)


def _launch(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    pixels = max(1, VALUES // block)
    return {"CHANNELS": channels, "BLOCK_P": pixels, "BLOCK_C": block, "num_warps": 4}


@triton.jit
def direction(x, eps):
    """x / |x| of pixels x [P, C] in fp32, and 1 / |x| [P, 1]."""
    inverse = 1 / tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), eps)[:, None]
    return x * inverse, inverse


@launched
@triton.jit(do_not_specialize=["pixels", "clip", "before"])
def norm_silu_kernel(
    x_ptr, gamma_ptr, y_ptr, pixels, clip, before, scale, eps,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pixels of the result lie behind `before` more of zeros in each clip."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < pixels)[:, None] & (c < CHANNELS)
    x = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * CHANNELS + c, mask=inside, other=0.0)
    gamma = tl.load(gamma_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    unit, _ = direction(x.to(tl.float32), eps)
    u = unit * scale * gamma
    place = (pixel + (pixel // clip + 1) * before).to(tl.int64)[:, None]
    tl.store(y_ptr + place * CHANNELS + c, u / (1 + tl.exp(-u)), mask=inside)


@launched
@triton.jit(do_not_specialize=["pixels", "clip", "before", "programs"])
def gradients_kernel(
    x_ptr, gamma_ptr, dy_ptr, dx_ptr, sums_ptr, pixels, clip, before, programs, scale, eps,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With u = s gamma x / |x| and g = silu'(u) dy: that of gamma is s g x / |x|, summed."""
    c = tl.arange(0, BLOCK_C)[None, :]
    gamma = tl.load(gamma_ptr + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_P, pixels, programs * BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (c < CHANNELS)
        offset = pixel.to(tl.int64)[:, None] * CHANNELS + c
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        place = (pixel + (pixel // clip + 1) * before).to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + place * CHANNELS + c, mask=inside, other=0.0).to(tl.float32)
        unit, inverse = direction(x, eps)
        u = unit * scale * gamma
        gate = 1 / (1 + tl.exp(-u))
        g = dy * gate * (1 + u * (1 - gate)) * scale
        total += tl.sum(g * unit, axis=0)
        g *= gamma
        dx = inverse * (g - unit * tl.sum(g * unit, axis=1)[:, None])
        tl.store(dx_ptr + offset, dx, mask=inside)
    c = tl.arange(0, BLOCK_C)
    tl.store(sums_ptr + tl.program_id(0) * CHANNELS + c, total, mask=c < CHANNELS)
