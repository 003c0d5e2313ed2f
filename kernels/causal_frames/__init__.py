"""What stands between the convolutions of a causal video VAE, frames with channels last.

A convolution gives y, and what is still to be added to it, its bias and a residual, is added where
the result is read next. All rounding is that of the single steps in torch, so a VAE in bf16 gives
what it gives layer by layer.
"""

from torch import Tensor

from ..checks import check_dtype
from ..derivatives import no_gradients
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None


def causal_frames(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What a causal convolution reads: the frames before, then f(x) with x = y + bias + residual.

    f(x) = silu(x / |x| * sqrt(C) * gamma), |x| over the channels: Wan's RMS norm and activation.
    Without gamma it is x itself. `cache` gets the last frames of what is returned, for the next
    call. Whatever is None is left out.

    Args:
        y: `[B, T, H, W, C]` fp32, fp16 or bf16, its channels contiguous.
        cache: `[B, P, H, W, C]` contiguous, the P frames before; written to.
        gamma, bias: `[C]` in y's dtype.
        residual: like y.
        keep: write x over y, for whoever needs it later.
        backend: "auto", "triton" or "reference".

    Returns:
        `[B, P + T, H, W, C]` contiguous, in y's dtype.

    Raises:
        ValueError: shapes do not fit y.
        TypeError: y is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    kernels = _kernels("causal_frames", backend, y, cache, gamma, bias, residual)
    return kernels.causal_frames(y, cache, gamma, bias, residual, keep)


def frames_apart(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    keep: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What `causal_frames` returns, in three parts: without a copy of `cache`, which stays.

    Returns:
        Of the P + T frames the first min(T, P), `cache` or a part of it; those between, if any;
        and the last P, which are the cache of the next call.
    """
    kernels = _kernels("frames_apart", backend, y, cache, gamma, bias, residual)
    x, after = kernels.frames_apart(y, cache, gamma, bias, residual, keep)
    return cache[:, : y.shape[1]].contiguous(), x, after


def _kernels(
    op: str,
    backend: str,
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
):
    _check(op, y, bias, residual)
    if cache.ndim != 5 or (cache.shape[0], *cache.shape[2:]) != (y.shape[0], *y.shape[2:]):
        raise ValueError(f"cache {list(cache.shape)} is not of the frames y {list(y.shape)}")
    if not cache.is_contiguous():
        raise ValueError(f"cache must be contiguous, got strides {list(cache.stride())}")
    _check_vector(op, "gamma", gamma, y)
    unsupported = (no_gradients(y, cache, gamma, bias, residual), _channels_apart(y, residual))
    return choose("causal_frames", backend, y, reference, triton_kernels, unsupported=unsupported)


def resample_frames(
    y: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    split: int = 1,
    scale: int = 1,
    corner: int = 0,
    backend: str = "auto",
) -> Tensor:
    """x = y + bias + residual in other sizes: more frames, larger ones, or a rim of zeros.

    Args:
        y: `[B, T, H, W, split C]` fp32, fp16 or bf16, its channels contiguous.
        bias: `[split C]` in y's dtype.
        residual: like y.
        split: frames that the channels of one become: the first C are the first frame.
        scale: every pixel becomes scale x scale of it.
        corner: rows below and columns at the right, of zeros.
        backend: "auto", "triton" or "reference".

    Returns:
        `[B, split T, scale H + corner, scale W + corner, C]` contiguous, in y's dtype.

    Raises:
        ValueError: shapes do not fit y.
        TypeError: y is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    _check("resample_frames", y, bias, residual)
    if y.shape[-1] % split:
        raise ValueError(f"{y.shape[-1]} channels are not those of {split} frames")
    unsupported = (no_gradients(y, bias, residual), _channels_apart(y, residual))
    kernels = choose(
        "resample_frames", backend, y, reference, triton_kernels, unsupported=unsupported
    )
    return kernels.resample_frames(y, bias, residual, split, scale, corner)


def _check(op: str, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_dtype(op, y)
    if y.ndim != 5:
        raise ValueError(f"{op} needs y [B, T, H, W, C], got {list(y.shape)}")
    _check_vector(op, "bias", bias, y)
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"{op} needs residual {list(y.shape)}, got {list(residual.shape)}")


def _check_vector(op: str, name: str, vector: Tensor | None, y: Tensor) -> None:
    if vector is not None and vector.shape != y.shape[-1:]:
        raise ValueError(f"{op} needs {name} [{y.shape[-1]}], got {list(vector.shape)}")


def _channels_apart(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot read these tensors; None where it can."""
    apart = [x for x in tensors if x is not None and x.stride(-1) != 1]
    return "the channels are not contiguous" if apart else None
