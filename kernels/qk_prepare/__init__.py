"""From a projection of q or k to what sparse-linear attention reads, with one writing."""

import torch

from ..block_map.checks import (
    check_block_size,
    check_heads,
    check_shape,
    float32_on_gpu,
    not_contiguous,
)
from ..dispatch import has_triton, use_triton
from ..linear_attention import LinearBranch, check_branch
from ..nvrtc import use_cuda
from . import reference
from .reference import Prepared

if has_triton():
    from . import hopper
    from . import triton as triton_kernels

__all__ = ["Prepared", "prepare"]


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    block: int = 128,
    quantize: bool = False,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    linear: LinearBranch | None = None,
) -> Prepared:
    """RMSNorm over all heads, RoPE, block means and, if asked for, int8 and the linear branch.

    `apply_rope(rms_norm(x))` and, of that, `block_means` and the int8 of `sage_attention`. The
    normalized and the rotated rows are rounded to x's dtype as the two ops round them; so
    everything equals their composition but for the order in which the squares of a row add up.

    Args:
        x: [B, L, H, D], the projection; float32, float16 or bfloat16.
        weight: [H * D] of any float dtype.
        cos, sin: [1 or B, L, D / 2] float32, any strides; see `apply_rope`.
        eps: added to the mean square.
        block: rows in a block, 64 or 128.
        quantize: whether to make int8 blocks.
        backend: see `dispatch.use_triton`.
        out: where the rotated rows go, contiguous like x; may be x itself. A new tensor if None.
        linear: where given, `out` gets the linear branch of the rotated rows in their place: in
            low bits nothing else reads them.

    Returns:
        `Prepared`: x [B, L, H, D], which is `out`, means float32 [B, H, N, D], and q int8
        [B, H, N * block, D] with scale float32 [B, H, N], or None for both.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(x=x)
    check_block_size(block)
    check_shape("weight", weight, (x.shape[2] * x.shape[3],))
    check_angles(x, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check_shape("out", out, tuple(x.shape))
    if out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous and {x.dtype}, "
            f"got {out.dtype} with strides {list(out.stride())}"
        )
    if linear is not None:
        check_branch(x, linear)
    arguments = x, weight, cos, sin, eps, block, quantize, out, linear
    reasons = not_contiguous(x), None if linear is None else float32_on_gpu(x)
    if use_triton("prepare", backend, x, *reasons):
        on_hopper = use_cuda("prepare", x.device, hopper.unfit, x, cos, sin, out, linear)
        return (hopper if on_hopper else triton_kernels).prepare(*arguments)
    return reference.prepare(*arguments)


def check_angles(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Require the cosines and sines of a rotation of x [B, L, H, D]."""
    batch, length, _, dim = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        samples = 1 if angles.shape[:1] == (1,) else batch
        check_shape(name, angles, (samples, length, dim // 2))
        if angles.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {angles.dtype}")
