"""INT8 weights from block scales to one scale per output channel, for the faster linear layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import BLOCK, Remembered, layouts
from ..dispatch import choose, has_triton
from . import reference
from .reference import MOST

if has_triton():
    from . import mma
    from . import triton as triton_kernels
else:
    mma = triton_kernels = None

_fitting = Remembered()  # shapes and dtypes of weights that have the right scales


def requantize_rows(q: Tensor, scale: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the weight that 128x128 block scales stand for.

    Reads the weight once, which is little beside the product it is for: so it is done at every
    use, and a model keeps the checkpoint's own integers, memory-mapped.

    Args:
        q: int8 `[N, K]`.
        scale: fp32 `[ceil(N/128), ceil(K/128)]`.
        backend: "auto", "triton" or "reference".

    Returns:
        int8 `[N, K]` and fp32 `[N]`.

    Raises:
        ValueError: the shapes do not fit, or q has no elements.
        TypeError: q is not int8, or scale not fp32.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    _check_once(q, scale)
    kernels = choose(
        "requantize_rows", backend, q, reference, triton_kernels, mma=mma,
        operands=(q,), layout=layouts(q),
    )  # fmt: skip
    return kernels.requantize_rows(q, scale)


def requantize_rows_of(
    weights: Sequence[tuple[Tensor, Tensor]], backend: str = "auto"
) -> list[tuple[Tensor, Tensor]]:
    """`requantize_rows` of some small weights of one shape, in one launch.

    Args:
        weights: 1 to MOST pairs of int8 `[N, K]` and fp32 `[ceil(N/128), ceil(K/128)]`.
        backend: "auto", "triton" or "reference".

    Returns:
        int8 `[N, K]` and fp32 `[N]` of each, which share their memory.

    Raises:
        as `requantize_rows`, and ValueError for too many weights or such of several shapes.
    """
    if not 1 <= len(weights) <= MOST:
        raise ValueError(f"requantize_rows_of takes 1 to {MOST} weights, got {len(weights)}")
    first, _ = weights[0]
    for q, scale in weights:
        _check_once(q, scale)
        if q.shape != first.shape:
            raise ValueError(
                "requantize_rows_of takes weights of one shape, "
                f"got {list(first.shape)} and {list(q.shape)}"
            )
    kernels = choose("requantize_rows", backend, first, reference, triton_kernels)
    return kernels.requantize_rows_of(weights)


def _check_once(q: Tensor, scale: Tensor) -> None:
    kinds = q.shape, scale.shape, q.dtype, scale.dtype
    if kinds not in _fitting:
        _check(q, scale)
        _fitting.put(kinds, True)


def _check(q: Tensor, scale: Tensor) -> None:
    if q.dtype != torch.int8:
        raise TypeError(f"requantize_rows: q must be int8, got {q.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"requantize_rows: scale must be float32, got {scale.dtype}")
    if q.ndim != 2 or scale.shape != (-(-q.shape[0] // BLOCK), -(-q.shape[1] // BLOCK)):
        raise ValueError(
            f"requantize_rows: q must be [N, K] with scales [ceil(N/128), ceil(K/128)], "
            f"got {list(q.shape)} with {list(scale.shape)}"
        )
    if q.numel() == 0:
        raise ValueError(f"requantize_rows needs q with elements in it, got {list(q.shape)}")
