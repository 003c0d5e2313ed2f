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
    x: Tensor | tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "cuda",
) -> Tensor:
    """conv(x) + bias + residual, rounded after each: zeros around a frame, none before the first.

    Args:
        x: `[B, KT - 1 + T, H, W, C]` contiguous, fp32, fp16 or bf16; or these frames in the three
            parts that `causal_frames.frames_apart` gives.
        weight: `[KT, KH, KW, N, C]` in x's dtype, see `packed`; KH and KW odd.
        bias: `[N]` in x's dtype.
        residual: `[B, T, H, W, N]` in x's dtype, its channels contiguous.
        backend: "cuda" or "reference".

    Returns:
        `[B, T, H, W, N]` contiguous, in x's dtype.

    Raises:
        ValueError: shapes or strides do not fit together.
        TypeError: x is of another dtype.
        RuntimeError: the CUDA kernel cannot run, see `left_to_cudnn`.
    """
    parts = x if isinstance(x, tuple) else (x,)
    _check(parts, weight, residual)
    if backend == "reference":
        return reference.frames_conv(parts, weight, bias, residual)
    if reason := left_to_cudnn(parts[0], weight.shape[3]):
        raise RuntimeError(f"frames_conv cannot run in CUDA: {reason}")
    if not all(x.is_contiguous() for x in (*parts, weight)):
        raise ValueError("frames_conv needs contiguous frames and weights")
    if residual is not None and (
        residual.stride(-1) != 1 or any(n % 8 for n in residual.stride()[:-1])
    ):
        raise ValueError(f"frames_conv cannot read a residual of strides {residual.stride()}")
    return hopper.frames_conv(parts, weight, bias, residual)


def _check(parts: tuple[Tensor, ...], weight: Tensor, residual: Tensor | None) -> None:
    x = parts[0]
    check_dtype("frames_conv", x)
    if x.ndim != 5 or weight.ndim != 5 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"frames_conv needs x [B, T, H, W, C] and weight [KT, KH, KW, N, C], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    frames = sum(part.shape[1] for part in parts) - weight.shape[0] + 1
    shape = [x.shape[0], frames, *x.shape[2:4], weight.shape[3]]
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"frames_conv needs residual {shape}, got {list(residual.shape)}")


def packed(weight: Tensor) -> Tensor:
    """A convolution's weight [N, C, KT, KH, KW] as `frames_conv` reads it, a copy.

    One of pictures, [N, C, KH, KW], has a KT of 1.
    """
    taps = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return taps.permute(2, 3, 4, 0, 1).clone(memory_format=torch.contiguous_format)


def left_to_cudnn(x: Tensor, out_channels: int) -> str | None:
    """Why our kernel does not convolve frames like x; None where it does."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies 16 bits, x is {x.dtype}"
    if x.shape[-1] % hopper.DEPTH or out_channels % hopper.DEPTH:
        return f"channels are no multiples of {hopper.DEPTH}"
    return cuda_unavailable(x.device)
