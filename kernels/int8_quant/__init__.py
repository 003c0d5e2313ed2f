"""INT8 quantization: one scale per 128x128 block, or one per row (a token or an output channel).

What is not finite stays visible. This holds for everything in kernels/ that quantizes, in every
implementation: `int8_quant`, `norm_quant`, `requantize`, `qk_prepare` and `sage_attention`.

- A NaN makes amax NaN, and so the scale of its block, row or channel: every product with it is
  NaN. A CUDA kernel takes `max.NaN.f32` for that, at the price of `fmaxf`, also where it takes the
  larger of amax and 1e-8.
- An infinity makes the scale infinite, every product with it infinite or NaN.
- The integers under such a scale mean nothing and may differ between implementations.
- Finite values, also the largest of float32, are quantized by the formula. GELU maps those below
  -10 to 0. LayerNorm maps rows whose squares overflow float32 (|x| above 1e19) to 0, so that
  weight, bias, scale and shift see 0, as in torch.
"""

import torch
from torch import Tensor

from ..checks import BLOCK, check_dtype, layouts
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import hopper, mma
    from . import triton as triton_kernels
else:
    hopper = mma = triton_kernels = None

ACTIVATIONS = (None, "gelu_tanh")

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "dequantize_blocks",
    "dequantize_rows",
    "quantize_blocks",
    "quantize_rows",
]


def quantize_blocks(
    x: Tensor, activation: str | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize in blocks of 128 rows by 128 columns.

    amax = max(|x|, 1e-8) over the block, scale = amax / 128 and
    q = clamp(round_half_even(x * (128 / amax)), -128, 127), all in fp32
    (TurboDiffusion, arXiv 2512.16093, W8A8).

    Args:
        x: `[..., R, C]` fp32, fp16 or bf16. The blocks restart at every leading index; the last
            ones hold what is left.
        activation: None, or "gelu_tanh" to quantize x (1 + tanh(u)) / 2 with
            u = sqrt(2 / pi) (x + 0.044715 x^3), computed in fp32, in place of x.
        backend: "auto", "triton" or "reference".

    Returns:
        int8 `[..., R, C]` and fp32 scales `[..., ceil(R/128), ceil(C/128)]`.

    Raises:
        ValueError: x has fewer than two dimensions or no elements, or the activation is unknown.
        TypeError: x is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    _check_input("quantize_blocks", x, activation)
    kernels = choose("quantize_blocks", backend, x, reference, triton_kernels)
    return kernels.quantize_blocks(x, activation)


def quantize_rows(
    x: Tensor,
    activation: str | None = None,
    amax: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize every row with its own scale: per token for x, per output channel for weights.

    The formula is that of `quantize_blocks`, with the amax of the row.

    Args:
        x: `[..., R, C]` fp32, fp16 or bf16.
        activation: applied first, as in `quantize_blocks`.
        amax: fp32 `[..., R]`, the rows' max |x|: given where x is some of the columns only, without
            an activation.
        backend: "auto", "triton" or "reference".

    Returns:
        int8 `[..., R, C]` and fp32 scales `[..., R]`.

    Raises:
        ValueError: x has fewer than two dimensions or no elements, or the activation is unknown.
        TypeError: x is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    _check_input("quantize_rows", x, activation)
    if amax is not None:
        _check_amax(x, activation, amax)
    # Weights, once a load, and some columns of rows run in Triton everywhere.
    in_cuda = amax is None and x.ndim == 3
    by_mma = mma if in_cuda and activation is not None else None
    kernels = choose(
        "quantize_rows", backend, x, reference, triton_kernels, hopper if in_cuda else None, by_mma,
        operands=(x,), layout=layouts(x),
    )  # fmt: skip
    return kernels.quantize_rows(x, activation, amax)


def dequantize_blocks(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_blocks`: q * scale of its block, computed in fp32.

    Args:
        q: int8 `[..., R, C]`.
        scale: fp32 `[..., ceil(R/128), ceil(C/128)]`.
        dtype: of the result.

    Raises:
        ValueError: the scales do not fit q.
        TypeError: q is not int8.
    """
    _check_quantized("dequantize_blocks", q)
    rows, columns = q.shape[-2:]
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    _check_scale("dequantize_blocks", q, scale, (*q.shape[:-2], *blocks))
    return reference.dequantize_blocks(q, scale, dtype)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_rows`: q * scale of its row, computed in fp32.

    Args:
        q: int8 `[..., R, C]`.
        scale: fp32 `[..., R]`.
        dtype: of the result.

    Raises:
        ValueError: the scales do not fit q.
        TypeError: q is not int8.
    """
    _check_quantized("dequantize_rows", q)
    _check_scale("dequantize_rows", q, scale, q.shape[:-1])
    return reference.dequantize_rows(q, scale, dtype)


def _check_input(op: str, x: Tensor, activation: str | None) -> None:
    check_dtype(op, x)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{op} needs x [..., R, C] with elements in it, got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op} needs activation None or 'gelu_tanh', got {activation!r}")


def _check_amax(x: Tensor, activation: str | None, amax: Tensor) -> None:
    if activation is not None:
        raise ValueError(f"quantize_rows takes amax or an activation, got {activation!r} as well")
    if amax.dtype != torch.float32 or amax.shape != x.shape[:-1]:
        raise ValueError(
            f"quantize_rows needs amax {list(x.shape[:-1])} in fp32, "
            f"got {list(amax.shape)} in {amax.dtype}"
        )


def _check_quantized(op: str, q: Tensor) -> None:
    if q.dtype != torch.int8:
        raise TypeError(f"{op} takes int8 values, got {q.dtype}")
    if q.ndim < 2:
        raise ValueError(f"{op} needs q [..., R, C], got {list(q.shape)}")


def _check_scale(op: str, q: Tensor, scale: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(scale.shape) != tuple(expected):
        raise ValueError(
            f"{op}: q {list(q.shape)} needs scales {list(expected)}, got {list(scale.shape)}"
        )
