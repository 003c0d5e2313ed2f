"""Rotary position embedding on interleaved channel pairs; qk_prepare fuses it with the norm."""

import torch
from torch import Tensor

from ..checks import check_dtype
from ..derivatives import no_gradients
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> Tensor:
    """Rotate the channel pairs (a, b) = (2i, 2i + 1) by the angle of their token.

    (a, b) -> (a cos - b sin, a sin + b cos) in fp32 (RoFormer, arXiv 2104.09864, equation 34).

    Args:
        x: `[B, L, H, D]` fp32, fp16 or bf16, any strides.
        cos, sin: `[1 or B, L, D/2]` fp32, any strides.
        backend: "auto", "triton" or "reference"; Triton takes a D that is a power of two.

    Returns:
        `[B, L, H, D]` in x's dtype, contiguous.

    Raises:
        ValueError: the angles do not fit x.
        TypeError: x is of another dtype, or the angles are not fp32.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    check_dtype("apply_rope", x)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"apply_rope needs x [B, L, H, D] with an even D, got {list(x.shape)}")
    for name, angles in (("cos", cos), ("sin", sin)):
        _check_angles(name, angles, x)
    unsupported = _odd_head_dim(x.shape[-1]), no_gradients(x)
    kernels = choose("apply_rope", backend, x, reference, triton_kernels, unsupported=unsupported)
    return kernels.apply_rope(x, cos, sin)


def _check_angles(name: str, angles: Tensor, x: Tensor) -> None:
    batch, length, _, head_dim = x.shape
    if list(angles.shape) not in ([1, length, head_dim // 2], [batch, length, head_dim // 2]):
        raise ValueError(
            f"apply_rope needs {name} [1 or {batch}, {length}, {head_dim // 2}], "
            f"got {list(angles.shape)}"
        )
    if angles.dtype != torch.float32:
        raise TypeError(f"apply_rope takes {name} in fp32, got {angles.dtype}")


def _odd_head_dim(head_dim: int) -> str | None:
    """Why Triton cannot rotate such heads; None where it can."""
    if head_dim & (head_dim - 1):
        return f"the head dim {head_dim} is not a power of two"
    return None
