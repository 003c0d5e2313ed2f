"""What stands before a convolution of Wan's VAE, with gradients: its RMS norm and SiLU."""

import torch
from torch import Tensor

from ..derivatives import asked_for
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None


def norm_silu(x: Tensor, gamma: Tensor, before: int = 0, backend: str = "auto") -> Tensor:
    """silu(x / |x| * sqrt(C) * gamma), |x| over the channels, all of it in fp32 at least.

    Args:
        x: `[B, T, H, W, C]` of any float dtype, channels last.
        gamma: `[C]` of x's dtype.
        before: frames of zeros put before the T, for a causal convolution.
        backend: "auto", "triton" or "reference".

    Returns:
        `[B, before + T, H, W, C]` contiguous, in x's dtype. It can be differentiated, backwards.

    Raises:
        ValueError: gamma does not fit x.
        TypeError: x is of no float dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    if not x.is_floating_point():
        raise TypeError(f"norm_silu needs x of a float dtype, got {x.dtype}")
    if x.ndim != 5 or gamma.shape != x.shape[-1:]:
        raise ValueError(
            f"norm_silu needs x [B, T, H, W, C] and gamma [C], got {list(x.shape)} and "
            f"{list(gamma.shape)}"
        )
    unsupported = ("x is float64" if x.dtype == torch.float64 else None,)
    kernels = choose("norm_silu", backend, x, reference, triton_kernels, unsupported=unsupported)
    if kernels is triton_kernels and asked_for(x, gamma):
        return _NormSilu.apply(x, gamma, before)
    return kernels.norm_silu(x, gamma, before)


class _NormSilu(torch.autograd.Function):
    """The Triton kernels, which autograd cannot look into."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, before: int) -> Tensor:
        ctx.save_for_backward(x, gamma)
        return triton_kernels.norm_silu(x, gamma, before)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *triton_kernels.gradients(*ctx.saved_tensors, dy), None
