"""INT8 linear layer: int8 products on the tensor cores, scales and bias in fp32."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..checks import BLOCK, Remembered, layouts
from ..dispatch import (
    BY_MMA_SYNC,
    HOPPER,
    capability,
    choose,
    has_triton,
    multiprocessors,
    triton_unavailable,
)
from . import hopper, mma, reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_fitting = Remembered()  # layouts of operands that fit together


class Tiles(NamedTuple):
    """What a linear in CUDA C++ is divided into on a GPU, and how many are multiplied at once."""

    rows: int
    columns: int
    at_once: int


def tiles_of(device: torch.device, granularity: str) -> Tiles | None:
    """Those of a linear with scales of "rows" or "blocks"; None where Triton or torch runs it."""
    if triton_unavailable(device) or nvrtc.unavailable():
        return None
    card, count, by_blocks = capability(device), multiprocessors(device), granularity == "blocks"
    if card == HOPPER:
        return None if by_blocks else Tiles(*hopper.tiles(count))
    return Tiles(*mma.tiles(card, count, by_blocks)) if card[0] in BY_MMA_SYNC else None


def rounds(tiles: Tiles, batch: int, rows: int, columns: int) -> int:
    """How often a GPU takes as many tiles as it can at once, until all of a linear are done."""
    many = batch * -(-rows // tiles.rows) * -(-columns // tiles.columns)
    return -(-many // tiles.at_once)


def int8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = (dequantized x @ dequantized w.T + bias) * gate + residual, with exact int8 products.

    The shapes of the scales decide the granularity. Blocks: y = sum over blocks of 128 k of
    (x_q @ w_q.T) * x_scale * w_scale, accumulated in fp32 (TurboDiffusion, arXiv 2512.16093,
    W8A8). Rows: int32 sums over all of K, then the two scales. Bias, gate and residual are applied
    in fp32, before the one rounding to out_dtype.

    Args:
        x_q: int8 `[B, L, K]`, contiguous along K. Blocks of 128 rows restart at every sample.
        x_scale: fp32, blocks `[B, ceil(L/128), ceil(K/128)]` or rows `[B, L]`.
        w_q: int8 `[N, K]`, contiguous along K. K is at most 131071, where int32 sums end.
        w_scale: fp32, blocks `[ceil(N/128), ceil(K/128)]` or rows `[N]`.
        bias: `[N]` of any float dtype, or None.
        out_dtype: bf16, fp16 or fp32.
        gate: `[B, 1, N]` or `[B, L, N]` of any float dtype and any strides, or None.
        residual: `[B, L, N]` of any float dtype, contiguous along N, or None.
        out: `[B, L, N]` of out_dtype, contiguous along N, to write to; None allocates it. It may
            be the residual itself, but overlap no other argument.
        backend: "auto", "triton" or "reference".

    Returns:
        `out`, or a new contiguous `[B, L, N]` in out_dtype.

    Raises:
        ValueError: shapes do not fit together, or a tensor is not contiguous where it has to be.
        TypeError: operands are not int8, scales not fp32, gate or residual not float, out_dtype is
            none of the three, or `out` is not of out_dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    layout = _checked(x_q, x_scale, w_q, w_scale, bias, gate, residual, out, out_dtype)
    if out is None:
        out = torch.empty(*x_q.shape[:2], w_q.shape[0], dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    operands = x_q, x_scale, w_q, w_scale.contiguous(), bias, gate, residual, out
    return _chosen(operands, backend, layout).linear(*operands)


def int8_linear_and_squares(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`int8_linear`, and what the squares of its rows add up to, for a norm that follows.

    Args:
        as `int8_linear`.

    Returns:
        As `int8_linear`; and fp32 `[B, P, L]`, P parts that add up to the sum of a row's squares,
        taken before or after rounding, or None where no kernel has them without reading again.

    Raises:
        as `int8_linear`.
    """
    layout = _checked(x_q, x_scale, w_q, w_scale, bias, None, None, out, out_dtype)
    if out is None:
        out = torch.empty(*x_q.shape[:2], w_q.shape[0], dtype=out_dtype, device=x_q.device)
    if out.numel() == 0:
        return out, None
    bias = None if bias is None else bias.contiguous()
    operands = x_q, x_scale, w_q, w_scale.contiguous(), bias, None, None, out
    kernels = _chosen(operands, backend, layout)
    if kernels in (reference, hopper, mma):
        return kernels.linear_and_squares(*operands)
    return kernels.linear(*operands), None


def _chosen(operands: tuple[Tensor | None, ...], backend: str, layout: object):
    """The module that multiplies these."""
    x_q, x_scale, *_ = operands
    on_hopper = hopper if x_scale.ndim == 2 else None  # blocks run in Triton there
    modules = reference, triton_kernels, on_hopper, mma
    return choose("int8_linear", backend, x_q, *modules, operands=operands, layout=layout)


def _checked(x_q, x_scale, w_q, w_scale, bias, gate, residual, out, out_dtype) -> object:
    """Something that stands for how the operands of `int8_linear` lie, once known to fit."""
    key = layouts(x_q, x_scale, w_q, w_scale, bias, gate, residual, out), out_dtype
    if (layout := _fitting.get(key)) is not None:
        return layout
    _check_operands(x_q, w_q, bias, out_dtype)
    _check_scales(x_q, x_scale, w_q, w_scale)
    _check_epilogue((*x_q.shape[:2], w_q.shape[0]), gate, residual, out, out_dtype)
    return _fitting.put(key, object())


def _check_operands(x_q: Tensor, w_q: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    if x_q.dtype != torch.int8 or w_q.dtype != torch.int8:
        raise TypeError(
            f"int8_linear takes int8 operands, got x_q {x_q.dtype} and w_q {w_q.dtype}: "
            "quantize them with kernels.int8_quant"
        )
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"int8_linear gives bf16, fp16 or fp32, got out_dtype {out_dtype}")
    if x_q.ndim != 3 or w_q.ndim != 2 or x_q.shape[-1] != w_q.shape[-1]:
        raise ValueError(
            "int8_linear needs x_q [B, L, K] and w_q [N, K], "
            f"got {list(x_q.shape)} and {list(w_q.shape)}"
        )
    if x_q.stride(-1) != 1 or w_q.stride(-1) != 1:
        raise ValueError(
            "int8_linear needs x_q and w_q contiguous along K, "
            f"got strides {x_q.stride()} and {w_q.stride()}"
        )
    if bias is not None and bias.shape != (w_q.shape[0],):
        raise ValueError(f"int8_linear needs bias [{w_q.shape[0]}], got {list(bias.shape)}")


def _check_scales(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor) -> None:
    batch, length, k = x_q.shape
    n = w_q.shape[0]
    k_blocks = -(-k // BLOCK)
    blocks = (batch, -(-length // BLOCK), k_blocks), (-(-n // BLOCK), k_blocks)
    rows = (batch, length), (n,)
    got = x_scale.shape, w_scale.shape
    if got not in (rows, blocks):
        blocks, rows, got = ([list(shape) for shape in pair] for pair in (blocks, rows, got))
        raise ValueError(
            f"int8_linear: scales fit neither blocks, x_scale {blocks[0]} and w_scale "
            f"{blocks[1]}, nor rows, {rows[0]} and {rows[1]}; got {got[0]} and {got[1]}"
        )
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"int8_linear takes fp32 scales, got {x_scale.dtype} and {w_scale.dtype}")


def _check_epilogue(
    shape: tuple[int, int, int],
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    batch, _, n = shape
    if gate is not None and gate.shape not in ((batch, 1, n), shape):
        raise ValueError(
            f"int8_linear needs gate [{batch}, 1, {n}] or {list(shape)}, got {list(gate.shape)}"
        )
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"int8_linear needs {name} {list(shape)}, got {list(tensor.shape)}")
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"int8_linear needs {name} contiguous along N, got strides {tensor.stride()}"
            )
    for name, tensor in (("gate", gate), ("residual", residual)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"int8_linear takes a float {name}, got {tensor.dtype}")
    if out is not None and out.dtype != out_dtype:
        raise TypeError(f"int8_linear: out must be of out_dtype {out_dtype}, got {out.dtype}")
