"""Convolutions of frames with channels last, where this is faster than cuDNN's.

Each pixel's sum has one order, whatever the size of the frames: what strips of a video become is
bit for bit what the whole becomes.
"""

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import check_dtype
from ..dispatch import HOPPER, capability
from . import hopper, reference


def frames_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = conv(x) + bias + residual, rounded after each; zeros around a frame, none over time.

    Args:
        x: `[B, T + KT - 1, H, W, C]` fp32, fp16 or bf16.
        weight: `[KT, KH, KW, N, C]` in x's dtype, contiguous, see `packed`; KH and KW odd.
        bias: `[N]` in x's dtype.
        residual: `[B, T, H, W, N]` in x's dtype.
        backend: "auto", "cuda" (see `unfit`) or "reference".

    Returns:
        `[B, T, H, W, N]` contiguous, in x's dtype.

    Raises:
        ValueError: shapes do not fit together.
        TypeError: x is of another dtype.
        RuntimeError: the CUDA kernel was asked for by name and cannot run.
    """
    check_dtype("frames_conv", x)
    if x.ndim != 5 or weight.ndim != 5 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"frames_conv needs x [B, T, H, W, C] and weight [KT, KH, KW, N, C], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    y_shape = x.shape[0], x.shape[1] - weight.shape[0] + 1, *x.shape[2:4], weight.shape[3]
    if residual is not None and residual.shape != y_shape:
        raise ValueError(f"frames_conv needs residual {list(y_shape)}, got {list(residual.shape)}")
    reason = unfit(x, weight.shape[3], residual)
    if backend == "cuda" and reason:
        raise RuntimeError(f"frames_conv cannot run in CUDA: {reason}")
    kernels = reference if backend == "reference" or reason else hopper
    return kernels.frames_conv(x, weight, bias, residual)


def packed(weight: Tensor) -> Tensor:
    """A convolution's weight [N, C, KT, KH, KW] as `frames_conv` reads it, a copy.

    One of pictures, [N, C, KH, KW], has a KT of 1.
    """
    return reference.packed(weight)


def unfit(x: Tensor, out_channels: int, residual: Tensor | None = None) -> str | None:
    """Why the CUDA kernel cannot convolve x; None where it can."""
    if capability(x.device) != HOPPER:
        return "it is written for Hopper (sm_90)"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies 16 bit values, and these are {x.dtype}"
    if x.shape[-1] % hopper.DEPTH or out_channels % hopper.DEPTH:
        return f"channels are no multiples of {hopper.DEPTH}"
    if not x.is_contiguous() or x.data_ptr() % 16:
        return "the frames are not contiguous"
    if residual is not None and (
        residual.stride(-1) != 1
        or any(stride % 8 or stride >= 2**31 for stride in residual.stride()[:4])
    ):
        return "the residual's pixels do not begin at multiples of 16 bytes"
    return nvrtc.unavailable()
