"""Attention to the keys of a text, of which the last may stand for many that are equal."""

import torch

from ..checks import check_heads, check_shape, float32_on_gpu, layouts, not_contiguous
from ..derivatives import no_gradients
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import mma
    from . import triton as triton_kernels
else:
    mma = triton_kernels = None

__all__ = ["text_attention"]


def text_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    repeats: int = 1,
    weight: torch.Tensor | None = None,
    row_norms: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys and `repeats` - 1 more that equal the last one.

    A prompt is padded to 512 tokens, and all of that padding has one key and one value. n equal
    keys together weigh n e^s = e^(s + log n), so one of them is attended to, with log n added to
    its score: the same sums, of fewer terms.

    Args:
        q: [B, L, H, D], float32, float16 or bfloat16.
        k, v: [B, T, H, D] of the same dtype, contiguous along D.
        repeats: how many keys the last one stands for, at least 1.
        weight, row_norms: weight [H * D] of q's RMSNorm over all heads and what its rows are normed
            by, float32 [B, L], see `norms_of_squares`: q is the projection before its norm then,
            and normed here. Both or neither.
        out: contiguous [B, L, H, D] of q's dtype to write to, q itself too; None allocates it.
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or `repeats` does not fit.
    """
    check_heads(q=q)
    check_heads(k=k, v=v)
    _check_text(q, k, repeats)
    _check_norm(q, weight, row_norms)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {list(q.shape)} in {q.dtype}, got {list(out.shape)} in "
            f"{out.dtype} with strides {list(out.stride())}"
        )
    unsupported = not_contiguous(q, k, v), float32_on_gpu(q), no_gradients(q, k, v)
    # Longer texts run in Triton, and all texts on Hopper.
    short = mma if mma is not None and k.shape[1] <= mma.KEYS else None
    kernels = choose(
        "text_attention", backend, q, reference, triton_kernels, mma=short,
        unsupported=unsupported, operands=(q, k, v, out), layout=layouts(q, k, v, out),
    )  # fmt: skip
    return kernels.text_attention(q, k, v, repeats, weight, row_norms, out)


def _check_text(q: torch.Tensor, k: torch.Tensor, repeats: int) -> None:
    batch, _, heads, dim = q.shape
    check_shape("k", k, (batch, k.shape[1], heads, dim))
    if k.dtype != q.dtype or k.device != q.device:
        raise TypeError(f"k and v must be {q.dtype} on {q.device}, got {k.dtype} on {k.device}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _check_norm(
    q: torch.Tensor, weight: torch.Tensor | None, row_norms: torch.Tensor | None
) -> None:
    if (weight is None) != (row_norms is None):
        raise ValueError("weight and row_norms go together: pass both or neither")
    if row_norms is None:
        return
    check_shape("weight", weight, (q.shape[2] * q.shape[3],))
    check_shape("row_norms", row_norms, tuple(q.shape[:2]))
    if row_norms.dtype != torch.float32:
        raise TypeError(f"row_norms must be float32, got {row_norms.dtype}")
