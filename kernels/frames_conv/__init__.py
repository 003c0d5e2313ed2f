"""Convolutions of frames with channels last: where this is faster than cuDNN.

A pixel is summed up in one order, whatever the size of the frames, so strips of a video are bit
for bit what the whole is.
"""

import torch
from torch import Tensor

from ..checks import check_dtype
from ..dispatch import cuda_unavailable
from . import hopper, reference


def frames_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "cuda",
) -> Tensor:
    """conv(x) + bias + residual, rounded after each: zeros around a frame, none before the first.

    Args:
        x: `[B, KT - 1 + T, H, W, C]` fp32, fp16 or bf16.
        weight: `[KT, KH, KW, N, C]` in x's dtype, see `packed`; KH and KW odd.
        bias: `[N]` in x's dtype.
        residual: `[B, T, H, W, N]` in x's dtype.
        backend: "cuda" or "reference".

    Returns:
        `[B, T, H, W, N]` contiguous, in x's dtype.

    Raises:
        ValueError: shapes do not fit together.
        TypeError: x is of another dtype.
        RuntimeError: the CUDA kernel cannot run, see `unfit`.
    """
    check_dtype("frames_conv", x)
    if x.ndim != 5 or weight.ndim != 5 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"frames_conv needs x [B, T, H, W, C] and weight [KT, KH, KW, N, C], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    shape = [x.shape[0], x.shape[1] - weight.shape[0] + 1, *x.shape[2:4], weight.shape[3]]
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"frames_conv needs residual {shape}, got {list(residual.shape)}")
    if backend == "reference":
        return reference.frames_conv(x, weight, bias, residual)
    if reason := unfit(x, weight.shape[3], residual):
        raise RuntimeError(f"frames_conv cannot run in CUDA: {reason}")
    return hopper.frames_conv(x, weight, bias, residual)


def packed(weight: Tensor) -> Tensor:
    """A convolution's weight [N, C, KT, KH, KW] as `frames_conv` reads it, a copy.

    One of pictures, [N, C, KH, KW], has a KT of 1.
    """
    taps = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return taps.permute(2, 3, 4, 0, 1).clone(memory_format=torch.contiguous_format)


def unfit(x: Tensor, out_channels: int, residual: Tensor | None = None) -> str | None:
    """Why the CUDA kernel cannot convolve x; None where it can."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies 16 bits, x is {x.dtype}"
    if x.shape[-1] % hopper.DEPTH or out_channels % hopper.DEPTH:
        return f"channels are no multiples of {hopper.DEPTH}"
    if not x.is_contiguous() or x.data_ptr() % 16:
        return "the frames are not contiguous"
    if residual is not None:
        *pixels, channel = residual.stride()
        if channel != 1 or any(step % 8 or step >= 2**31 for step in pixels):
            return "the residual's pixels do not begin at multiples of 16 bytes"
    return cuda_unavailable(x.device)
